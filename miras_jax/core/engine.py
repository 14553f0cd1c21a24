"""run and step: one sequence through one rule, in whichever way is asked for."""

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from miras_jax.core import attention
from miras_jax.core.block import block, parallel_tokens
from miras_jax.core.rule import Rule
from miras_jax.core.types import Documents, Params, Rates, State, Tokens
from miras_jax.errors import UserError
from pallas_kernels.fused_scan import Unsupported, fused_scan, platform

Implementation = Literal["definition", "xla", "pallas"]

LINEAR_TILE = 32
KERNEL_TILES = {"tpu": 128, "gpu": 64}
"""Tokens per block of the exact linear rules, through XLA and in a kernel (fewer leave
matrix units idle); changes the speed, never the result."""


NO_TRACE = Rates(learn=0, keep=1, momentum=1, threshold=1, keep_value=1, erase=0)
"""The rates of a token that the memory must not notice."""


def alignment(rule: Rule) -> int:
    """Tokens of which a document's start must be a multiple, for `run` in blocks."""
    if rule.chunk_size > 1:
        return rule.chunk_size
    if not (rule.memory.is_linear and rule.retention.is_identity):
        return 1
    return LINEAR_TILE // math.gcd(LINEAR_TILE, rule.algorithm.steps)


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
    documents: Documents | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, State]:
    """Read L tokens from `state` on: `(outputs [L, V], state)`.

    documents: where the state returns to `rule.start(params)`, and which tokens are
    padding. Starts are whole numbers of `alignment(rule)` tokens away from a chunk's
    start; where the state's position is an array, padding before the first document
    may have any length. Padding comes before or after a document, not inside.

    implementation: "definition" goes token by token, literally as in `Rule.step`; "xla"
    goes chunk by chunk in matrix products; "pallas" does the same in one kernel for all
    chunks, on TPU and GPU; None takes the best available. They compute the same
    function, of any length and from any position inside a chunk, so that a sequence may
    be cut into calls anywhere. Rematerialises one block at a time in the backward pass:
    memory grows by at most one state per block.
    """
    if len(tokens.keys) == 0:
        raise UserError("run needs at least one token; got none.")
    if documents is not None and rule.keeps_tokens:
        raise UserError(
            f"{rule.memory} keeps the tokens of one document; use the layer Attention, "
            "which takes segment_ids."
        )
    steps = rule.algorithm.steps
    if steps > 1:
        outputs, state = run(
            rule.one_step,
            params,
            state,
            rule.pairs(tokens),
            documents=_of_pairs(documents, steps),
            implementation=implementation,
        )
        return outputs[steps - 1 :: steps], state
    rule.check(tokens)
    match implementation:
        case "definition":
            outputs, state = _run_definition(rule, params, state, tokens, documents)
        case None | "xla" | "pallas":
            chosen = _of_kernels(implementation)
            in_kernel = platform() if implementation != "xla" else None
            tile = KERNEL_TILES.get(in_kernel, LINEAR_TILE)
            try:
                if rule.keeps_tokens:
                    window = rule.memory.window
                    outputs, state = attention.run(window, state, tokens, chosen)
                else:
                    scan = partial(fused_scan, implementation=chosen)
                    outputs, state = _run_blocks(
                        scan, tile, rule, params, state, tokens, documents
                    )
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
    if documents is not None:
        outputs = jnp.where(documents.real[:, None], outputs, 0)
    return outputs.astype(tokens.queries.dtype), state


def _of_pairs(documents, steps):
    """The same for tokens whose pairs have become tokens of their own."""
    if documents is None:
        return None
    starts = documents.starts[:, None] & (jnp.arange(steps) == 0)[None]
    return Documents(starts.reshape(-1), jnp.repeat(documents.real, steps))


def _of_kernels(implementation: Implementation | None) -> str | None:
    """The same choice in terms of `pallas_kernels`."""
    if implementation != "pallas":
        return None if implementation is None else "reference"
    if platform() is None:
        raise UserError(
            "implementation='pallas' needs a TPU or a GPU, and JAX runs on "
            f"{jax.default_backend()}: use None (the best available) or 'xla'."
        )
    return platform()


@jax.custom_vjp
def _bounded(state):
    """The state itself, whose cotangents end at the cube root of the largest float.

    That is 7e12 in float32. The derivative of a memory that has become chaotic grows
    without end from block to block; so it stays finite, as three factors of that size
    do.
    """
    return state


def _bounded_backward(_, cotangents):
    def bound(d):
        if d.dtype == jax.dtypes.float0:
            return d
        largest = float(jnp.finfo(d.dtype).max) ** (1 / 3)
        return jnp.clip(d, -largest, largest)

    return (jax.tree.map(bound, cotangents),)


_bounded.defvjp(lambda state: (state, None), _bounded_backward)


def _select(condition, yes, no):
    return jax.tree.map(partial(jnp.where, condition), yes, no)


def _run_definition(rule, params, state, tokens, documents):
    if rule.keeps_tokens:
        # Rows for all tokens, as a scan cannot make any.
        kept = rule.memory.window or len(state.dual[0]) + len(tokens.keys)
        rule = replace(rule, memory=replace(rule.memory, window=kept))
        state = attention.with_rows(state, kept)
    fresh = rule.start(params)

    def body(state, inputs):
        token, document = inputs
        state = _bounded(state)
        if document is not None:
            state = _select(document.starts, fresh, state)
        output, after = rule.step(params, state, token)
        if document is not None:
            after = _select(document.real, after, state)
        return after, output

    state = state._replace(position=jnp.asarray(state.position, jnp.int32))
    state, outputs = jax.lax.scan(body, state, (tokens, documents))
    return outputs, state


def _run_blocks(scan, tile, rule, params, state, tokens, documents):
    if documents is None and _is_narrow(rule, state):
        return _run_narrow(rule, params, state, tokens)
    length = len(tokens.keys)
    # Rows are packed alike for every machine, by `alignment`.
    tile = tile if documents is None else LINEAR_TILE
    size = parallel_tokens(rule, tokens.rates, tile)
    position = state.position if rule.has_anchor else 0
    if documents is not None or not isinstance(position, int):
        return _run_shifted(scan, rule, params, state, tokens, documents, size)

    # Blocks end where chunks end: first what is left of an open chunk, then whole
    # chunks, then the part of a chunk that stays open.
    head = min(length, size - position) if position else 0
    whole = (length - head) // size
    middle = head + whole * size
    outputs = []
    if head:
        part = _take(tokens, 0, head)
        output, state = block(
            rule, params, state, part, aligned=False, complete=position + head == size
        )
        outputs.append(output)
    if whole:
        blocks = jax.tree.map(
            lambda x: x.reshape(whole, size, *x.shape[1:]), _take(tokens, head, middle)
        )
        output, state = _scan_blocks(scan, rule, params, state, blocks)
        outputs.append(output)
    if middle < length:
        part = _take(tokens, middle, length)
        output, state = block(rule, params, state, part, aligned=True, complete=False)
        outputs.append(output)
    return jnp.concatenate(outputs), state


def _is_narrow(rule, state):
    """Whether tokens are read one by one: where a pair of them costs as much.

    With a single key or value channel, as in Mamba's heads, the products of a block
    are as large as the weights of all its tokens; a CPU then gains nothing from them.
    """
    narrow = rule.chunk_size == 1 and all(1 in a.shape for a in state.dual)
    return narrow and platform() is None and jax.default_backend() == "cpu"


def _run_narrow(rule, params, state, tokens):
    # A state is no larger than the token: all are kept for the backward pass, and
    # tokens are not sorted into blocks first.
    @jax.checkpoint
    def body(state, token):
        output, state = rule.step(params, _bounded(state), token)
        return state, output

    after, outputs = jax.lax.scan(body, state, tokens)
    return outputs, after._replace(position=state.position)


def _scan_blocks(scan, rule, params, state, blocks):
    """Whole chunks, from a chunk's start: nothing of the last chunk is carried."""

    def step(carry, tokens, params):
        state = rule.open_chunk(*_bounded(carry))
        outputs, state = block(rule, params, state, tokens, aligned=True, complete=True)
        return rule.carried(state), outputs

    carry, outputs = scan(step, rule.carried(state), blocks, params)
    return outputs.reshape(-1, outputs.shape[-1]), rule.open_chunk(*carry)


def _run_shifted(scan, rule, params, state, tokens, documents, size):
    """As above where chunks may stay unfinished or begin at a place that is data.

    The tokens are shifted right by the position inside the chunk, so that blocks are
    chunks again, and padded with tokens that leave no trace. A block whose last token
    is real ends its chunk; one that holds a document's start returns to `rule.start`
    before it.
    """
    length = len(tokens.keys)
    shift = _shift(rule, state, documents, size)
    static = isinstance(shift, int)
    blocks = -(-(length + (shift if static else size - 1)) // size)
    padding = blocks * size - length

    def shifted(x, fill):
        widths = ((0, padding),) + ((0, 0),) * (x.ndim - 1)
        x = jnp.pad(x, widths, constant_values=fill)
        return x if static and shift == 0 else jnp.roll(x, shift, axis=0)

    learn = tokens.rates.learn
    learn = jnp.ones(length, tokens.keys.dtype) if learn is None else learn
    rates = tokens.rates._replace(learn=learn)
    if documents is not None:

        def of_real(x, fill):
            mask = jnp.expand_dims(documents.real, range(1, x.ndim))
            return jnp.where(mask, x, jnp.asarray(fill, x.dtype))

        rates = _map_rates(of_real, rates)
    rates = _map_rates(shifted, rates)
    moved = jax.tree.map(partial(shifted, fill=0), tokens)._replace(rates=rates)
    real = jnp.ones(length, bool) if documents is None else documents.real
    real = shifted(real, False).reshape(blocks, size)
    written = real[..., None].astype(state.dual[0].dtype)
    marks = None
    if documents is not None:
        starts = shifted(documents.starts, False).reshape(blocks, size)
        marks = (jnp.any(starts, axis=1), jnp.any(real, axis=1))
    fresh = rule.start(params)._replace(position=0)

    def step(state, xs, consts):
        tokens, written, ends, marks = xs
        state = _bounded(state)
        params, fresh = consts
        if marks is not None:
            state = _select(marks[0], fresh, state)
        state = state._replace(position=0)
        outputs, after = block(
            rule,
            params,
            state,
            tokens,
            aligned=not rule.has_anchor,
            complete=ends,
            written=written,
        )
        if marks is not None:
            # A gate's own step at a chunk's end would be a trace, too.
            after = _select(marks[1], after, state)
        return after._replace(position=0), outputs

    xs = jax.tree.map(lambda x: x.reshape(blocks, size, *x.shape[1:]), moved)
    position = state.position
    state, outputs = scan(
        step,
        state._replace(position=0),
        (xs, written, real[:, -1], marks),
        (params, fresh),
    )
    outputs = outputs.reshape(blocks * size, -1)
    if not (static and shift == 0):
        outputs = jnp.roll(outputs, -shift, axis=0)
    if rule.has_anchor:
        if documents is None:
            position = (shift + length) % size
        else:
            place = jnp.arange(1, length + 1)
            last = jnp.max(jnp.where(documents.real, place, 0))
            position = jnp.where(last > 0, (shift + last) % size, position)
        if not isinstance(position, int):
            # Also where 64 bits are the default: a scan needs what it was given.
            position = position.astype(jnp.int32)
    return outputs[:length], state._replace(position=position)


def _map_rates(function, rates: Rates) -> Rates:
    """function(rate, its value for a token without trace) of every rate there is."""
    pairs = zip(rates, NO_TRACE, strict=True)
    return Rates(*(None if x is None else function(x, fill) for x, fill in pairs))


def _shift(rule, state, documents, size):
    """How far the first token is from the start of the block that it falls into."""
    position = state.position if rule.has_anchor else 0
    if documents is None or isinstance(state.position, int):
        return position
    first = jnp.argmax(documents.starts)
    before = jnp.arange(len(documents.starts)) < first
    # Without chunks the blocks may begin anywhere.
    bound = rule.has_anchor & jnp.any(documents.real & before)
    free = jnp.any(documents.starts) & ~bound
    return jnp.where(free, -first % size, position)


def _take(tokens: Tokens, start: int, stop: int) -> Tokens:
    return jax.tree.map(
        partial(jax.lax.slice_in_dim, start_index=start, limit_index=stop), tokens
    )
