"""The variants of Miras as cases of `pallas_kernels.aot`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

import miras_jax as miras
from miras_jax import variants
from pallas_kernels.aot import Case

ELEMENTS = 64  # batch times heads
CHUNKS = 8


def cases(names: Sequence[str], d: int, chunk: int) -> Iterator[Case]:
    """Forward, and forward with backward, of each named variant or of "all".

    bfloat16 tokens, rates of one number per token and head, expansion 4.
    """
    makers = {make.__name__: make for make in variants.ALL}
    if names == ["all"]:
        names = list(makers)
    for name in names:
        rule = makers[name]()
        if rule.chunk_size > 1:
            rule = replace(rule, chunk_size=chunk)
        if rule.keeps_tokens:
            continue
        yield from _passes(name, rule, d, chunk)


def _passes(name, rule, d, chunk):
    operands = inputs(rule, d, CHUNKS * chunk)
    outputs = jax.ShapeDtypeStruct((ELEMENTS, CHUNKS * chunk, d), jnp.bfloat16)
    tokens = ELEMENTS * CHUNKS * chunk
    kernel, plain = (_forward(rule, name) for name in ("pallas", "xla"))
    yield Case(f"{name} forward", kernel, plain, operands, tokens)
    both = (_both(forward) for forward in (kernel, plain))
    yield Case(f"{name} both", *both, (*operands, outputs), tokens)


def _forward(rule, implementation):
    def one(params, tokens):
        state = rule.start(params)
        return miras.run(rule, params, state, tokens, implementation=implementation)[0]

    return jax.vmap(one)


def _both(forward):
    def both(params, tokens, cotangent):
        outputs, pull_back = jax.vjp(forward, params, tokens)
        return outputs, pull_back(cotangent)

    return both


def inputs(rule: miras.Rule, d: int, length: int):
    """Shapes of `ELEMENTS` heads' parameters and tokens."""

    def many(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((ELEMENTS, *shape), dtype)

    params = jax.eval_shape(lambda: rule.init(jax.random.key(0), d, d))
    steps = rule.algorithm.steps
    pairs = (length,) if steps == 1 else (length, steps)
    shapes = {"keep": (length,), "momentum": (length,)}
    rates = {
        name: many(shapes.get(name, pairs))
        for name in rule.rates
        if name in miras.Rates._fields
    }
    erase = many((*pairs, d), jnp.bfloat16) if rule.algorithm.erases else None
    tokens = miras.Tokens(
        many((length, d), jnp.bfloat16),
        many((*pairs, d), jnp.bfloat16),
        many((*pairs, d), jnp.bfloat16),
        miras.Rates(**rates),
        erase,
    )
    return jax.tree.map(lambda x: many(x.shape), params), tokens
