"""The Miras layer: a rule as a sequence mixer (Miras, section 5.4)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from miras_jax.core import engine
from miras_jax.core.rule import Rule
from miras_jax.core.types import Choice, Params, Rates, State, Tokens
from miras_jax.errors import UserError
from miras_jax.nn import rates as rate_choices
from miras_jax.nn.layers import (
    CausalConvolution,
    Projection,
    l2_normalise,
    param,
    rms_norm,
    rotate,
    split_heads,
)


@dataclass(frozen=True, repr=False)
class RateChoices(Choice):
    """Parametrisation of each rate; None: the rule does without it."""

    learn: rate_choices.Rate | None = None
    keep: rate_choices.Rate | None = None
    momentum: rate_choices.Rate | None = None
    threshold: rate_choices.Rate | None = None


def default_rates(rule: Rule) -> RateChoices:
    """What an untrained layer starts from, where a model does not say otherwise.

    learn: of a deep memory 0.03 to 0.3, of a plain matrix 0.5, half of the error.
    keep: 0.001 to 0.1 forgotten per token, half-lives of 700 to 7 tokens.
    momentum: 0.5 to 0.9.
    threshold: 0.1 to 0.5, where residuals begin with a norm of about 1.5. Beyond its
    threshold delta, Huber's form "switch" has slope 10 delta at small residuals, so
    that thresholds near 0.1 join the two branches smoothly.

    Channel-wise of rank 32 for deep memories, where the rule allows it; else, and for
    momentum rules and plain matrices, one per token and head.
    """
    deep = not rule.memory.is_linear
    channelwise = rule.retention.channelwise and deep and "momentum" not in rule.rates
    make = rate_choices.LowRank if channelwise else rate_choices.PerHead
    learn = make("softplus", (0.03, 0.3)) if deep else make("sigmoid", (0.5, 0.5))
    choices = {
        "learn": learn,
        "keep": make("keep", (0.001, 0.1)),
        "momentum": rate_choices.PerHead("sigmoid", (0.5, 0.9)),
        "threshold": rate_choices.LowRank("softplus", (0.1, 0.5)),
    }
    return RateChoices(**{name: choices[name] for name in rule.rates})


@dataclass(frozen=True, repr=False)
class Miras(Choice):
    """A Miras layer with `num_heads` memories of dimension width / num_heads.

    `rates` None: `default_rates`.
    """

    rule: Rule
    num_heads: int = 4
    rates: RateChoices | None = None

    def __post_init__(self):
        for name in RateChoices.__dataclass_fields__ if self.rates else ():
            if getattr(self.rates, name) and name not in self.rule.rates:
                raise UserError(
                    f"RateChoices.{name} is given, but {self.rule} uses no {name}; "
                    "leave it out."
                )

    def build(self, width: int, output_scale: float, rngs: nnx.Rngs) -> "MirasLayer":
        return MirasLayer(self, width, output_scale, rngs)


class MirasCache(NamedTuple):
    """What decoding needs: constant in size, whatever the length read."""

    convolution: jax.Array  # [B, 3, 3 * H * K]
    memory: State  # every leaf [B, H, ...]
    position: jax.Array  # [B]


class MirasLayer(nnx.Module):
    """q, k, v, convolution, RoPE, l2 norm, memory, norm, gate, output projection."""

    def __init__(self, config: Miras, width: int, output_scale: float, rngs: nnx.Rngs):
        heads = config.num_heads
        if width % heads or (width // heads) % 2:
            raise UserError(
                f"width {width} must split into {heads} heads of even dimension."
            )
        channels = width // heads
        self.config = config
        self.qkv = Projection(width, 3 * width, ("embed", "heads"), rngs=rngs)
        self.convolution = CausalConvolution(3 * width, rngs=rngs)
        choices = config.rates or default_rates(config.rule)
        self.rates = nnx.data(
            {
                name: getattr(choices, name).build(width, heads, channels, rngs)
                for name in Rates._fields
                if getattr(choices, name) is not None
            }
        )
        keys = jax.random.split(rngs.params(), heads)
        memory = jax.vmap(lambda key: config.rule.init(key, channels, channels))(keys)
        self.weights = nnx.List(
            [param(w, ("memory", None, None)) for w in memory.weights]
        )
        self.norm = nnx.List(
            [param(p, ("memory", None)) for p in memory[1:] if p is not None]
        )
        self.output_norm = param(jnp.ones((heads, channels)), ("memory", None))
        self.gate = Projection(width, width, ("embed", "heads"), rngs=rngs)
        self.output = Projection(
            width, width, ("heads", "embed"), scale=output_scale, rngs=rngs
        )

    @property
    def memory_params(self) -> Params:
        """Parameters of the memories, every leaf `[H, ...]`."""
        return Params(tuple(w[...] for w in self.weights), *(p[...] for p in self.norm))

    def start(self, batch: int, max_length: int, dtype: jnp.dtype) -> MirasCache:
        """The cache before the first token; its size does not depend on max_length."""
        state = jax.vmap(self.config.rule.start)(self.memory_params)
        state = state._replace(
            position=jnp.zeros(self.config.num_heads, jnp.int32),
        )
        return MirasCache(
            self.convolution.start(batch, dtype),
            jax.tree.map(lambda x: jnp.repeat(x[None], batch, axis=0), state),
            jnp.zeros(batch, jnp.int32),
        )

    def __call__(
        self, x: jax.Array, cache: MirasCache | None = None
    ) -> tuple[jax.Array, MirasCache | None]:
        """`[B, L, D]` -> the same; without a cache from the start, and none is kept."""
        batch, length, _ = x.shape
        heads = self.config.num_heads
        fresh = cache is None
        window = self.convolution.start(batch, x.dtype) if fresh else cache.convolution
        position = jnp.zeros(batch, jnp.int32) if fresh else cache.position

        mixed, window = self.convolution(self.qkv(x), window)
        queries, keys, values = (
            split_heads(part, heads) for part in jnp.split(mixed, 3, axis=-1)
        )
        indices = position[:, None] + jnp.arange(length)[None]
        queries = l2_normalise(rotate(queries, indices))
        keys = l2_normalise(rotate(keys, indices))
        # Of norm about one, like keys and the memory's own output.
        values = values * values.shape[-1] ** -0.5
        rates = Rates(**{name: make(x) for name, make in self.rates.items()})
        tokens = jax.tree.map(
            lambda t: jnp.moveaxis(t, 2, 1), Tokens(queries, keys, values, rates)
        )

        rule = self.config.rule

        def read_new(params, tokens):
            return engine.run(rule, params, rule.start(params), tokens)[0]

        def read_on(params, state, tokens):
            if length > 1:
                return engine.run(rule, params, state, tokens)
            token = jax.tree.map(lambda t: t[0], tokens)
            output, state = engine.step(rule, params, state, token)
            return output[None], state

        if fresh:
            over_heads = jax.vmap(read_new)
            y = jax.vmap(over_heads, (None, 0))(self.memory_params, tokens)
        else:
            over_heads = jax.vmap(read_on)
            y, state = jax.vmap(over_heads, (None, 0, 0))(
                self.memory_params, cache.memory, tokens
            )
            cache = MirasCache(window, state, position + length)
        y = rms_norm(jnp.moveaxis(y, 1, 2), self.output_norm[...])
        y = y.reshape(x.shape) * jax.nn.silu(self.gate(x))
        return self.output(y), cache
