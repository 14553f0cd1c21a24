"""Titans' three ways to join memory and attention (arXiv 2501.00663, section 4).

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
class MAG(Choice):
    """Memory as a gate: o = y * M(x), y a sliding window over x too (eq. 26 to 28).

    The product is of outputs that are normalised with learned weights, the memory's
    behind a sigmoid; which non-linearity is not stated.
    """

    memory: Miras
    attention: Attention

    @property
    def alignment(self) -> int:
        return self.memory.alignment

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return MAGLayer(self, width, output_scale, rngs)


class MAGLayer(nnx.Module):
    """Both branches side by side; their caches are a pair."""

    def __init__(self, config: MAG, width, output_scale, rngs):
        self.memory = config.memory.build(width, 1.0, rngs)
        self.attention = config.attention.build(width, 1.0, rngs)
        self.gate = _Gate(width, output_scale)

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> tuple[Any, Any]:
        parts = (self.memory, self.attention)
        return tuple(part.start(batch, max_length, dtype) for part in parts)

    def __call__(self, x, cache=None, segment_ids=None):
        past = (None, None) if cache is None else cache
        remembered, memory = self.memory(x, past[0], segment_ids)
        y, attention = self.attention(x, past[1], segment_ids)
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
class MAL(Choice):
    """Memory as a layer: o = a sliding window over y = M(x) (eq. 29 to 31)."""

    memory: Miras
    attention: Attention

    @property
    def alignment(self) -> int:
        return self.memory.alignment

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return MALLayer(self, width, output_scale, rngs)


class MALLayer(nnx.Module):
    """One after the other; their caches are a pair."""

    def __init__(self, config: MAL, width, output_scale, rngs):
        self.memory = config.memory.build(width, 1.0, rngs)
        self.attention = config.attention.build(width, output_scale, rngs)

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> tuple[Any, Any]:
        parts = (self.memory, self.attention)
        return tuple(part.start(batch, max_length, dtype) for part in parts)

    def __call__(self, x, cache=None, segment_ids=None):
        past = (None, None) if cache is None else cache
        y, memory = self.memory(x, past[0], segment_ids)
        y, attention = self.attention(y, past[1], segment_ids)
        return y, None if cache is None else (memory, attention)


@dataclass(frozen=True, repr=False)
class MAC(Choice):
    """Memory as a context (eq. 21 to 25), segment by segment of the input S.

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
    """The memory now and before the segment, and the segment's keys and values."""

    memory: MirasCache
    before: State  # leaves [B, G, ...]
    keys: jax.Array  # [B, 2 S, H, K], of h in front of those of the segment
    values: jax.Array  # [B, 2 S, H, K]
    index: jax.Array  # [] place in the segment, of all rows


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
        return MACCache(memory, memory.memory, empty, empty, jnp.zeros((), jnp.int32))

    def __call__(self, x, cache=None, segment_ids=None):
        if segment_ids is not None:
            raise UserError(
                "MAC reads one document per row; use MAG, MAL or TNT for segment_ids, "
                "or TextFiles(documents='joined')."
            )
        size, length = self.config.segment, x.shape[1]
        if cache is not None and length == 1:
            return self._advance(cache, x)
        if cache is not None:

            def one(cache, token):
                y, cache = self._advance(cache, token[:, None])
                return cache, y[:, 0]

            cache, y = jax.lax.scan(one, cache, jnp.moveaxis(x, 1, 0))
            return jnp.moveaxis(y, 0, 1), cache
        padded = jnp.pad(x, ((0, 0), (0, -length % size), (0, 0)))
        segments = padded.reshape(len(x), -1, size, x.shape[2])

        @jax.checkpoint
        def segment(cache, part):
            y, cache = self._advance(cache, part)
            return cache, y

        start = self.start(len(x), length, x.dtype)
        _, y = jax.lax.scan(segment, start, jnp.moveaxis(segments, 1, 0))
        return jnp.moveaxis(y, 0, 1).reshape(padded.shape)[:, :length], None

    def _advance(self, cache: MACCache, x: jax.Array):
        """Some tokens of one segment, from the place where the cache was left."""
        config, size = self.config, self.config.segment
        batch, length, _ = x.shape
        first = cache.index == 0
        before = jax.tree.map(
            lambda now, old: jnp.where(first, now, old),
            cache.memory.memory,
            cache.before,
        )
        h = self._recall(before, x)
        places = cache.index + jnp.arange(length)
        at = jnp.concatenate([places, size + places])
        queries, keys, values = (
            split_heads(part, config.num_heads)
            for part in jnp.split(self.qkv(jnp.concatenate([h, x], 1)), 3, axis=-1)
        )
        channels = queries.shape[-1]
        turned = jnp.broadcast_to(at, (batch, 2 * length))
        queries, keys = (rotate(part, turned, channels) for part in (queries, keys))
        keys = cache.keys.at[:, at].set(keys.astype(cache.keys.dtype))
        values = cache.values.at[:, at].set(values.astype(cache.values.dtype))
        seen = jnp.arange(2 * size)[None] % size <= places[:, None]
        seen = jnp.broadcast_to(seen, (batch, length, 2 * size))
        y = attend(queries[:, length:], keys, values, seen, self.persistent[...])
        y = self.output(y.reshape(x.shape))
        remembered, memory = self.memory(y, cache.memory)
        index = (cache.index + length) % size
        return self.gate(y, remembered), MACCache(memory, before, keys, values, index)

    def _recall(self, memory: State, x: jax.Array) -> jax.Array:
        """h = M(x W_Q), `[B, L, D]`."""
        layer = self.memory
        features = layer.query_features
        queries = features(split_heads(self.queries(x), layer.config.memories))
        recall = jax.vmap(layer.config.rule.recall, (0, 0, 1), 1)
        recall = jax.vmap(recall, (None, 0, 0))
        h = recall(layer.memory_params, memory, queries)
        return self.recalled(rms_norm(h).reshape(*x.shape[:2], -1))
