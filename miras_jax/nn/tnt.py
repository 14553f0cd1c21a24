"""TNT: one memory of the whole text, and local ones that begin anew (2511.07343)."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core import engine
from miras_jax.core.types import Choice, Params, Rates, Tokens
from miras_jax.core.variants import linear_attention
from miras_jax.errors import UserError
from miras_jax.nn.documents import Last, beginning, locate
from miras_jax.nn.miras import Miras, MirasLayer, read_memories

PROJECTION = linear_attention()
"""sum_s k_s k_s^T: linear attention whose values are its keys."""


@dataclass(frozen=True, repr=False)
class TNT(Choice):
    """o_t = f(V, q_t) + sum of f(W_t, P_t q_t), P_t = sum_s k_s k_s^T / |k_s|^2.

    Equation 7. The global memory V has large chunks. Each local memory W has small ones
    and returns to its learned start every `shard` tokens, so that shards are read in
    parallel; its queries are projected on the keys of the shard so far. Every memory
    has projections, rates and an output of its own here, and the convolution of a local
    one begins anew, too.
    """

    memory: Miras
    local: tuple[Miras, ...]
    shard: int = 2048

    def __post_init__(self):
        if not self.local:
            raise UserError("TNT needs at least one local memory; use Miras for none.")
        for mixer in self.local:
            rule = mixer.rule
            tokens = math.lcm(mixer.alignment, engine.alignment(PROJECTION))
            if self.shard % tokens or rule.algorithm.steps > 1:
                raise UserError(
                    f"TNT(shard={self.shard}) must be a multiple of {tokens}, what its "
                    "local memories read at once, with one key per token."
                )

    @property
    def alignment(self) -> int:
        return math.lcm(self.memory.alignment, self.shard)

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs):
        return TNTLayer(self, width, output_scale, rngs)


class TNTCache(NamedTuple):
    """The caches of the parts, and where rows were left."""

    memory: Any
    local: tuple[Any, ...]
    last: Last
    shard: jax.Array  # [B] id of the last one: 1 and 2 in turn, 0 before the first


class TNTLayer(nnx.Module):
    """The sum of the global layer and the local ones."""

    def __init__(self, config: TNT, width, output_scale, rngs):
        self.config = config
        self.memory = config.memory.build(width, output_scale, rngs)
        local = [LocalLayer(mixer, width, output_scale, rngs) for mixer in config.local]
        self.local = nnx.List(local)

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> TNTCache:
        return TNTCache(
            self.memory.start(batch, max_length, dtype),
            tuple(layer.start(batch, max_length, dtype) for layer in self.local),
            beginning(batch),
            jnp.zeros(batch, jnp.int32),
        )

    def __call__(self, x, cache=None, segment_ids=None):
        batch, length, width = x.shape
        shard = self.config.shard
        if cache is None:
            y, _ = self.memory(x, None, segment_ids)
            if segment_ids is None and length % shard == 0:
                shards = x.reshape(-1, shard, width)
                return y + self._sum(shards).reshape(x.shape), None
            last, before = beginning(batch), jnp.zeros(batch, jnp.int32)
        else:
            y, memory = self.memory(x, cache.memory, segment_ids)
            last, before = cache.last, cache.shard
        places = locate((batch, length), last, segment_ids)
        starts = places.index % shard == 0
        real = jnp.ones_like(starts) if segment_ids is None else segment_ids != 0
        # To the local memories a shard is a document: neighbours differ in their ids.
        count = before[:, None] + jnp.cumsum(starts & real, axis=1, dtype=jnp.int32)
        ids = jnp.where(real, 2 - count % 2, 0)
        if cache is None:
            return y + self._sum(x, ids), None
        after = []
        now = jnp.where(count[:, -1] > 0, 2 - count[:, -1] % 2, 0)
        for layer, past in zip(self.local, cache.local, strict=True):
            part, past = layer(x, past, ids)
            y = y + part
            # Padding does not end a shard.
            after.append(past._replace(last=past.last._replace(segment=now)))
        return y, TNTCache(memory, tuple(after), places.last, now)

    def _sum(self, x, segment_ids=None):
        return sum(layer(x, None, segment_ids)[0] for layer in self.local)


class LocalLayer(MirasLayer):
    """A Miras layer whose queries are projected on the keys read so far."""

    @property
    def _projection_params(self) -> Params:
        key_dim = self.weights[0].shape[1]
        return Params((jnp.zeros((self.config.memories, key_dim, key_dim)),))

    def start(self, batch, max_length, dtype):
        cache = super().start(batch, max_length, dtype)
        state = jax.vmap(PROJECTION.start)(self._projection_params)
        state = state._replace(position=jnp.zeros(self.config.memories, jnp.int32))
        state = jax.tree.map(lambda x: jnp.repeat(x[None], batch, axis=0), state)
        return cache._replace(memory=(cache.memory, state))

    def _read(self, tokens, memory, documents):
        memory, projection = (None, None) if memory is None else memory
        square = jnp.sum(tokens.keys * tokens.keys, axis=-1)
        pairs = Tokens(
            tokens.queries, tokens.keys, tokens.keys, Rates(learn=1 / (square + 1e-6))
        )
        queries, projection = read_memories(
            PROJECTION, self._projection_params, projection, pairs, documents
        )
        tokens = tokens._replace(queries=queries)
        y, memory = super()._read(tokens, memory, documents)
        return y, None if memory is None else (memory, projection)
