"""A block of tokens through a rule, in matrix products.

`block` is the pure function that the engine scans over a sequence: what `Rule.step`
does token by token, for all tokens of a chunk at once. Per token only the factors a_s,
d_s of the gradient a_s d_s^T exist, never its product: reading token t costs K_t (x
W_c) - ((x a^T) * D) (learn d), with the causal decay matrix D.
"""

from functools import partial

import jax
import jax.numpy as jnp

from miras_jax.core import causal, coefficients, exact, readout
from miras_jax.core.bias import L2, DotProduct
from miras_jax.core.product import Dot, column
from miras_jax.core.rule import Rule
from miras_jax.core.steps import SumSteps
from miras_jax.core.types import Params, Rates, State, Tokens, state_dtype
from miras_jax.core.updates import Updates


def solves(rule: Rule) -> bool:
    """Whether gradients inside a block depend on each other linearly (delta rule)."""
    dependent = rule.algorithm.window == 1 and rule.algorithm.at != "zero"
    exact = rule.chunk_size == 1 and dependent
    return exact and rule.memory.is_linear and rule.bias == L2()


def parallel_tokens(rule: Rule, rates: Rates, tile: int) -> int:
    """How many tokens `block` can take at once without changing the result.

    A chunk, as gradients inside it do not depend on each other. Exact linear rules
    (chunk_size=1, linear retention) have no such limit and take `tile`: the dot-product
    bias has gradients without an affine memory; those of L2 and a plain matrix are the
    solution of one triangular system for all value channels, or of one for each where
    learn differs between them; decays may not differ (what is written at a key of its
    own may). Decays of their own for every channel cost log2(tile) products of size
    tile, and take half of it.
    """
    if rule.chunk_size > 1:
        return rule.chunk_size
    if not rule.is_plain:
        return 1
    if any(map(_has_channels, rule.keeps(rates))):
        tile = max(1, tile // 2)
    if rule.bias == DotProduct() and rule.memory.is_affine:
        return tile
    if rule.algorithm.at == "zero":
        return tile
    (side,) = rule.sides(1)
    by_value = side != "in" and _has_channels(rule.keeps(rates)[1])
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
    complete: bool | jax.Array,
    written: jax.Array | None = None,
) -> tuple[jax.Array, State]:
    """Write and read C tokens of one chunk (or any C of an exact linear rule).

    aligned: whether the block starts a chunk, so that anchor and kept of the state need
    not be looked at; complete: whether it ends one, which closes it. written `[C, 1]`:
    0 for tokens that must leave no trace (they come with learn=0, keep=1, momentum=1).
    Returns `(outputs [C, V], state)`.
    """
    dtype = state_dtype(*state.dual)
    dot = Dot(tokens.keys.dtype, dtype)
    tokens = jax.tree.map(lambda x: x.astype(dtype), tokens)
    queries, keys, values, rates, erase_keys = tokens
    rates = Rates(*(_column(rate) for rate in rates))
    rates = rates._replace(learn=rule.algorithm.step_size(rates.learn, keys))
    matrices = len(state.dual)
    seen, past = coefficients.pairs_seen(rule, state, keys, values, rates, written)
    decays = coefficients.kept(dot, rule, rates, matrices, keys)
    flow = partial(coefficients.flows, rule, rates, decays, written, seen)

    anchor_dual = state.dual if aligned else state.anchor
    anchor = tuple(rule.retention.weights(a) for a in anchor_dual)
    if rule.algorithm.at == "zero":
        anchor = tuple(jnp.zeros_like(w) for w in anchor)
    if rule.algorithm.erases:
        inputs, cotangents = _solve_erasing(
            dot, rule, flow, state, keys, values, rates, erase_keys
        )
    elif solves(rule) and len(keys) > 1:
        inputs, cotangents = _solve(dot, rule, flow, state, keys, values, rates)
    else:
        starts = flow("between") if rule.algorithm.at == "retained" else None
        inputs, cotangents = _factors(dot, rule, params, anchor, seen, starts)

    strides = (
        coefficients.strides(rule, rates, state, keys, decays)
        if rule.algorithm.strides
        else None
    )
    scaling = [None] * matrices
    learn, sides = seen.learn, rule.learn_sides(matrices)
    for i, (side, rate) in enumerate(
        coefficients.per_matrix((learn, learn), sides, seen.keys)
    ):
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
            return [f._replace(steps=SumSteps(f.steps)) for f in flows]
        # Into the [C, C] coefficients: cheaper than into the factors.
        pairs = list(zip(flows, scaling, strict=True))
        made = {
            (id(flow), id(rate)): flow if rate is None else flow.scaled(rate)
            for flow, rate in pairs
        }
        return [made[id(flow), id(rate)] for flow, rate in pairs]

    flows = weighted(flow("after"))
    updates = Updates(dot, rule, state, flows, inputs, cotangents, strides)
    after = _advance(updates, len(keys))
    curvature = state.curvature
    if rule.algorithm.curves:
        h, ridge = curvature
        full = Dot(dtype, dtype)
        own = flows[0].steps.end(full, keys, keys)
        curvature = (flows[0].start.end(h) + own, ridge)
    after = after._replace(past=past, curvature=curvature)
    if not rule.has_anchor:
        ending = (after.dual, after.momentum, after.stride)
        settled = rule.settled(state.dual, *ending, dot)
        after = after._replace(dual=settled, stride=())
    if rule.reads_exactly:
        outputs = exact.exactly(
            updates, params, anchor_dual, queries, rates, written, seen.sums
        )
    elif rule.readout == "start" and (rule.has_anchor or not rule.is_plain):
        outputs = rule.memory.read(lambda i, x: dot(x, anchor[i]), params, queries)
    else:
        if rule.readout == "start":
            updates = updates._replace(flows=weighted(flow("before")))
        if rule.algorithm.curves:
            queries = rule.algorithm.turned(
                dot, updates.flows[0], state.curvature, keys, queries
            )
        base = rule.linear_part(state) if rule.is_plain or not aligned else anchor
        scales = tuple(rule.retention.scale(a) for a in anchor_dual)
        product = partial(readout.product_at, updates, base, scales)
        outputs = rule.memory.read(product, params, queries)
    return outputs, rule.close(after, complete, dot)


def _column(rate: jax.Array | None) -> jax.Array | None:
    return column(rate[None]) if rate is not None and rate.ndim == 1 else rate


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
    learned, channels = keys, rates.learn is not None and rates.learn.shape[1] > 1
    if channels and rule.algorithm.axis == "key":
        learned = rates.learn * keys
    elif rates.learn is not None and not channels:
        before = before.scaled(rates.learn)
    (start,) = state.dual
    prediction = before.start.read(dot, keys, start)
    if before.momentum_in_dual is not None:
        (momentum,) = state.momentum
        prediction = prediction + before.momentum_in_dual.read(dot, keys, momentum)
    matrix = before.steps.scores(dot, keys, learned)
    if channels and rule.algorithm.axis == "value":
        solved = causal.substitute(matrix, rates.learn, prediction - values, dot)
        return [keys], [solved]
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


def _advance(updates: Updates, length: int) -> State:
    """Points 2 and 3 for the whole block."""
    dot, rule, state, *steps, strides = updates
    dual, momentum, kept = [], [], []
    for i, (flow, a, d) in enumerate(zip(*steps, strict=True)):
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
