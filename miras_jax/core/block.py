"""A block of tokens through a rule, in matrix products.

`block` is the pure function that the engine scans over a sequence: what `Rule.step`
does token by token, for all tokens of a chunk at once. Per token only the factors a_s,
d_s of the gradient a_s d_s^T exist, never its product: reading token t costs K_t (x
W_c) - ((x a^T) * D) (learn d), with the causal decay matrix D.
"""

from functools import partial

import jax
import jax.numpy as jnp

from miras_jax.core import causal
from miras_jax.core.bias import L2, DotProduct
from miras_jax.core.rule import Rule
from miras_jax.core.types import Params, Rates, State, Tokens, state_dtype

EXACT_READOUT_TOKENS = 8
"""Tokens whose own weights are materialised at once by the exact readout."""


def solves(rule: Rule) -> bool:
    """Whether gradients inside a block depend on each other linearly (delta rule)."""
    return rule.chunk_size == 1 and rule.memory.is_linear and rule.bias == L2()


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
    if not rule.retention.is_identity:
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
    flow = partial(_flows, rule, rates, matrices, keys, written)

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
        inputs, cotangents = _factors(
            dot, rule, params, anchor, keys, values, rates, starts
        )

    flows = flow("after")
    learn = _per_matrix((rates.learn, rates.learn), rule.learn_sides(matrices), keys)
    for i, (side, rate) in enumerate(learn):
        if rule.algorithm.erases:
            flows[i] = flows[i]._replace(steps=causal.SumSteps(flows[i].steps))
        elif side == "in":
            inputs[i] = rate * inputs[i]
        elif side == "out" or rule.reads_exactly:
            cotangents[i] = rate * cotangents[i]
        elif rates.learn is not None:
            # Into the [C, C] coefficients: cheaper than into the factors.
            flows[i] = flows[i].scaled(rate)

    after = _advance(dot, rule, flows, state, inputs, cotangents, len(keys))
    if not rule.has_anchor:
        after = after._replace(dual=rule.settled(state.dual, after.dual))
    if rule.reads_exactly:
        read = partial(_read_exactly, rule, params, anchor_dual, state, queries)
        outputs = read(rates, inputs, cotangents, written)
    else:
        base = anchor if aligned else rule.weights(state)
        scales = tuple(rule.retention.scale(a) for a in anchor_dual)
        product = partial(
            _product, dot, rule, flows, base, scales, state.momentum, inputs, cotangents
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


def _flows(rule, rates, matrices, keys, written, when):
    """The recurrences of each matrix; those of the same keep are one and the same."""
    made = {}
    flows = []
    for side, keep in _keep(rule, rates, matrices, keys):
        if (side, id(keep)) not in made:
            log_keep = jax.tree.map(causal.safe_log, keep)
            made[side, id(keep)] = rule.algorithm.flow(
                log_keep, rates.momentum, side, when, written
            )
        flows.append(made[side, id(keep)])
    return flows


def _factors(dot, rule, params, weights, keys, values, rates, starts):
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

        return rule.memory.read(product, params, keys), tuple(inputs)

    slack = [jnp.zeros((len(keys), w.shape[1]), keys.dtype) for w in weights]
    predictions, pull_back, inputs = jax.vjp(write, slack, has_aux=True)
    cotangent = rule.bias.cotangent(predictions, values, rates.threshold)
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


def _advance(dot, rule, flows, state, inputs, cotangents, length) -> State:
    """Points 2 and 3 for the whole block."""
    dual, momentum, kept = [], [], []
    for i, (flow, a, d) in enumerate(zip(flows, inputs, cotangents, strict=True)):
        total = flow.start.end(state.dual[i]) - flow.steps.end(dot, a, d)
        if flow.momentum is not None:
            m = state.momentum[i]
            total = total + flow.momentum_in_dual.end(m)
            carried, steps = flow.momentum
            momentum.append(carried.end(m) - steps.end(dot, a, d))
        dual.append(total)
        if state.kept:
            kept.append(flow.start.factor * state.kept[i])
    position = rule.moved(state, length)
    return State(tuple(dual), state.anchor, tuple(kept), tuple(momentum), position)


def _product(dot, rule, flows, base, scales, momentum, inputs, cotangents, i, x):
    """Point 4, linear: x W_t = K_t (x B) - scale ((x a^T) * D) (learn d)."""
    flow = flows[i]
    own = -flow.steps.read(dot, x, inputs[i], cotangents[i])
    if flow.momentum_in_dual is not None:
        own = own + flow.momentum_in_dual.read(dot, x, momentum[i])
    if not rule.retention.is_identity:
        own = scales[i] * own
    return flow.start.read(dot, x, base[i]) + own


def _read_exactly(
    rule, params, anchor, state, queries, rates, inputs, cotangents, written
):
    """Point 4, exact: W_t = weights(settle(A_c, A_t)), for a few tokens at a time."""
    size, matrices = len(queries), len(state.dual)
    group = min(EXACT_READOUT_TOKENS, size)
    ones = jnp.ones((size, 1), queries.dtype)
    sides, keeps = zip(*_keep(rule, rates, matrices, queries), strict=True)
    momentum = ones if rates.momentum is None else rates.momentum
    written = ones if written is None else written

    def grouped(x):
        x = jnp.pad(x, ((0, -size % group), (0, 0)))
        return x.reshape(-1, group, x.shape[1])

    def read_group(carry, tokens):
        duals, runnings = carry
        queries, keeps, momentum, written, inputs, cotangents = tokens
        after, running_after = [], []
        for i in range(matrices):
            step = -inputs[i][:, :, None] * cotangents[i][:, None, :]
            if runnings:
                step = causal.affine_scan(momentum[:, None], step, runnings[i])
                running_after.append(step)
            keep = jnp.expand_dims(keeps[i], 2 if sides[i] == "in" else 1)
            step = written[:, None] * step
            after.append(causal.affine_scan(keep, step, duals[i]))
        settled = jax.vmap(partial(rule.settled, anchor))(tuple(after))
        weights = [jax.vmap(rule.retention.weights)(a) for a in settled]

        def product(i, x):
            return jnp.einsum("...i,...io->...o", x, weights[i])

        outputs = rule.memory.read(product, params, queries)
        return (_last(after), _last(running_after)), outputs

    columns = (queries, keeps, momentum, written, inputs, cotangents)
    _, outputs = jax.lax.scan(
        jax.checkpoint(read_group),
        (state.dual, state.momentum),
        jax.tree.map(grouped, columns),
    )
    return outputs.reshape(-1, outputs.shape[-1])[:size]


def _last(stacked):
    return tuple(x[-1] for x in stacked)
