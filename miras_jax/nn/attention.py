"""Softmax attention, full (Transformer++) or in a sliding window, as a mixer."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.layers import Projection, rotate, split_heads


@dataclass(frozen=True, repr=False)
class Attention(Choice):
    """Causal softmax attention with RoPE over all tokens, or the last `window` ones."""

    num_heads: int = 4
    window: int | None = None

    def __post_init__(self):
        if self.num_heads < 1 or (self.window is not None and self.window < 1):
            raise UserError(f"{self} needs at least one head and a window of 1.")

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return AttentionLayer(self, width, output_scale, rngs)


class AttentionCache(NamedTuple):
    """The last keys and values: `window` of them, or as many as will ever be read."""

    keys: jax.Array  # [B, S, H, K], rotated
    values: jax.Array  # [B, S, H, K]
    indices: jax.Array  # [B, S] position in the sequence, -1 for none yet


class AttentionLayer(nnx.Module):
    """q, k, v, RoPE, softmax attention, output projection.

    A cache of full attention that is read beyond its max_length keeps the last
    max_length tokens, that is, it becomes a sliding window.
    """

    def __init__(self, config: Attention, width, output_scale, rngs):
        if width % config.num_heads or (width // config.num_heads) % 2:
            raise UserError(
                f"width {width} must split into {config.num_heads} heads of even "
                "dimension."
            )
        self.config = config
        self.qkv = Projection(width, 3 * width, ("embed", "heads"), rngs=rngs)
        self.output = Projection(
            width, width, ("heads", "embed"), scale=output_scale, rngs=rngs
        )

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> AttentionCache:
        size = max_length if self.config.window is None else self.config.window
        heads = self.config.num_heads
        shape = (batch, size, heads, self.qkv.weight.shape[0] // heads)
        empty = jnp.full((batch, size), -1, jnp.int32)
        return AttentionCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty)

    def __call__(
        self, x: jax.Array, cache: AttentionCache | None = None
    ) -> tuple[jax.Array, AttentionCache | None]:
        """`[B, L, D]` -> the same; without a cache from the start, and none is kept."""
        batch, length, _ = x.shape
        queries, keys, values = (
            split_heads(part, self.config.num_heads)
            for part in jnp.split(self.qkv(x), 3, axis=-1)
        )
        start = 0 if cache is None else jnp.max(cache.indices, axis=1)[:, None] + 1
        indices = start + jnp.broadcast_to(jnp.arange(length), (batch, length))
        channels = queries.shape[-1]
        queries, keys = (rotate(part, indices, channels) for part in (queries, keys))
        window = self.config.window
        if cache is None:
            # Position t sees t - window + 1 ... t.
            span = None if window is None else (window - 1, 0)
            y = jax.nn.dot_product_attention(
                queries, keys, values, is_causal=True, local_window_size=span
            )
        else:
            keys = jnp.concatenate([cache.keys, keys], axis=1)
            values = jnp.concatenate([cache.values, values], axis=1)
            all_indices = jnp.concatenate([cache.indices, indices], axis=1)
            age = indices[:, :, None] - all_indices[:, None, :]
            seen = (age >= 0) & (all_indices[:, None, :] >= 0)
            if window is not None:
                seen &= age < window
            y = jax.nn.dot_product_attention(queries, keys, values, mask=seen[:, None])
            cache = AttentionCache(
                *(part[:, length:] for part in (keys, values, all_indices))
            )
        return self.output(y.reshape(x.shape)), cache
