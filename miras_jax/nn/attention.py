"""Softmax attention, full (Transformer++) or in a sliding window, as a mixer."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.documents import Last, beginning, locate
from miras_jax.nn.layers import Projection, param, rotate, split_heads
from pallas_kernels.attention import attention, implementation_of


@dataclass(frozen=True, repr=False)
class Attention(Choice):
    """Causal softmax attention with RoPE over all tokens, or the last `window` ones.

    Run by the kernels that JAX ships where they can (pallas_kernels/attention).

    num_kv_heads: heads of keys and values, each for an equal group of query heads
    (arXiv 2305.13245); None: as many as query heads.
    persistent: learned keys and values that every token sees, without a place of their
    own: what is known of the task whatever the text (Titans, arXiv 2501.00663, section
    3.3, where tokens in front of the input are learned).
    """

    num_heads: int = 4
    window: int | None = None
    num_kv_heads: int | None = None
    persistent: int = 0

    alignment = 1

    def __post_init__(self):
        if self.num_heads < 1 or (self.window is not None and self.window < 1):
            raise UserError(f"{self} needs at least one head and a window of 1.")
        if self.kv_heads < 1 or self.num_heads % self.kv_heads:
            raise UserError(f"{self}: num_heads must be a multiple of num_kv_heads.")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return AttentionLayer(self, width, output_scale, rngs)

    def implementation(
        self, width: int, length: int, dtype, packed: bool, carried: bool = False
    ) -> str:
        """What texts of this length are read by: of `pallas_kernels.attention`.

        On the platform that is traced for; packed: with segment ids; carried: on from
        a cache of as many tokens as the text or the window has.
        """
        shape = (1, length, self.num_heads, width // self.num_heads)
        queries = jax.ShapeDtypeStruct(shape, dtype)
        seen = length + carried * (self.window or length)
        shape = (1, seen, self.kv_heads, width // self.num_heads)
        pairs = [jax.ShapeDtypeStruct(shape, dtype)] * 2
        return implementation_of(
            queries,
            *pairs,
            segments=jax.ShapeDtypeStruct((1, seen), jnp.int32)
            if packed or carried
            else None,
            window=self.window,
            always=tuple(pairs) if self.persistent else None,
        )


class AttentionCache(NamedTuple):
    """The last keys and values: `window` of them, or as many as will ever be read."""

    keys: jax.Array  # [B, S, G, K], rotated
    values: jax.Array  # [B, S, G, K]
    indices: jax.Array  # [B, S] place in the document, -1 for none yet
    last: Last


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
        self.channels = width // config.num_heads
        read = width + 2 * config.kv_heads * self.channels
        self.qkv = Projection(width, read, ("embed", "heads"), rngs=rngs)
        self.output = Projection(
            width, width, ("heads", "embed"), scale=output_scale, rngs=rngs
        )
        self.persistent = nnx.data(None)
        if config.persistent:
            shape = (2, config.persistent, config.kv_heads, self.channels)
            pairs = jax.random.normal(rngs.params(), shape)
            self.persistent = param(pairs, (None, None, "memory", None))

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> AttentionCache:
        size = max_length if self.config.window is None else self.config.window
        shape = (batch, size, self.config.kv_heads, self.channels)
        empty = jnp.full((batch, size), -1, jnp.int32)
        nothing = jnp.zeros(shape, dtype)
        return AttentionCache(nothing, nothing, empty, beginning(batch))

    def __call__(
        self,
        x: jax.Array,
        cache: AttentionCache | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, AttentionCache | None]:
        """`[B, L, D]` -> the same; without a cache from the start, and none is kept."""
        batch, length, _ = x.shape
        groups = self.config.kv_heads
        last = beginning(batch) if cache is None else cache.last
        places = locate((batch, length), last, segment_ids)
        counts = (self.config.num_heads, groups, groups)
        parts = self.qkv.in_parts(x, [count * self.channels for count in counts])
        queries, keys, values = map(split_heads, parts, counts)
        queries, keys = (
            rotate(part, places.index, self.channels) for part in (queries, keys)
        )
        y, cache = self._attend(queries, keys, values, places, cache)
        return self.output(y.reshape(x.shape)), cache

    def _attend(self, queries, keys, values, places, cache):
        """Of the tokens, with what is in the cache, and within documents."""
        length = queries.shape[1]
        indices = places.index
        document = jnp.zeros_like(indices)  # 0: the one that the cache is of
        if places.documents is not None:
            indices = jnp.where(places.documents.real, indices, -1)
            document = jnp.cumsum(places.documents.starts, axis=1, dtype=jnp.int32)
        all_indices, all_documents = indices, document
        if cache is not None:
            keys = jnp.concatenate([cache.keys, keys], axis=1)
            values = jnp.concatenate([cache.values, values], axis=1)
            all_indices = jnp.concatenate([cache.indices, indices], axis=1)
            past = jnp.zeros_like(cache.indices)
            all_documents = jnp.concatenate([past, document], axis=1)
        segments = None
        if cache is not None or places.documents is not None:
            segments = jnp.where(all_indices >= 0, all_documents, -1)
        persistent = None if self.persistent is None else self.persistent[...]
        y = attention(
            queries,
            keys,
            values,
            segments=segments,
            window=self.config.window,
            always=persistent,
        )
        if cache is None:
            return y, None
        if places.documents is not None:
            # Kept: the last document's, in order, behind all that is padding or older.
            own = all_documents == document[:, -1:]
            all_indices = jnp.where(own, all_indices, -1)
            order = jnp.argsort(all_indices, axis=1, stable=True)
            all_indices = jnp.take_along_axis(all_indices, order, axis=1)
            keys, values = (
                jnp.take_along_axis(part, order[:, :, None, None], axis=1)
                for part in (keys, values)
            )
        kept = (part[:, length:] for part in (keys, values, all_indices))
        return y, AttentionCache(*kept, places.last)
