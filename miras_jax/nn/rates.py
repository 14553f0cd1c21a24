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
from miras_jax.errors import UserError
from miras_jax.nn.layers import Projection, split_heads

Activation = Literal["sigmoid", "softplus", "keep"]
"""sigmoid: (0, limit); softplus: positive; keep: one minus a sigmoid, so that `initial`
and its logarithmic spread speak of the fraction that is forgotten."""


class Rate(Protocol):
    """A choice of where a rate comes from."""

    def build(self, width, heads, channels, rngs) -> nnx.Module: ...


@dataclass(frozen=True, repr=False)
class _Learned(Choice):
    """What the learned rates share: activation(x), and the biases it starts from."""

    activation: Activation
    initial: tuple[float, float]
    limit: float = 1.0

    def __post_init__(self):
        low, high = self.initial
        bounded = self.activation != "softplus"
        if not 0 < low <= high or (bounded and high >= self.limit):
            raise UserError(
                f"{self}: initial must be two rising numbers above 0"
                + (f", below limit {self.limit}." if bounded else ".")
            )
        if self.limit != 1 and self.activation != "sigmoid":
            raise UserError(f"{self}: only a sigmoid takes a limit; leave it out.")

    def activate(self, x: jax.Array) -> jax.Array:
        match self.activation:
            case "sigmoid":
                return self.limit * jax.nn.sigmoid(x)
            case "softplus":
                return jax.nn.softplus(x)
            case "keep":
                return jax.nn.sigmoid(-x)

    def biases(self, size: int) -> jax.Array:
        """Those at which the rates (keep: one minus them) are spread over `initial`.

        By numpy: the compiler's logarithm differs in the last bit between meshes.
        """
        y = np.geomspace(*self.initial, size) / self.limit
        softplus = self.activation == "softplus"
        x = np.log(np.expm1(y)) if softplus else np.log(y / (1 - y))
        return jnp.asarray(x, jnp.float32)


@dataclass(frozen=True, repr=False)
class PerHead(_Learned):
    """One data-dependent rate per token and head: activation(x W + b), W small."""

    def build(self, width, heads, channels, rngs):
        return _PerHead(self, width, heads, rngs)


class _PerHead(nnx.Module):
    def __init__(self, config, width, heads, rngs):
        self.config = config
        # 0.1: enough to receive a gradient, too little to hide the stated start.
        self.projection = Projection(
            width,
            heads,
            ("embed", None),
            scale=0.1,
            bias=config.biases(heads),
            rngs=rngs,
        )

    def __call__(self, x):
        return self.config.activate(self.projection(x))


@dataclass(frozen=True, repr=False)
class LowRank(_Learned):
    """Channel-wise: activation(x W_down W_up + b), of rank 32 (Miras, section 5.4).

    W_up starts at zero, as in LoRA. The bias is spread over the heads, and over the
    channels of each head in the same way, shifted by at most one head's step.
    """

    rank: int = 32

    def build(self, width, heads, channels, rngs):
        return _LowRank(self, width, heads, channels, rngs)


class _LowRank(nnx.Module):
    def __init__(self, config, width, heads, channels, rngs):
        self.config = config
        self.heads = heads
        self.down = Projection(width, config.rank, ("embed", None), rngs=rngs)
        self.up = Projection(
            config.rank,
            heads * channels,
            (None, "heads"),
            scale=0.0,
            bias=config.biases(heads * channels),
            rngs=rngs,
        )

    def __call__(self, x):
        return split_heads(self.config.activate(self.up(self.down(x))), self.heads)


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
