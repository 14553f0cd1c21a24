"""Where a memory's rates come from: parametrisations of learn, keep and the others.

A parametrisation is a frozen dataclass; `build` makes the nnx module that maps the
layer's input `[B, L, D]` to rates `[B, L, H]` or `[B, L, H, K]`, in float32. All start
from stated values: the projection of the input starts at (nearly) zero, and biases are
spread log-uniformly over `initial` = (low, high), so that an untrained layer already
has memories of many time scales.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from miras_jax.core.types import Choice
from miras_jax.nn.layers import Projection, split_heads

Activation = Literal["sigmoid", "softplus", "keep"]
"""sigmoid: (0, 1); softplus: positive; keep: one minus a sigmoid, so that `initial` and
its logarithmic spread speak of the fraction that is forgotten."""


class Rate(Protocol):
    """A choice of where a rate comes from."""

    def build(self, width, heads, channels, rngs) -> nnx.Module: ...


def _activate(name: Activation, x: jax.Array) -> jax.Array:
    match name:
        case "sigmoid":
            return jax.nn.sigmoid(x)
        case "softplus":
            return jax.nn.softplus(x)
        case "keep":
            return jax.nn.sigmoid(-x)


def _inverse(name: Activation, y: jax.Array) -> jax.Array:
    """The bias x at which the rate (for "keep": one minus the rate) is y."""
    return jnp.log(jnp.expm1(y)) if name == "softplus" else jnp.log(y / (1 - y))


def _spread(low: float, high: float, size: int) -> jax.Array:
    return jnp.asarray(np.geomspace(low, high, size), jnp.float32)


@dataclass(frozen=True, repr=False)
class PerHead(Choice):
    """One data-dependent rate per token and head: activation(x W + b), W small."""

    activation: Activation
    initial: tuple[float, float]

    def build(self, width, heads, channels, rngs):
        bias = _inverse(self.activation, _spread(*self.initial, heads))
        return _PerHead(self.activation, width, bias, rngs)


class _PerHead(nnx.Module):
    def __init__(self, activation, width, bias, rngs):
        self.activation = activation
        # 0.1: enough to receive a gradient, too little to hide the stated start.
        self.projection = Projection(
            width, len(bias), ("embed", None), scale=0.1, bias=bias, rngs=rngs
        )

    def __call__(self, x):
        return _activate(self.activation, self.projection(x))


@dataclass(frozen=True, repr=False)
class LowRank(Choice):
    """Channel-wise: activation(x W_down W_up + b), of rank 32 (Miras, section 5.4).

    W_up starts at zero, as in LoRA. The bias is spread over the heads, and over the
    channels of each head in the same way, shifted by at most one head's step.
    """

    activation: Activation
    initial: tuple[float, float]
    rank: int = 32

    def build(self, width, heads, channels, rngs):
        bias = _inverse(self.activation, _spread(*self.initial, heads * channels))
        return _LowRank(self.activation, width, heads, self.rank, bias, rngs)


class _LowRank(nnx.Module):
    def __init__(self, activation, width, heads, rank, bias, rngs):
        self.activation = activation
        self.heads = heads
        self.down = Projection(width, rank, ("embed", None), rngs=rngs)
        self.up = Projection(
            rank, len(bias), (None, "heads"), scale=0.0, bias=bias, rngs=rngs
        )

    def __call__(self, x):
        rate = _activate(self.activation, self.up(self.down(x)))
        return split_heads(rate, self.heads)


@dataclass(frozen=True, repr=False)
class Fixed(Choice):
    """One constant per head, spread log-uniformly over `initial`; not learned.

    With activation "keep" the constants are one minus the rate, as in RetNet's keep,
    which is 1 - 2^-5 ... 1 - 2^-8.
    """

    initial: tuple[float, float]
    activation: Literal["identity", "keep"] = "identity"

    def build(self, width, heads, channels, rngs):
        rate = np.geomspace(*self.initial, heads)
        return _Fixed(1 - rate if self.activation == "keep" else rate)


class _Fixed(nnx.Module):
    def __init__(self, rate):
        self.rate = tuple(float(r) for r in rate)

    def __call__(self, x):
        return jnp.broadcast_to(jnp.asarray(self.rate), (*x.shape[:2], len(self.rate)))
