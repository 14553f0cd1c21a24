"""run and step: one sequence through one rule, in whichever way is asked for."""

from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from miras_jax.core import attention
from miras_jax.core.block import block, parallel_tokens
from miras_jax.core.rule import Rule
from miras_jax.core.types import Params, State, Tokens
from miras_jax.errors import UserError
from pallas_kernels.fused_scan import Unsupported, fused_scan, platform

Implementation = Literal["definition", "xla", "pallas"]

LINEAR_TILE = 32
"""Tokens per block of the exact linear rules; changes the speed, never the result."""


def step(
    rule: Rule, params: Params, state: State, token: Tokens
) -> tuple[jax.Array, State]:
    """Read one token (decoding): the same function of the past as `run`.

    `token` is a `Tokens` without the L axis. Returns `(output [V], state)`.
    """
    steps = rule.algorithm.steps
    if steps == 1:
        output, state = rule.step(params, state, token)
        return output.astype(token.queries.dtype), state
    pairs = rule.pairs(jax.tree.map(lambda x: x[None], token))
    for i in range(steps):
        pair = jax.tree.map(lambda x, i=i: x[i], pairs)
        output, state = step(rule.one_step, params, state, pair)
    return output, state


def run(
    rule: Rule,
    params: Params,
    state: State,
    tokens: Tokens,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, State]:
    """Read L tokens from `state` on: `(outputs [L, V], state)`.

    implementation: "definition" goes token by token, literally as in `Rule.step`; "xla"
    goes chunk by chunk in matrix products; "pallas" does the same in one kernel for all
    chunks, on TPU and GPU; None takes the best available. They compute the same
    function, of any length and from any position inside a chunk, so that a sequence may
    be cut into calls anywhere. Rematerialises one block at a time in the backward pass:
    memory grows by at most one state per block.
    """
    if len(tokens.keys) == 0:
        raise UserError("run needs at least one token; got none.")
    steps = rule.algorithm.steps
    if steps > 1:
        outputs, state = run(
            rule.one_step,
            params,
            state,
            rule.pairs(tokens),
            implementation=implementation,
        )
        return outputs[steps - 1 :: steps], state
    rule.check(tokens)
    match implementation:
        case "definition":
            outputs, state = _run_definition(rule, params, state, tokens)
        case None | "xla" | "pallas":
            scan = partial(fused_scan, implementation=_scan(implementation))
            try:
                outputs, state = _run_blocks(scan, rule, params, state, tokens)
            except Unsupported as error:
                raise UserError(
                    f"implementation='pallas' cannot run {rule}: {error}. Use None "
                    "(the best available) or 'xla'."
                ) from error
        case _:
            raise UserError(
                f"implementation={implementation!r} is unknown: use None (the best "
                "available), 'definition', 'xla' or 'pallas'."
            )
    return outputs.astype(tokens.queries.dtype), state


def _scan(implementation: Implementation | None) -> str | None:
    """The same choice in terms of `fused_scan`."""
    if implementation != "pallas":
        return None if implementation is None else "reference"
    if platform() is None:
        raise UserError(
            "implementation='pallas' needs a TPU or a GPU, and JAX runs on "
            f"{jax.default_backend()}: use None (the best available) or 'xla'."
        )
    return platform()


def _run_definition(rule, params, state, tokens):
    if rule.keeps_tokens:
        # Rows for all tokens, as a scan cannot make any.
        kept = rule.memory.window or len(state.dual[0]) + len(tokens.keys)
        rule = replace(rule, memory=replace(rule.memory, window=kept))
        state = attention.with_rows(state, kept)

    def body(state, token):
        output, state = rule.step(params, state, token)
        return state, output

    state = state._replace(position=jnp.asarray(state.position, jnp.int32))
    state, outputs = jax.lax.scan(body, state, tokens)
    return outputs, state


def _run_blocks(scan, rule, params, state, tokens):
    if rule.keeps_tokens:
        return attention.run(rule.memory.window, state, tokens)
    length = len(tokens.keys)
    size = parallel_tokens(rule, tokens.rates, LINEAR_TILE)
    position = state.position if rule.has_anchor else 0
    if not isinstance(position, int):
        return _run_from_traced_position(scan, rule, params, state, tokens)

    # Blocks end where chunks end: first what is left of an open chunk, then whole
    # chunks, then the part of a chunk that stays open.
    head = min(length, size - position) if position else 0
    whole = (length - head) // size
    middle = head + whole * size
    outputs = []
    if head:
        part = _take(tokens, 0, head)
        output, state = block(rule, params, state, part, aligned=False)
        state = rule.close(state, state.position == rule.chunk_size)
        outputs.append(output)
    if whole:
        blocks = jax.tree.map(
            lambda x: x.reshape(whole, size, *x.shape[1:]), _take(tokens, head, middle)
        )
        output, state = _scan_blocks(scan, rule, params, state, blocks)
        outputs.append(output)
    if middle < length:
        part = _take(tokens, middle, length)
        output, state = block(rule, params, state, part, aligned=True)
        outputs.append(output)
    return jnp.concatenate(outputs), state


def _scan_blocks(scan, rule, params, state, blocks):
    """Whole chunks, from a chunk's start: the carry is only dual and momentum."""

    def step(carry, tokens, params):
        state = rule.open_chunk(*carry)
        outputs, state = block(rule, params, state, tokens, aligned=True)
        state = rule.close(state, True)
        return (state.dual, state.momentum), outputs

    carry = (state.dual, state.momentum)
    carry, outputs = scan(step, carry, blocks, params)
    return outputs.reshape(-1, outputs.shape[-1]), rule.open_chunk(*carry)


def _run_from_traced_position(scan, rule, params, state, tokens):
    """As above where the position inside the chunk is known only at run time.

    The tokens are shifted right by the position, so that blocks are chunks again, and
    padded with tokens that leave no trace; every block carries whether it ends a chunk.
    """
    length, size = len(tokens.keys), rule.chunk_size
    blocks = -(-(length + size - 1) // size)
    padding = blocks * size - length
    position = state.position

    def shifted(x, fill):
        widths = ((0, padding),) + ((0, 0),) * (x.ndim - 1)
        return jnp.roll(jnp.pad(x, widths, constant_values=fill), position, axis=0)

    learn = tokens.rates.learn
    learn = jnp.ones(length, tokens.keys.dtype) if learn is None else learn
    rates = jax.tree.map(partial(shifted, fill=1), tokens.rates)
    rates = rates._replace(learn=shifted(learn, 0))
    moved = jax.tree.map(partial(shifted, fill=0), tokens)._replace(rates=rates)
    written = shifted(jnp.ones((length, 1), state.dual[0].dtype), 0)
    ends = (jnp.arange(blocks) + 1) * size <= position + length

    def step(state, xs, params):
        tokens, written, ends = xs
        outputs, state = block(
            rule, params, state, tokens, aligned=False, written=written
        )
        return rule.close(state, ends)._replace(position=0), outputs

    xs = jax.tree.map(lambda x: x.reshape(blocks, size, *x.shape[1:]), (moved, written))
    state = state._replace(position=0)
    state, outputs = scan(step, state, (*xs, ends), params)
    outputs = jnp.roll(outputs.reshape(blocks * size, -1), -position, axis=0)[:length]
    return outputs, state._replace(position=(position + length) % size)


def _take(tokens: Tokens, start: int, stop: int) -> Tokens:
    return jax.tree.map(
        partial(jax.lax.slice_in_dim, start_index=start, limit_index=stop), tokens
    )
