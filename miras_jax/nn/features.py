"""Feature maps: what queries and keys become before a memory sees them."""

import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.layers import l2_normalise, param

_ACTIVATIONS = {
    "none": lambda x: x,
    "silu": jax.nn.silu,
    "elu + 1": lambda x: jax.nn.elu(x) + 1,
    "sigmoid": jax.nn.sigmoid,
}


@dataclass(frozen=True, repr=False)
class Features(Choice):
    """phi(x): an activation, then all monomials up to a degree, then a norm.

    degree 2 has the features a_0, a_1 x_i and a_2 x_i x_j (times sqrt 2 for i < j, so
    that phi(q)^T phi(k) = sum a_i^2 (q^T k)^i), with a_i learned from 1 / i! (Atlas,
    arXiv 2505.23735, section 3.1).
    norm: "l2" is x / |x|_2; "scale" divides by K^(1/4), so that products of queries and
    keys are divided by sqrt(K) as in softmax attention.
    """

    activation: Literal["none", "silu", "elu + 1", "sigmoid"] = "none"
    degree: Literal[1, 2] = 1
    norm: Literal["l2", "scale", "none"] = "l2"

    def __post_init__(self):
        known = self.activation in _ACTIVATIONS and self.norm in ("l2", "scale", "none")
        if not known or self.degree not in (1, 2):
            raise UserError(
                f"{self}: activation is one of {', '.join(_ACTIVATIONS)}; norm is l2, "
                "scale or none; degree is 1 or 2."
            )

    def dim(self, channels: int) -> int:
        """How many features so many channels have."""
        if self.degree == 1:
            return channels
        return 1 + channels + channels * (channels + 1) // 2

    def build(self) -> "FeatureMap":
        return FeatureMap(self)


class FeatureMap(nnx.Module):
    """phi of the last axis."""

    def __init__(self, config: Features):
        self.config = config
        coefficients = None
        if config.degree > 1:
            start = [1 / math.factorial(i) for i in range(config.degree + 1)]
            coefficients = param(jnp.asarray(start), (None,))
        self.coefficients = nnx.data(coefficients)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = _ACTIVATIONS[self.config.activation](x)
        if self.coefficients is not None:
            x = _monomials(x, self.coefficients[...])
        if self.config.norm == "l2":
            return l2_normalise(x)
        return x * x.shape[-1] ** -0.25 if self.config.norm == "scale" else x


def _monomials(x, coefficients):
    rows, columns = np.triu_indices(x.shape[-1])
    weight = jnp.asarray(np.where(rows == columns, 1, np.sqrt(2)), x.dtype)
    constant, linear, square = coefficients.astype(x.dtype)
    pairs = x[..., rows] * x[..., columns] * jnp.expand_dims(weight, range(x.ndim - 1))
    parts = (constant * jnp.ones_like(x[..., :1]), linear * x, square * pairs)
    return jnp.concatenate(parts, axis=-1)
