"""The Miras layer: a rule as a sequence mixer (Miras, section 5.4)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core import engine
from miras_jax.core.rule import Rule
from miras_jax.core.types import Choice, Documents, Params, Rates, State, Tokens
from miras_jax.errors import UserError
from miras_jax.nn.defaults import RateChoices as RateChoices
from miras_jax.nn.defaults import default_rates as default_rates
from miras_jax.nn.documents import Last, Places, beginning, locate
from miras_jax.nn.features import Features
from miras_jax.nn.layers import (
    CausalConvolution,
    Projection,
    l2_normalise,
    param,
    rotate,
    split_heads,
)
from miras_jax.nn.output import Output
from miras_jax.nn.rates import Given


@dataclass(frozen=True, repr=False)
class Miras(Choice):
    """A Miras layer with `num_heads` query heads, by default of one memory each.

    rates: None takes `default_rates`.
    rotary: share of the channels of queries and keys that RoPE turns.
    num_kv_heads: memories, each with keys, values and rates of its own, read by an
    equal group of query heads; None: one for every query head.
    key_dim, value_dim: per head; None: width / num_heads.
    num_qk_heads: heads of queries and keys, each for an equal group of memories (the
    reverse of grouped keys); None: one for each.
    convolution: kernel of the one that queries, keys and values pass; None: none.
    features: of queries, and of keys unless `key_features` are given.
    """

    rule: Rule
    num_heads: int = 4
    rates: RateChoices | None = None
    rotary: float = 0.25
    num_kv_heads: int | None = None
    key_dim: int | None = None
    value_dim: int | None = None
    num_qk_heads: int | None = None
    convolution: int | None = 4
    features: Features = Features()
    key_features: Features | None = None
    output: Output = Output()

    def __post_init__(self):
        if self.rule.keeps_tokens:
            raise UserError(
                f"{self.rule.memory} is softmax attention, whose layer is "
                f"Attention(num_heads={self.num_heads}, "
                f"window={self.rule.memory.window}); use that in place of Miras."
            )
        if not 0 <= self.rotary <= 1:
            raise UserError(
                f"Miras(rotary={self.rotary}) is the share of the channels of queries "
                "and keys that RoPE turns: 0 (none) to 1 (all)."
            )
        if self.memories < 1 or self.num_heads % self.memories:
            raise UserError(
                f"Miras(num_heads={self.num_heads}) must be a multiple of num_kv_heads="
                f"{self.memories}."
            )
        if self.num_qk_heads is not None:
            several = self.rule.algorithm.steps > 1 or self.rule.algorithm.erases
            if several or self.num_kv_heads or self.num_heads % self.num_qk_heads:
                raise UserError(
                    f"Miras(num_qk_heads={self.num_qk_heads}) must divide num_heads="
                    f"{self.num_heads}, and needs one memory per head and a rule with "
                    "one key per token."
                )
        if self.convolution is not None and self.convolution < 2:
            raise UserError("Miras(convolution=...) is a kernel of 2 or more, or None.")
        for name in RateChoices.__dataclass_fields__ if self.rates else ():
            if getattr(self.rates, name) and name not in self.rule.rates:
                raise UserError(
                    f"RateChoices.{name} is given, but {self.rule} uses no {name}; "
                    "leave it out."
                )

    @property
    def memories(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def alignment(self) -> int:
        """Tokens of which the start of a document in a row must be a multiple."""
        return engine.alignment(self.rule)

    @property
    def features_of_keys(self) -> Features:
        return self.features if self.key_features is None else self.key_features

    def dims(self, width: int) -> tuple[int, int]:
        """Channels of a head's keys, before their features, and values."""
        heads, dims = self.num_heads, (self.key_dim, self.value_dim)
        if None in dims and width % heads:
            raise UserError(f"width {width} must split into {heads} heads.")
        key_dim, value_dim = (d or width // heads for d in dims)
        if key_dim % 2 and self.rotary:
            raise UserError(f"Keys of {key_dim} channels: RoPE needs an even number.")
        if self.features.dim(1) != self.features_of_keys.dim(1):
            raise UserError("Features of queries and of keys must have one degree.")
        return key_dim, value_dim

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs) -> "MirasLayer":
        return MirasLayer(self, width, output_scale, rngs)


class MirasCache(NamedTuple):
    """What decoding needs: constant in size, whatever the length read."""

    convolution: jax.Array | None  # [B, 3, channels of what the memories read]
    memory: State  # every leaf [B, G, ...], G memories
    last: Last


class MirasLayer(nnx.Module):
    """q, k, v, convolution, RoPE, features, memory, norm, gate, output projection."""

    def __init__(self, config: Miras, width: int, output_scale: float, rngs: nnx.Rngs):
        heads, memories = config.num_heads, config.memories
        key_dim, value_dim = config.dims(width)
        self.config = config
        # A query, for each of a token's steps a key and a value, and an erase key.
        self.steps = config.rule.algorithm.steps
        shared = config.num_qk_heads
        self.parts = [
            (shared or heads, key_dim),
            (shared or memories * self.steps, key_dim),
            (memories * self.steps, value_dim),
        ]
        self.parts += [(memories, key_dim)] * config.rule.algorithm.erases
        read = sum(count * dim for count, dim in self.parts)
        self.qkv = Projection(width, read, ("embed", "heads"), rngs=rngs)
        self.convolution = nnx.data(
            None
            if config.convolution is None
            else CausalConvolution(read, kernel=config.convolution, rngs=rngs)
        )
        self.query_features = config.features.build()
        self.key_features = nnx.data(
            None if config.key_features is None else config.key_features.build()
        )
        key_dim = config.features.dim(key_dim)
        choices = config.rates or default_rates(config.rule)
        self.rates = nnx.data(
            {
                name: getattr(choices, name).build(
                    width,
                    memories * self._copies(name),
                    self._channels(name, key_dim, value_dim),
                    rngs,
                )
                for name in Rates._fields
                if getattr(choices, name) is not None
            }
        )
        keys = jax.random.split(rngs.params(), memories)
        memory = jax.vmap(lambda key: config.rule.init(key, key_dim, value_dim))(keys)
        self.weights = nnx.List(
            [param(w, ("memory", None, None)) for w in memory.weights]
        )
        self.norm = nnx.List(
            [param(p, ("memory", None)) for p in memory[1:3] if p is not None]
        )
        ridge = memory.ridge
        self.ridge = nnx.data(None if ridge is None else param(ridge, ("memory", None)))
        self.output = config.output.build(heads, value_dim, width, output_scale, rngs)

    def _copies(self, rate: str) -> int:
        """How many of a rate each memory needs: learn and threshold one per step."""
        return self.steps if rate in ("learn", "threshold") else 1

    def _channels(self, rate: str, key_dim: int, value_dim: int) -> int:
        """Of a channel-wise rate."""
        rule = self.config.rule
        by_key = {
            "learn": rule.algorithm.axis == "key",
            "keep": getattr(rule.retention, "axis", "key") != "value",
            "erase": True,
        }
        return key_dim if by_key.get(rate, False) else value_dim

    @property
    def memory_params(self) -> Params:
        """Parameters of the memories, every leaf `[G, ...]`."""
        norm = [p[...] for p in self.norm] or (None, None)
        ridge = None if self.ridge is None else self.ridge[...]
        return Params(tuple(w[...] for w in self.weights), *norm, ridge)

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> MirasCache:
        """The cache before the first token; its size does not depend on max_length."""
        state = jax.vmap(self.config.rule.start)(self.memory_params)
        state = state._replace(position=jnp.zeros(self.config.memories, jnp.int32))
        return MirasCache(
            self._no_window(batch, dtype),
            jax.tree.map(lambda x: jnp.repeat(x[None], batch, axis=0), state),
            beginning(batch),
        )

    def _no_window(self, batch, dtype):
        if self.convolution is None:
            return None
        return self.convolution.start(batch, dtype)

    def tokens(
        self, x: jax.Array, window: jax.Array | None, places: Places
    ) -> tuple[Tokens, jax.Array | None]:
        """What the memories read of `[B, L, D]`, every leaf `[B, G, L, ...]`.

        Queries are `[B, H, L, K]`, those of one memory next to each other; where
        several memories share them, both they and keys `[B, S, L, K]`. window: the
        convolution's cache; also the new one.
        """
        memories = self.config.memories
        mixed = self.qkv.in_parts(x, [count * dim for count, dim in self.parts])
        if self.convolution is not None:
            mixed, window = self.convolution(mixed, window, places)
        queries, keys, values, *erase_keys = (
            split_heads(part, count)
            for part, (count, _) in zip(mixed, self.parts, strict=True)
        )
        # The even number of channels nearest to the share asked for.
        channels = 2 * round(self.config.rotary * queries.shape[-1] / 2)
        queries, keys, *erase_keys = (
            rotate(part, places.index, channels)
            for part in (queries, keys, *erase_keys)
        )
        of_keys = (
            self.query_features if self.key_features is None else self.key_features
        )
        queries, keys = self.query_features(queries), of_keys(keys)
        erase_keys = [l2_normalise(part) for part in erase_keys]
        # Of norm about one, like keys and the memory's own output.
        values = values * values.shape[-1] ** -0.5
        given = Given(places.index, keys, {})
        for name in Rates._fields:
            if name in self.rates:
                given.rates[name] = self.rates[name](x, given)
        rates = given.rates
        if "threshold" in rates:
            # As exact as the values whose errors it is compared with.
            rates["threshold"] = rates["threshold"].astype(x.dtype)
        if self.steps > 1:

            def by_step(t):
                return t.reshape(*t.shape[:2], memories, self.steps, *t.shape[3:])

            keys, values = by_step(keys), by_step(values)
            rates = {
                name: by_step(rate) if self._copies(name) > 1 else rate
                for name, rate in rates.items()
            }
        tokens = jax.tree.map(
            lambda t: jnp.moveaxis(t, 2, 1),
            Tokens(queries, keys, values, Rates(**rates), *erase_keys),
        )
        return tokens, window

    def __call__(
        self,
        x: jax.Array,
        cache: MirasCache | None = None,
        segment_ids: jax.Array | None = None,
    ) -> tuple[jax.Array, MirasCache | None]:
        """`[B, L, D]` -> the same; without a cache from the start, and none is kept."""
        batch, length, _ = x.shape
        fresh = cache is None
        window = self._no_window(batch, x.dtype) if fresh else cache.convolution
        last = beginning(batch) if fresh else cache.last
        places = locate((batch, length), last, segment_ids)
        tokens, window = self.tokens(x, window, places)
        y, memory = self._read(
            tokens, None if fresh else cache.memory, places.documents
        )
        y = jnp.moveaxis(y, 1, 2)
        y = self.output(y, jnp.moveaxis(tokens.values, 1, 2), x)
        return y, None if fresh else MirasCache(window, memory, places.last)

    def _read(self, tokens, memory, documents):
        """Outputs `[B, H, L, V]` and the memories after these tokens."""
        rule, params = self.config.rule, self.memory_params
        return read_memories(rule, params, memory, tokens, documents)


def read_memories(
    rule: Rule,
    params: Params,
    memory: State | None,
    tokens: Tokens,
    documents: Documents | None,
) -> tuple[jax.Array, State | None]:
    """A batch of rows through G memories: outputs `[B, H, L, V]`, the states after.

    Leaves of params are `[G, ...]`, of memory (None: from the start, and none is
    returned) `[B, G, ...]`, of tokens `[B, G, L, ...]`, but queries `[B, H, L, K]`.
    Where memories next to each other share queries and keys, these are `[B, S, L, K]`.
    """
    length = tokens.queries.shape[2]
    memories, shared = len(params.weights[0]), tokens.keys.shape[1]
    copies = memories // shared
    single = length == 1 and documents is None

    def read(params, state, common, tokens, documents):
        queries, keys = common
        tokens = tokens._replace(queries=queries, keys=keys)
        if state is None:
            state = rule.start(params)
        elif single:
            token = jax.tree.map(lambda t: t[0], tokens)
            output, state = engine.step(rule, params, state, token)
            return output[None], state
        output, state = engine.run(rule, params, state, tokens, documents=documents)
        return output, state if memory is not None else None

    # Innermost the queries of one memory, which is written once for all of them, then
    # the memories of the same keys, of which no copies are made.
    read = jax.vmap(read, (None, None, (0, None), None, None), (0, None))
    read = jax.vmap(read, (0, 0, None, 0, None))
    read = jax.vmap(read, (0, 0, 0, 0, None))
    read = jax.vmap(read, (None, 0, 0, 0, 0))

    def by_keys(tree, axis):
        """The axis of G memories as one of S and one of those that share."""
        return jax.tree.map(
            lambda x: x.reshape(*x.shape[:axis], shared, copies, *x.shape[axis + 1 :]),
            tree,
        )

    queries = tokens.queries
    queries = queries.reshape(len(queries), shared, -1, *queries.shape[2:])
    others = by_keys(tokens._replace(queries=None, keys=None), 1)
    y, after = read(
        by_keys(params, 0),
        by_keys(memory, 1),
        (queries, tokens.keys),
        others,
        documents,
    )
    after = jax.tree.map(
        lambda x: x.reshape(len(queries), memories, *x.shape[3:]), after
    )
    return y.reshape(len(queries), -1, *y.shape[4:]), after
