"""Small layers that every mixer shares, with logical axis names on every parameter.

Each `nnx.Param` carries `axes`, one logical name (or None) per axis of its value;
see `miras_jax.nn.logical`.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core.types import state_dtype
from miras_jax.nn.documents import Places
from miras_jax.nn.logical import Axes, constrain, gathered


def param(value: jax.Array, axes: Axes) -> nnx.Param:
    """A parameter with one logical axis name (or None) per axis."""
    return nnx.Param(value, axes=axes)


def multiply(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x @ matrix for `[..., n]`, with the rows of x in one axis.

    With more of them XLA:CPU transposes what the gradient of the matrix is made of, and
    computes all that is fused with it in that order.
    """
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


class Projection(nnx.Module):
    """y = x W, or y = x W + b in at least float32 if given an initial bias.

    W is normal with variance 1 / fan-in: unit-variance inputs give unit-variance
    outputs.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        axes: tuple[str | None, str | None],
        *,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        bias: jax.Array | None = None,
    ):
        weight = jax.random.normal(rngs.params(), (inputs, outputs))
        self.weight = param(scale * weight / inputs**0.5, axes)
        self.bias = nnx.data(None if bias is None else param(bias, axes[1:]))

    def __call__(self, x: jax.Array) -> jax.Array:
        (y,) = self.in_parts(x, [self.weight.shape[-1]])
        if self.bias is None:
            return y
        return y.astype(state_dtype(y)) + jnp.expand_dims(
            self.bias[...], range(x.ndim - 1)
        )

    def in_parts(self, x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
        """x W, cut into so many channels each.

        A product for each part: of one product of queries, keys and values each device
        of a mesh would hold a piece that has little to do with its heads.
        """
        weight = self.weight[...].astype(x.dtype)
        axes = self.weight.axes
        parts = (multiply(x, gathered(part, axes)) for part in cut(weight, sizes))
        # Where heads are formed from what a product gives, XLA:TPU lays out the product
        # for it and copies more (a Yaad layer: 112 cycles around its kernels, not 94).
        return list(jax.lax.optimization_barrier(tuple(parts)))


def cut(x: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """x in parts of so many channels each."""
    return jnp.split(x, list(itertools.accumulate(sizes))[:-1], axis=-1)


def rms_norm(x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """x / sqrt(mean x^2 + 1e-6) over the last axis, computed in float32 or more."""
    y = x.astype(state_dtype(x))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
    if scale is not None:
        y = y * jnp.expand_dims(scale, range(x.ndim - scale.ndim))
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a learned scale that starts at one."""

    def __init__(self, width: int):
        self.scale = param(jnp.ones(width), ("embed",))

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...])


def l2_normalise(x: jax.Array) -> jax.Array:
    """x / |x|_2 over the last axis, at least in float32; zero stays zero."""
    y = x.astype(state_dtype(x))
    return (y * jax.lax.rsqrt(jnp.sum(y * y, -1, keepdims=True) + 1e-6)).astype(x.dtype)


class CausalConvolution(nnx.Module):
    """Depthwise causal convolution over time, followed by SiLU.

    Starts near the identity (weight 1 on the present, small noise on the past), so that
    an untrained layer sees its own token. The cache is the last kernel - 1 inputs.
    """

    def __init__(self, width: int, *, kernel: int = 4, rngs: nnx.Rngs):
        self.kernel = kernel
        past = 0.1 * jax.random.normal(rngs.params(), (self.kernel, width))
        self.weight = param(past.at[-1].add(1.0), (None, "heads"))

    def start(self, batch: int, dtype: jnp.dtype) -> jax.Array:
        return jnp.zeros((batch, self.kernel - 1, self.weight.shape[1]), dtype)

    def __call__(
        self, parts: Sequence[jax.Array], cache: jax.Array, places: Places | None = None
    ) -> tuple[list[jax.Array], jax.Array]:
        """Parts `[B, L, n]` of all channels -> the same, and the new cache of all.

        Where places tell documents apart, only inputs of a token's own count for it,
        and the cache holds those of the last one, zero before its start.
        """
        sizes = [x.shape[-1] for x in parts]
        weight = self.weight[...].astype(parts[0].dtype)
        pairs = [
            self._one(x, constrain(of, None, "heads"), last.astype(x.dtype), places)
            for x, of, last in zip(
                parts, cut(weight, sizes), cut(cache, sizes), strict=True
            )
        ]
        outputs, caches = zip(*pairs, strict=True)
        return list(outputs), jnp.concatenate(caches, axis=-1)

    def _one(self, x, weight, cache, places):
        padded = jnp.concatenate([cache, x], axis=1)
        length = x.shape[1]
        apart = places is not None and places.documents is not None

        def past(back):
            first = self.kernel - 1 - back
            inputs = padded[:, first : first + length]
            if not apart or back == 0:
                return inputs
            return jnp.where((places.index >= back)[:, :, None], inputs, 0)

        y = sum(
            past(back) * weight[None, None, self.kernel - 1 - back]
            for back in range(self.kernel)
        )
        if not apart:
            return jax.nn.silu(y), padded[:, length:]
        kept = jnp.arange(self.kernel - 1)[None]
        here = (places.read[:, None] + kept)[:, :, None]
        window = jnp.take_along_axis(padded, here, axis=1)
        own = places.last.index[:, None] >= self.kernel - 1 - kept
        return jax.nn.silu(y), jnp.where(own[:, :, None], window, 0)


class SwiGLU(nnx.Module):
    """W_3 (silu(x W_1) * (x W_2)), the MLP of Llama."""

    def __init__(self, width: int, hidden: int, *, scale: float, rngs: nnx.Rngs):
        self.gate = Projection(width, hidden, ("embed", "hidden"), rngs=rngs)
        self.up = Projection(width, hidden, ("embed", "hidden"), rngs=rngs)
        self.down = Projection(
            hidden, width, ("hidden", "embed"), scale=scale, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rotate(
    x: jax.Array, positions: jax.Array, channels: int, base: float = 10_000.0
) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) of `[B, L, H, D]` at `[B, L]`.

    Turns the first `channels` (an even number) of D and leaves the others. Their halves
    are paired; the angle of pair i is position / base^(2i/channels).
    """
    x, rest = x[..., :channels], x[..., channels:]
    half = channels // 2
    dtype = state_dtype(x)
    frequency = base ** (-jnp.arange(half, dtype=dtype) / half)
    angle = positions[:, :, None, None].astype(dtype) * frequency[None, None, None]
    first, second = jnp.split(x.astype(dtype), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*(r.astype(x.dtype) for r in rotated), rest], axis=-1)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """`[B, L, H * D]` -> `[B, L, H, D]`."""
    return x.reshape(*x.shape[:2], heads, -1)
