"""A block of tokens through a rule, in matrix products.

`block` is the pure function that the engine scans over a sequence: what `Rule.step`
does token by token, for all tokens of a chunk at once. Per token only the factors a_s,
d_s of the gradient a_s d_s^T exist, never its product: reading token t costs K_t (x
W_c) - ((x a^T) * D) (learn d), with the causal decay matrix D.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.core import causal, window
from miras_jax.core.algorithm.muon import TINY_SQUARE
from miras_jax.core.bias import L2, DotProduct
from miras_jax.core.rule import Rule
from miras_jax.core.types import Params, Past, Rates, State, Tokens, state_dtype

EXACT_READOUT_TOKENS = 8
"""Tokens whose own weights are materialised at once by the exact readout."""


def solves(rule: Rule) -> bool:
    """Whether gradients inside a block depend on each other linearly (delta rule)."""
    exact = rule.chunk_size == 1 and rule.algorithm.window == 1
    return exact and rule.memory.is_linear and rule.bias == L2()


def parallel_tokens(rule: Rule, rates: Rates, tile: int) -> int:
    """How many tokens `block` can take at once without changing the result.

    A chunk, as gradients inside it do not depend on each other. Exact linear rules
    (chunk_size=1, linear retention) have no such limit and take `tile`: the dot-product
    bias has gradients without an affine memory; those of L2 and a plain matrix are the
    solution of one triangular system for all value channels, so that rates may not
    differ between these (what is written at a key of its own may).
    """
    if rule.chunk_size > 1:
        return rule.chunk_size
    if not rule.is_plain:
        return 1
    if rule.bias == DotProduct() and rule.memory.is_affine:
        return tile
    by_value = rule.algorithm.axis == "value" and _has_channels(rates.learn)
    by_value &= not rule.algorithm.erases
    (side,) = rule.sides(1)
    by_value |= side != "in" and _has_channels(rule.keeps(rates)[1])
    return tile if solves(rule) and not by_value else 1


def _has_channels(rate: jax.Array | None) -> bool:
    return rate is not None and rate.ndim == 2


def block(
    rule: Rule,
    params: Params,
    state: State,
    tokens: Tokens,
    *,
    aligned: bool,
    written: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """Write and read C tokens of one chunk (or any C of an exact linear rule).

    aligned: whether the block starts a chunk, so that anchor and kept of the state need
    not be looked at. written `[C, 1]`: 0 for tokens that must leave no trace (they come
    with learn=0, keep=1, momentum=1). The chunk is left open: the engine closes it
    where it ends. Returns `(outputs [C, V], state)`.
    """
    dtype = state_dtype(*state.dual)
    dot = causal.make_dot(tokens.keys.dtype, dtype)
    tokens = jax.tree.map(lambda x: x.astype(dtype), tokens)
    queries, keys, values, rates, erase_keys = tokens
    rates = Rates(*(_column(rate) for rate in rates))
    rates = rates._replace(learn=rule.algorithm.step_size(rates.learn, keys))
    matrices = len(state.dual)
    seen, past = _window(rule, state, keys, values, rates, written)
    flow = partial(_flows, rule, rates, matrices, keys, written, seen)

    anchor_dual = state.dual if aligned else state.anchor
    anchor = tuple(rule.retention.weights(a) for a in anchor_dual)
    if rule.algorithm.erases:
        inputs, cotangents = _solve_erasing(
            dot, rule, flow, state, keys, values, rates, erase_keys
        )
    elif solves(rule) and len(keys) > 1:
        inputs, cotangents = _solve(dot, rule, flow, state, keys, values, rates)
    else:
        starts = flow("between") if rule.algorithm.at == "retained" else None
        inputs, cotangents = _factors(dot, rule, params, anchor, seen, starts)

    strides = _strides(rule, rates, state, keys) if rule.algorithm.strides else None
    scaling = [None] * matrices
    learn, sides = seen.learn, rule.learn_sides(matrices)
    for i, (side, rate) in enumerate(_per_matrix((learn, learn), sides, seen.keys)):
        if rule.algorithm.erases:
            continue
        if side == "in":
            inputs[i] = rate * inputs[i]
        elif side == "out" or rule.reads_exactly:
            cotangents[i] = rate * cotangents[i]
        elif learn is not None:
            scaling[i] = rate

    def weighted(flows):
        if rule.algorithm.erases:
            return [f._replace(steps=causal.SumSteps(f.steps)) for f in flows]
        # Into the [C, C] coefficients: cheaper than into the factors.
        pairs = zip(flows, scaling, strict=True)
        return [flow if rate is None else flow.scaled(rate) for flow, rate in pairs]

    flows = weighted(flow("after"))
    after = _advance(dot, rule, flows, state, inputs, cotangents, strides, len(keys))
    after = after._replace(past=past)
    if not rule.has_anchor:
        settled = rule.settled(state.dual, after.dual, after.momentum, after.stride)
        after = after._replace(dual=settled, stride=())
    if rule.reads_exactly:
        read = partial(_read_exactly, rule, params, anchor_dual, state, queries)
        outputs = read(rates, inputs, cotangents, written, seen.sums)
    elif rule.readout == "start" and (rule.has_anchor or not rule.is_plain):
        outputs = rule.memory.read(lambda i, x: dot(x, anchor[i]), params, queries)
    else:
        flows = weighted(flow("before")) if rule.readout == "start" else flows
        base = anchor if aligned else rule.linear_part(state)
        scales = tuple(rule.retention.scale(a) for a in anchor_dual)
        product = partial(
            _product,
            dot,
            rule,
            flows,
            base,
            scales,
            state.momentum,
            strides,
            inputs,
            cotangents,
        )
        outputs = rule.memory.read(product, params, queries)
    return outputs, after


def _column(rate: jax.Array | None) -> jax.Array | None:
    return rate[:, None] if rate is not None and rate.ndim == 1 else rate


def _per_matrix(rate, sides, keys):
    """(side, rate `[C, 1 or channels]`) for each matrix; side None: one per token.

    rate: those on a memory's inputs and on its outputs. Side "both" comes with a pair,
    where both have channels.
    """
    ones = jnp.ones((len(keys), 1), keys.dtype)
    rows, columns = (ones if x is None else x for x in rate)
    same = rate[0] is rate[1]
    if same and rows.shape[1] == 1:
        return [(None, rows)] * len(sides)
    mean = jnp.mean(rows, axis=1, keepdims=True)
    if not same:
        mean = (mean + jnp.mean(columns, axis=1, keepdims=True)) / 2
    views = {"in": rows, "out": columns, None: mean}
    if "both" in sides:
        if rows.shape[1] > 1 and columns.shape[1] > 1:
            return [("both", (rows, columns))]
        sides = ("in" if columns.shape[1] == 1 else "out",)
        views[sides[0]] = rows * columns
    return [(s if views[s].shape[1] > 1 else None, views[s]) for s in sides]


def _keep(rule, rates, matrices, keys):
    return _per_matrix(rule.keeps(rates), rule.sides(matrices), keys)


class _Seen(NamedTuple):
    """The pairs whose gradients the block takes: its own and those of its window."""

    keys: jax.Array  # [n, K]
    values: jax.Array
    learn: jax.Array | None  # [n, 1 or V], what multiplies their gradients
    threshold: jax.Array | None
    sums: jax.Array | None = None  # [C, n], which of them make a token's step


def _window(rule, state, keys, values, rates, written):
    """These pairs, and the last of them for the blocks to come."""
    # Where learn is the stride's, what leaves no trace is taken out of the gradients.
    learn = written if rule.algorithm.strides else rates.learn
    own = _Seen(keys, values, learn, rates.threshold)
    if rule.algorithm.window == 1:
        return own, ()
    ones = jnp.ones((len(keys), 1), keys.dtype)
    own = own._replace(learn=ones if learn is None else learn)
    view = window.window(rule.algorithm.window, ones if written is None else written)
    both = [
        None if block is None else view.rows(past, block)
        for past, block in zip(state.past, own[:4], strict=True)
    ]
    past = Past(
        *(
            before if rows is None else view.ending(rows, before.shape[1])
            for rows, before in zip(both, state.past, strict=True)
        )
    )
    return _Seen(*both, view.sums), past


def _flows(rule, rates, matrices, keys, written, seen, when):
    """The recurrences of each matrix; those of the same keep are one and the same."""
    made = {}
    flows = []
    for side, keep in _keep(rule, rates, matrices, keys):
        if (side, id(keep)) not in made:
            log_keep = jax.tree.map(causal.safe_log, keep)
            flow = rule.algorithm.flow(log_keep, rates.momentum, side, when, written)
            made[side, id(keep)] = flow if seen.sums is None else flow.summed(seen.sums)
        flows.append(made[side, id(keep)])
    return flows


def _factors(dot, rule, params, weights, seen, starts):
    """a_s, d_s of every matrix: dl/dW = a_s d_s^T at the given weights (point 1).

    a is the input of each product; d, the gradient at its output, is that with respect
    to a zero added there.
    """
    inputs = [None] * len(weights)

    def write(slack):
        def product(i, x):
            inputs[i] = x
            if starts is None:
                return dot(x, weights[i]) + slack[i]
            return starts[i].start.read(dot, x, weights[i]) + slack[i]

        return rule.memory.read(product, params, seen.keys), tuple(inputs)

    slack = [jnp.zeros((len(seen.keys), w.shape[1]), w.dtype) for w in weights]
    predictions, pull_back, inputs = jax.vjp(write, slack, has_aux=True)
    cotangent = rule.bias.cotangent(predictions, seen.values, seen.threshold)
    (cotangents,) = pull_back(cotangent)
    return list(inputs), list(cotangents)


def _solve(dot, rule, flow, state, keys, values, rates):
    """a_s, d_s of the delta rule, whose residuals depend on the earlier ones.

    r_s = W_{s-1}^T k_s - v_s and W_{s-1} holds -learn_j k_j r_j^T for j < s: (I + N) r
    = W_0's predictions - v, N_sj = k_s^T D_{s-1,j} k_j learn_j, the WY form of the
    delta rule (arXiv 2406.06484, section 3.2).
    """
    (before,) = flow("between" if rule.algorithm.at == "retained" else "before")
    learned = keys
    if rates.learn is not None and rates.learn.shape[1] > 1:
        learned = rates.learn * keys
    elif rates.learn is not None:
        before = before.scaled(rates.learn)
    (start,) = state.dual
    prediction = before.start.read(dot, keys, start)
    if before.momentum_in_dual is not None:
        (momentum,) = state.momentum
        prediction = prediction + before.momentum_in_dual.read(dot, keys, momentum)
    matrix = before.steps.scores(dot, keys, learned)
    inverse = causal.unit_lower_inverse(matrix, dot)
    return [keys], [dot(inverse, prediction - values)]


def _solve_erasing(dot, rule, flow, state, keys, values, rates, erase_keys):
    """The same where erased and written is at different keys: two pairs (a_s, d_s).

    What is erased, r_s = W_{s-1}^T e_s, holds the earlier writes beside the earlier
    erasures: (I + N) r = W_0's predictions + E v, N and E the scores of e with them.
    """
    (before,) = flow("between" if rule.algorithm.at == "retained" else "before")
    (start,) = state.dual
    written = values if rates.learn is None else rates.learn * values
    erased = rates.erase * erase_keys
    known = before.start.read(dot, erase_keys, start)
    known = known + dot(before.steps.scores(dot, erase_keys, keys), written)
    matrix = before.steps.scores(dot, erase_keys, erased)
    recalled = dot(causal.unit_lower_inverse(matrix, dot), known)
    return [(erased, keys)], [(recalled, -written)]


def _strides(rule, rates, state, keys):
    """stride_t of each matrix, as what multiplies a step's inputs or outputs.

    Of a matrix on whose inputs the gate acts it is a column, else a row.
    """
    matrices = len(state.dual)
    sides = rule.sides(matrices)
    before = state.stride or (jnp.zeros((1, 1), keys.dtype),) * matrices
    learn = jnp.ones((len(keys), 1), keys.dtype) if rates.learn is None else rates.learn
    dot = causal.make_dot(keys.dtype, keys.dtype)
    ones = jnp.ones_like(learn)
    strides = []
    for (side, keep), of, start in zip(
        _keep(rule, rates, matrices, keys), sides, before, strict=True
    ):
        start = start.T if of == "in" else start
        flow = causal.decay_flow(causal.safe_log(keep), "out" if side else None)
        step = learn * jnp.ones((1, max(keep.shape[1], start.shape[1])), keys.dtype)
        each = flow.start.kept * start + flow.steps.read(dot, ones, ones, step)
        total = flow.start.total * start + flow.steps.end(dot, ones, step)
        strides.append(causal.Carried(each, total, "in" if of == "in" else "out"))
    return strides


def _advance(dot, rule, flows, state, inputs, cotangents, strides, length):
    """Points 2 and 3 for the whole block."""
    dual, momentum, kept = [], [], []
    for i, (flow, a, d) in enumerate(zip(flows, inputs, cotangents, strict=True)):
        total = flow.start.end(state.dual[i])
        if not rule.algorithm.settles:
            total = total - flow.steps.end(dot, a, d)
        if flow.momentum is not None:
            m = state.momentum[i]
            carried, steps = flow.momentum
            momentum.append(carried.end(m) - steps.end(dot, a, d))
        if flow.momentum_in_dual is not None:
            total = total + flow.momentum_in_dual.end(state.momentum[i])
        dual.append(total)
        if state.kept:
            kept.append(flow.start.factor * state.kept[i])
    position = rule.moved(state, length)
    stride = tuple(stride.factor for stride in strides or ())
    return State(
        tuple(dual), state.anchor, tuple(kept), tuple(momentum), position, stride
    )


def _product(
    dot, rule, flows, base, scales, momentum, strides, inputs, cotangents, i, x
):
    """Point 4, linear: x W_t = K_t (x B) - scale ((x a^T) * D) (learn d)."""
    flow = flows[i]
    if rule.algorithm.settles:
        stride = strides[i] if strides else None
        own = _provisional(dot, flow, momentum[i], stride, inputs[i], cotangents[i], x)
    else:
        own = -flow.steps.read(dot, x, inputs[i], cotangents[i])
    if flow.momentum_in_dual is not None:
        own = own + flow.momentum_in_dual.read(dot, x, momentum[i])
    if not rule.retention.is_identity:
        own = scales[i] * own
    return flow.start.read(dot, x, base[i]) + own


def _provisional(dot, flow, momentum, stride, a, d, x):
    """x (stride_t m_t / |m_t|), the norm of m_t by products of its factors alone."""
    carried, steps = flow.momentum
    full = causal.make_dot(x.dtype, x.dtype)
    kept, mix = carried.kept, steps.mix
    cross = jnp.sum(full(a, momentum) * d, axis=1, keepdims=True)
    square = (
        kept**2 * jnp.sum(momentum**2)
        - 2 * kept * full(mix, cross)
        + jnp.sum(full(mix, full(a, a.T) * full(d, d.T)) * mix, axis=1, keepdims=True)
    )
    if stride is not None and stride.side == "in":
        x = x * stride.kept
    own = carried.read(dot, x, momentum) - steps.read(dot, x, a, d)
    if stride is not None and stride.side == "out":
        own = own * stride.kept
    return own * jax.lax.rsqrt(jnp.maximum(square, 0) + TINY_SQUARE)


def _read_exactly(
    rule, params, anchor, state, queries, rates, inputs, cotangents, written, sums
):
    """Point 4, exact: W_t = weights(settle(A_c, A_t)), for a few tokens at a time."""
    size, matrices = len(queries), len(state.dual)
    group = min(EXACT_READOUT_TOKENS, size)
    ones = jnp.ones((size, 1), queries.dtype)
    sides, keeps = zip(*_keep(rule, rates, matrices, queries), strict=True)
    momentum = ones if rates.momentum is None else rates.momentum
    written = ones if written is None else written
    strides = ()
    if rule.algorithm.strides:
        strides = tuple(s.kept for s in _strides(rule, rates, state, queries))

    def grouped(x):
        x = jnp.pad(x, ((0, -size % group), (0, 0)))
        return x.reshape(-1, group, x.shape[1])

    def read_group(carry, tokens):
        duals, runnings = carry
        queries, keeps, momentum, written, strides, pairs = tokens
        after, running_after = [], []
        for i in range(matrices):
            if sums is None:
                a, d = pairs[i]
                step = -a[:, :, None] * d[:, None, :]
            else:
                step = -jnp.einsum("ti,ik,iv->tkv", pairs, inputs[i], cotangents[i])
            if runnings:
                step = causal.affine_scan(momentum[:, None], step, runnings[i])
                running_after.append(step)
            keep = jnp.expand_dims(keeps[i], 2 if sides[i] == "in" else 1)
            entering = 0 if rule.algorithm.settles else written[:, None]
            after.append(causal.affine_scan(keep, entering * step, duals[i]))
        strides = tuple(
            jnp.expand_dims(s, 2 if side == "in" else 1)
            for s, side in zip(strides, rule.sides(matrices), strict=False)
        )
        settled = jax.vmap(partial(rule.settled, anchor))(
            tuple(after), tuple(running_after), strides
        )
        weights = [jax.vmap(rule.retention.weights)(a) for a in settled]

        def product(i, x):
            return jnp.einsum("...i,...io->...o", x, weights[i])

        outputs = rule.memory.read(product, params, queries)
        return (_last(after), _last(running_after)), outputs

    # With a window all pairs are at hand, and which of them a token takes is its own.
    pairs = tuple(zip(inputs, cotangents, strict=True)) if sums is None else sums
    columns = (queries, keeps, momentum, written, strides, pairs)
    _, outputs = jax.lax.scan(
        jax.checkpoint(read_group),
        (state.dual, state.momentum),
        jax.tree.map(grouped, columns),
    )
    return outputs.reshape(-1, outputs.shape[-1])[:size]


def _last(stacked):
    return tuple(x[-1] for x in stacked)
