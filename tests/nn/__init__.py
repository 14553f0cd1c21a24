"""Small language models of every mixer, tokens for them, and their compiled programs.

A model is compiled once for each use and takes its parameters as data, so that the same
program serves the untrained parameters and random ones.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from miras_jax import retention, variants
from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras, RateChoices
from miras_jax.nn.model import Model
from miras_jax.nn.rates import Fixed
from tests.core import jit

VOCAB, WIDTH, BATCH = 29, 32, 2
LENGTH = 24  # three chunks of eight: what is left of one compiles a block of its own
WINDOW = 5


def miras(rule, **changes):
    """The rule as a mixer of two heads, with chunks of at most eight tokens."""
    rule = replace(rule, chunk_size=min(rule.chunk_size, 8))
    if isinstance(rule.retention, retention.KL):
        # Mean weight one for keys of 16 channels, as 64 is for 64: float32 needs it.
        rule = replace(rule, retention=replace(rule.retention, mass=16.0))
    return Miras(rule, num_heads=2, **changes)


FIXED = RateChoices(learn=Fixed((1.0, 1.0)), keep=Fixed((2**-5, 2**-6), "keep"))

# The first variant of each rule: others differ in the rates' parametrisation alone.
RULES = {
    variant(): variant.__name__
    for variant in reversed(variants.ALL)
    if not variant().keeps_tokens
}

MIXERS = {
    **{name: (miras(rule),) for rule, name in RULES.items()},
    "retnet_fixed": (miras(variants.retnet(), rates=FIXED),),
    "attention": (Attention(num_heads=2),),
    "window": (Attention(num_heads=2, window=WINDOW),),
    "hybrid": (miras(variants.yaad()), Attention(num_heads=2, window=WINDOW)),
}


def model(mixers, groups=2, **changes):
    """A model of `groups` times these mixers."""
    depth = groups * len(mixers)
    return Model(width=WIDTH, depth=depth, mixers=mixers, hidden=64, **changes)


def token_ids(seed=0, shape=(BATCH, LENGTH)):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def shaken(params, seed=1):
    """Parameters with noise on every entry: nothing is left at zero or at one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype), params
    )


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shake(module):
    """The module with noise on every parameter."""
    graph, params = nnx.split(module)
    return nnx.merge(graph, shaken(params))


def leaves(tree):
    """Dotted name -> array, for every parameter of an nnx state."""
    flat = nnx.to_flat_state(tree)
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}


class Program:
    """A model taken apart: its untrained parameters and its compiled functions."""

    def __init__(self, config: Model):
        self.config = config
        self.graph, self.initial = nnx.split(config.build(VOCAB, nnx.Rngs(0)))

        def logits(params, tokens):
            return self.model(params)(tokens)[0]

        def pull(params, tokens, cotangent):
            value, back = jax.vjp(lambda p: logits(p, tokens), params)
            return value, back(cotangent)[0]

        self.logits = jit(logits)
        self.pull = jit(
            pull
        )  # logits, and a cotangent of them pulled to the parameters
        self.read_on = jit(lambda p, tokens, cache: self.model(p)(tokens, cache))

    def model(self, params):
        return nnx.merge(self.graph, params)

    def start(self, params, max_length=LENGTH):
        return self.model(params).start(BATCH, max_length)

    def decode(self, params, tokens, parts):
        """Logits of tokens read in calls of `parts` tokens each, and the last cache."""
        assert sum(parts) == tokens.shape[1]
        cache, outputs = self.start(params), []
        for part in np.split(tokens, np.cumsum(parts)[:-1], axis=1):
            output, cache = self.read_on(params, part, cache)
            outputs.append(output)
        return np.concatenate(outputs, axis=1), cache
