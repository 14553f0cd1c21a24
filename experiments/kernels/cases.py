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


CHANNELS = {
    "dfw": ("keep", "keep_value"),
    **dict.fromkeys(
        ("gla", "hgrn2", "mamba", "longhorn_diagonal", "kimi_delta_attention"),
        ("keep",),
    ),
    "rwkv7": ("keep", "erase"),
    "longhorn": ("learn",),
}
"""Rates that have a number per channel as published; the others are one per token."""

NARROW = ("mamba", "longhorn_diagonal")
"""Variants whose heads have a single value channel."""

CHANGED = ("yaad+channels", "moneta+channels", "moneta+exact", "memora+exact")
"""What else "all" compiles: with the rates of the layers' defaults, read exactly."""


def cases(names: Sequence[str], d: int, chunk: int) -> Iterator[Case]:
    """Forward, and forward with backward, of each named variant or of "all".

    bfloat16 tokens, rates in float32, expansion 4. A name may end in "+channels", all
    rates that can be then have a number per channel, and in "+exact", the readout. Of
    variants that are the same program "all" compiles the first.
    """
    is_all = names == ["all"]
    if is_all:
        names = [make.__name__ for make in variants.ALL] + list(CHANGED)
    seen = []
    for name in names:
        base, *changes = name.split("+")
        rule = getattr(variants, base)()
        if rule.chunk_size > 1:
            rule = replace(rule, chunk_size=chunk)
        if "exact" in changes:
            rule = replace(rule, readout="exact")
        channels = rule.rates if "channels" in changes else CHANNELS.get(base, ())
        program = (rule, channels, base in NARROW)
        if rule.keeps_tokens or (is_all and program in seen):
            continue
        seen.append(program)
        operands = inputs(rule, d, 1 if base in NARROW else d, CHUNKS * chunk, channels)
        yield from _passes(name, rule, operands)


def _passes(name, rule, operands):
    values = operands[1].values
    outputs = jax.ShapeDtypeStruct(
        (*operands[1].queries.shape[:-1], values.shape[-1]), jnp.bfloat16
    )
    kernel, plain = (_forward(rule, name) for name in ("pallas", "xla"))
    tokens = outputs.shape[0] * outputs.shape[1]
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


def inputs(
    rule: miras.Rule, keys: int, values: int, length: int, channels: Sequence[str] = ()
):
    """Shapes of `ELEMENTS` heads' parameters and tokens; which rates have channels."""

    def many(shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((ELEMENTS, *shape), dtype)

    params = jax.eval_shape(lambda: rule.init(jax.random.key(0), keys, values))
    steps = rule.algorithm.steps
    pairs = (length,) if steps == 1 else (length, steps)
    once = ("keep", "keep_value", "momentum")
    by_value = {"learn", "threshold", "keep_value"}
    if rule.algorithm.axis == "key":
        by_value.remove("learn")
    if rule.retention.axis == "value":
        by_value.add("keep")
    never = {"momentum"} | ({"keep"} if not rule.retention.channelwise else set())

    def rate(name):
        width = values if name in by_value else keys
        tail = (width,) if name in channels and name not in never else ()
        return many((*((length,) if name in once else pairs), *tail))

    rates = {name: rate(name) for name in rule.rates if name in miras.Rates._fields}
    bfloat16 = jnp.bfloat16
    erase = many((*pairs, keys), bfloat16) if rule.algorithm.erases else None
    tokens = miras.Tokens(
        many((length, keys), bfloat16),
        many((*pairs, keys), bfloat16),
        many((*pairs, values), bfloat16),
        miras.Rates(**rates),
        erase,
    )
    return jax.tree.map(lambda x: many(x.shape), params), tokens
