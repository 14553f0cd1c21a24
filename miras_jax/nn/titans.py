"""Titans' three ways to join memory and attention (arXiv 2501.00663).

The persistent tokens that the paper puts in front of the input are learned keys and
values of the attention here (`Attention(persistent=...)`); what the memory would learn
from them is in its learned start.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core.types import Choice, State
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.documents import locate
from miras_jax.nn.layers import (
    Projection,
    param,
    rms_norm,
    rotate,
    split_heads,
)
from miras_jax.nn.miras import Miras, MirasCache
from pallas_kernels.attention import attend


@dataclass(frozen=True, repr=False)
class _Pair(Choice):
    """A memory and a sliding window; documents begin where the memory's chunks do."""

    memory: Miras
    attention: Attention

    @property
    def alignment(self) -> int:
        return self.memory.alignment


class MAG(_Pair):
    """Memory as a gate: o = y * M(x), y a sliding window over x too.

    The product is of outputs that are normalised with learned weights, the memory's
    behind a sigmoid; which non-linearity is not stated.
    """

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return _PairLayer(self, width, 1.0, _Gate(width, output_scale), rngs)


class MAL(_Pair):
    """Memory as a layer: o = a sliding window over y = M(x)."""

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return _PairLayer(self, width, output_scale, None, rngs)


class _PairLayer(nnx.Module):
    """Side by side before a gate, or one after the other; the caches are a pair."""

    def __init__(self, config: _Pair, width, scale, gate: "_Gate | None", rngs):
        self.memory = config.memory.build(width, 1.0, rngs)
        self.attention = config.attention.build(width, scale, rngs)
        self.gate = nnx.data(gate)

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> tuple[Any, Any]:
        parts = (self.memory, self.attention)
        return tuple(part.start(batch, max_length, dtype) for part in parts)

    def __call__(self, x, cache=None, segment_ids=None):
        past = (None, None) if cache is None else cache
        remembered, memory = self.memory(x, past[0], segment_ids)
        read = remembered if self.gate is None else x
        y, attention = self.attention(read, past[1], segment_ids)
        if self.gate is not None:
            y = self.gate(y, remembered)
        return y, None if cache is None else (memory, attention)


class _Gate(nnx.Module):
    """norm(y) * sigmoid(norm(z)), norms with learned weights; y's start at `scale`."""

    def __init__(self, width: int, scale: float):
        # Twice, as the sigmoid starts near one half.
        scales = jnp.stack([jnp.full(width, 2 * scale), jnp.ones(width)])
        self.scales = param(scales, (None, "embed"))

    def __call__(self, y, z):
        of_y, of_z = self.scales[...]
        return rms_norm(y, of_y) * jax.nn.sigmoid(rms_norm(z, of_z))


@dataclass(frozen=True, repr=False)
class MAC(Choice):
    """Memory as a context, segment by segment of the input S.

    h = M(S W_Q), at the weights before the segment; y = attention over the persistent
    pairs, h and S; the memory learns y; o = y * M(y), gated as in `MAG`.

    Token t sees h and S up to its own, and M(y_t) is read after y_t was learned and
    none later: the paper's order, the whole of h first and M after the segment, would
    show a token what follows it. Documents in one row are not supported.
    """

    memory: Miras
    segment: int = 64
    num_heads: int = 4
    persistent: int = 4

    def __post_init__(self):
        rule = self.memory.rule
        if self.segment % rule.chunk_size or rule.algorithm.steps > 1:
            raise UserError(
                f"MAC(segment={self.segment}) must be a multiple of the chunks of its "
                f"memory, {rule.chunk_size}, with one key per token."
            )

    @property
    def alignment(self) -> int:
        return self.segment

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return MACLayer(self, width, output_scale, rngs)


class MACCache(NamedTuple):
    """The memory now and before the segment, and the segment's keys and values.

    The place in the segment is that of the memory's last token, row by row.
    """

    memory: MirasCache
    before: State  # leaves [B, G, ...]
    keys: jax.Array  # [B, 2 S, H, K], of h in front of those of the segment
    values: jax.Array  # [B, 2 S, H, K]


class MACLayer(nnx.Module):
    """Recall, attention and memory, over whole segments or token by token."""

    def __init__(self, config: MAC, width, output_scale, rngs):
        if width % config.num_heads or (width // config.num_heads) % 2:
            raise UserError(
                f"width {width} must split into {config.num_heads} heads of even "
                "dimension."
            )
        self.config = config
        memory = config.memory
        key_dim, value_dim = memory.dims(width)
        self.memory = memory.build(width, 1.0, rngs)
        self.queries = Projection(
            width, memory.memories * key_dim, ("embed", "heads"), rngs=rngs
        )
        self.recalled = Projection(
            memory.memories * value_dim, width, ("heads", "embed"), rngs=rngs
        )
        self.qkv = Projection(width, 3 * width, ("embed", "heads"), rngs=rngs)
        self.output = Projection(width, width, ("heads", "embed"), rngs=rngs)
        shape = (2, config.persistent, config.num_heads, width // config.num_heads)
        pairs = jax.random.normal(rngs.params(), shape)
        self.persistent = param(pairs, (None, None, "memory", None))
        self.gate = _Gate(width, output_scale)

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> MACCache:
        memory = self.memory.start(batch, max_length, dtype)
        heads = self.config.num_heads
        width = self.qkv.weight.shape[0]
        empty = jnp.zeros(
            (batch, 2 * self.config.segment, heads, width // heads), dtype
        )
        return MACCache(memory, memory.memory, empty, empty)

    def __call__(self, x, cache=None, segment_ids=None):
        size, (batch, length, _) = self.config.segment, x.shape
        if cache is None:
            start = self.start(batch, length, x.dtype)
            return self._by_segment(start, x, segment_ids)[0], None
        if length == 1:
            return self._advance(cache, x, segment_ids)
        if length % size:
            return self._by_token(cache, x, segment_ids)
        places = locate((batch, length), cache.memory.last, segment_ids)
        off = (places.index - jnp.arange(length)[None]) % size != 0
        if segment_ids is not None:
            off &= places.documents.real
        return jax.lax.cond(
            jnp.any(off), self._by_token, self._by_segment, cache, x, segment_ids
        )

    def _by_token(self, cache: MACCache, x: jax.Array, segment_ids: jax.Array | None):
        """Wherever the segments of each row begin."""
        return self._scan(cache, x, segment_ids, 1)

    def _by_segment(self, cache: MACCache, x: jax.Array, segment_ids: jax.Array | None):
        """Where those of all rows begin at multiples of their size."""
        return self._scan(cache, x, segment_ids, self.config.segment)

    def _scan(self, cache, x, segment_ids, size):
        """`size` tokens at a time; those beyond the last are read as if they followed,
        so that only outputs count then."""

        def parts(t):
            widths = ((0, 0), (0, -x.shape[1] % size)) + ((0, 0),) * (t.ndim - 2)
            t = jnp.pad(t, widths)
            return jnp.moveaxis(t.reshape(len(t), -1, size, *t.shape[2:]), 1, 0)

        @jax.checkpoint
        def advance(cache, part):
            y, cache = self._advance(cache, *part)
            return cache, y

        cache, y = jax.lax.scan(advance, cache, jax.tree.map(parts, (x, segment_ids)))
        y = jnp.moveaxis(y, 0, 1)
        return y.reshape(len(x), -1, x.shape[2])[:, : x.shape[1]], cache

    def _advance(self, cache: MACCache, x: jax.Array, segment_ids=None):
        """Tokens that lie in one segment of one document, in each row."""
        config, size = self.config, self.config.segment
        batch, length, _ = x.shape
        places = locate((batch, length), cache.memory.last, segment_ids)
        place = places.index % size  # [B, L]
        now, first = cache.memory.memory, place[:, 0] == 0
        if segment_ids is not None:
            real, starts = places.documents.real, places.documents.starts
            fresh = self.memory.start(batch, length, x.dtype).memory
            now = _rows(starts[:, 0], fresh, now)
            first &= real[:, 0]
        before = _rows(first, now, cache.before)
        h = self._recall(before, x)
        at = jnp.concatenate([place, size + place], 1)
        queries, keys, values = (
            split_heads(part, config.num_heads)
            for part in self.qkv.in_parts(jnp.concatenate([h, x], 1), [x.shape[-1]] * 3)
        )
        channels = queries.shape[-1]
        queries, keys = (rotate(part, at, channels) for part in (queries, keys))
        if segment_ids is not None:
            # Padding is written nowhere.
            at = jnp.where(jnp.tile(real, (1, 2)), at, 2 * size)
        at = (jnp.arange(batch)[:, None], at)
        keys = cache.keys.at[at].set(keys.astype(cache.keys.dtype), mode="drop")
        values = cache.values.at[at].set(values.astype(cache.values.dtype), mode="drop")
        seen = jnp.arange(2 * size)[None, None] % size <= place[:, :, None]
        y = attend(queries[:, length:], keys, values, seen, self.persistent[...])
        y = self.output(y.reshape(x.shape))
        remembered, memory = self.memory(y, cache.memory, segment_ids)
        return self.gate(y, remembered), MACCache(memory, before, keys, values)

    def _recall(self, memory: State, x: jax.Array) -> jax.Array:
        """h = M(x W_Q), `[B, L, D]`."""
        layer = self.memory
        features = layer.query_features
        queries = features(split_heads(self.queries(x), layer.config.memories))
        recall = jax.vmap(layer.config.rule.recall, (0, 0, 1), 1)
        recall = jax.vmap(recall, (None, 0, 0))
        h = recall(layer.memory_params, memory, queries)
        return self.recalled(rms_norm(h).reshape(*x.shape[:2], -1))


def _rows(condition: jax.Array, yes: State, no: State) -> State:
    """yes in the rows `[B]` where the condition holds."""
    return jax.tree.map(
        lambda y, n: jnp.where(jnp.expand_dims(condition, range(1, n.ndim)), y, n),
        yes,
        no,
    )
