"""Where a memory's rates come from: parametrisations of learn, keep and the others.

A parametrisation is a frozen dataclass; `build` makes the nnx module that maps the
layer's input `[B, L, D]`, and where it needs them what is `Given` besides, to rates
`[B, L, H]` or `[B, L, H, K]`, in float32 or more. All start
from stated values: the projection of the input starts at (nearly) zero, and biases are
spread log-uniformly over `initial` = (low, high), so that an untrained layer already
has memories of many time scales.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.layers import Projection, param, split_heads

Activation = Literal["sigmoid", "softplus", "keep", "bounded keep"]
"""sigmoid: (0, limit); softplus: positive; keep: a sigmoid, of which the root is taken
that `temperature` says; bounded keep: exp(-e^(-1/2) sigmoid), above 0.545 (RWKV-7).
`initial` and its logarithmic spread speak, of keep, of the fraction forgotten."""


class Given(NamedTuple):
    """What a rate may depend on besides the layer's input."""

    index: jax.Array  # [B, L] place of the token in its document
    keys: jax.Array  # [B, L, H, K]
    rates: dict[str, jax.Array]  # those before it, in the order of `Rates`


class Rate(Protocol):
    """A choice of where a rate comes from."""

    def build(self, width, heads, channels, rngs) -> nnx.Module: ...


_STEEPEST = float(np.exp(-0.5))


@dataclass(frozen=True, repr=False)
class _Learned(Choice):
    """What the learned rates share: activation(x), and the biases it starts from."""

    activation: Activation
    initial: tuple[float, float]
    limit: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        low, high = self.initial
        highest = {"softplus": np.inf, "bounded keep": 1 - np.exp(-_STEEPEST)}
        highest = highest.get(self.activation, self.limit)
        if not 0 < low <= high or high >= highest:
            bound = "" if highest == np.inf else f", below limit {highest:.4g}"
            raise UserError(
                f"{self}: initial must be two rising numbers above 0{bound}."
            )
        if self.temperature != 1 and self.activation != "keep":
            raise UserError(f"{self}: only keep takes a temperature; leave it out.")
        if self.limit != 1 and self.activation != "sigmoid":
            raise UserError(f"{self}: only a sigmoid takes a limit; leave it out.")

    def activate(self, x: jax.Array) -> jax.Array:
        match self.activation:
            case "sigmoid":
                return self.limit * jax.nn.sigmoid(x)
            case "softplus":
                return jax.nn.softplus(x)
            case "keep":
                keep = jax.nn.sigmoid(-x)
                return keep if self.temperature == 1 else keep ** (1 / self.temperature)
            case "bounded keep":
                return jnp.exp(-_STEEPEST * jax.nn.sigmoid(x))

    def biases(self, size: int) -> jax.Array:
        """Those at which the rates (keep: one minus them) are spread over `initial`.

        By numpy: the compiler's logarithm differs in the last bit between meshes.
        """
        y = np.geomspace(*self.initial, size)
        match self.activation:
            case "softplus":
                return jnp.asarray(np.log(np.expm1(y)), jnp.float32)
            case "sigmoid":
                y = y / self.limit
            case "keep":
                y = 1 - (1 - y) ** self.temperature
            case "bounded keep":
                y = -np.log1p(-y) / _STEEPEST
        return jnp.asarray(np.log(y / (1 - y)), jnp.float32)


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

    def __call__(self, x, given=None):
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

    def __call__(self, x, given=None):
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

    def __call__(self, x, given=None):
        return jnp.broadcast_to(jnp.asarray(self.rate), (*x.shape[:2], len(self.rate)))


@dataclass(frozen=True, repr=False)
class Constants(Choice):
    """The same for every token: one number for each head; not learned."""

    values: tuple[float, ...]

    def build(self, width, heads, channels, rngs):
        if len(self.values) != heads:
            raise UserError(
                f"{self} has {len(self.values)} values for {heads} heads; one each."
            )
        return _Fixed(self.values)


@dataclass(frozen=True, repr=False)
class ExpDecay(Choice):
    """keep = exp(-a dt), dt = softplus(x W + b): the gate of Mamba's family.

    a > 0 is learned, one per head, from a log-uniform spread over `a`; b from one of dt
    over `dt`. rank: channel-wise, of a low-rank W; None: one number per head.
    """

    dt: tuple[float, float] = (0.001, 0.1)
    a: tuple[float, float] = (1.0, 16.0)
    rank: int | None = None

    def build(self, width, heads, channels, rngs):
        if self.rank is None:
            step = PerHead("softplus", self.dt)
        else:
            step = LowRank("softplus", self.dt, rank=self.rank)
        step = step.build(width, heads, channels, rngs)
        return _Decay(np.geomspace(*self.a, heads), step)


@dataclass(frozen=True, repr=False)
class Discretised(Choice):
    """keep = exp(-a learn), a > 0 learned: a decay discretised with the step size.

    over: "heads" has one a per head from a log-uniform spread over `a` (Mamba-2),
    "channels" one per head and channel, from an even spread (Mamba: 1, 2, ... N).
    """

    a: tuple[float, float] = (1.0, 16.0)
    over: Literal["heads", "channels"] = "heads"

    def build(self, width, heads, channels, rngs):
        if self.over == "heads":
            return _Decay(np.geomspace(*self.a, heads), None)
        spread = np.linspace(*self.a, channels)
        return _Decay(np.broadcast_to(spread, (heads, channels)), None)


class _Decay(nnx.Module):
    """exp(-a dt), dt from its own module or the rate learn."""

    def __init__(self, a, step):
        axes = ("heads", None)[: a.ndim] if a.ndim > 1 else (None,)
        self.log_a = param(jnp.asarray(np.log(a), jnp.float32), axes)
        self.step = nnx.data(step)

    def __call__(self, x, given=None):
        step = given.rates["learn"] if self.step is None else self.step(x)
        a = jnp.exp(self.log_a[...])
        missing = step.ndim - 2 - a.ndim
        if missing < 0:
            step = step[..., None]
        a = a.reshape(*a.shape, *(1,) * max(missing, 0))
        return jnp.exp(-jnp.expand_dims(a, (0, 1)) * step)


@dataclass(frozen=True, repr=False)
class FromKeys(Choice):
    """keep = 1 - key: the key is the fraction forgotten (HGRN2)."""

    def build(self, width, heads, channels, rngs):
        return _FromKeys()


class _FromKeys(nnx.Module):
    def __call__(self, x, given):
        return 1 - given.keys


@dataclass(frozen=True, repr=False)
class ChunkStart(Choice):
    """The rate at the first token of every chunk of `size`, and 1 at the others."""

    rate: Rate
    size: int

    def build(self, width, heads, channels, rngs):
        return _ChunkStart(self.size, self.rate.build(width, heads, channels, rngs))


class _ChunkStart(nnx.Module):
    def __init__(self, size, rate):
        self.size = size
        self.rate = rate

    def __call__(self, x, given):
        rate = self.rate(x, given)
        first = given.index % self.size == 0
        return jnp.where(jnp.expand_dims(first, range(2, rate.ndim)), rate, 1)
