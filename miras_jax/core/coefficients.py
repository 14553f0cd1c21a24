"""What a block's rates make of its tokens: recurrences, step sizes, windows."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.core import causal, window
from miras_jax.core.product import Dot
from miras_jax.core.steps import Carried
from miras_jax.core.sums import ChannelSums, Sums, sums
from miras_jax.core.types import Past, Side


def per_matrix(rate, sides, keys):
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


def keeps(rule, rates, matrices, keys):
    """(side, keep) for each matrix, as `per_matrix` has it."""
    return per_matrix(rule.keeps(rates), rule.sides(matrices), keys)


class Seen(NamedTuple):
    """The pairs whose gradients the block takes: its own and those of its window."""

    keys: jax.Array  # [n, K]
    values: jax.Array
    learn: jax.Array | None  # [n, 1 or V], what multiplies their gradients
    threshold: jax.Array | None
    sums: jax.Array | None = None  # [C, n], which of them make a token's step


def pairs_seen(rule, state, keys, values, rates, written):
    """These pairs, and the last of them for the blocks to come."""
    # Where learn is the stride's, what leaves no trace is taken out of the gradients.
    learn = written if rule.algorithm.strides else rates.learn
    own = Seen(keys, values, learn, rates.threshold)
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
    return Seen(*both, view.sums), past


class Kept(NamedTuple):
    """What a gate keeps of a matrix over the block."""

    side: Side | None  # None: one number per token
    sums: Sums | tuple[ChannelSums, ChannelSums]  # a pair of side "both"


def kept(dot, rule, rates, matrices, keys) -> list[Kept]:
    """Of each matrix; those of the same keep are one and the same."""
    of = partial(sums, precision=dot.operands)
    made = {}
    every = []
    for side, keep in keeps(rule, rates, matrices, keys):
        if (side, id(keep)) not in made:
            made[side, id(keep)] = Kept(side, jax.tree.map(of, keep))
        every.append(made[side, id(keep)])
    return every


def flows(rule, rates, decays, written, seen, when):
    """The recurrences of each matrix, `decays` those of `kept`; equal ones are one."""
    made = {}
    for each in decays:
        if id(each) not in made:
            flow = rule.algorithm.flow(
                each.sums, rates.momentum, each.side, when, written
            )
            made[id(each)] = flow if seen.sums is None else flow.summed(seen.sums)
    return [made[id(each)] for each in decays]


def strides(rule, rates, state, keys, decays):
    """stride_t of each matrix, as what multiplies a step's inputs or outputs.

    Of a matrix on whose inputs the gate acts it is a column, else a row.
    """
    matrices = len(state.dual)
    sides = rule.sides(matrices)
    before = state.stride or (jnp.zeros((1, 1), keys.dtype),) * matrices
    learn = jnp.ones((len(keys), 1), keys.dtype) if rates.learn is None else rates.learn
    dot = Dot(keys.dtype, keys.dtype)
    ones = jnp.ones_like(learn)
    every = []
    for (side, decay), of, start in zip(decays, sides, before, strict=True):
        start = start.T if of == "in" else start
        flow = causal.decay_flow(decay, "out" if side else None)
        step = learn * jnp.ones(
            (1, max(decay.own.shape[1], start.shape[1])), keys.dtype
        )
        each = flow.start.kept * start + flow.steps.read(dot, ones, ones, step)
        total = flow.start.total * start + flow.steps.end(dot, ones, step)
        every.append(Carried(each, total, "in" if of == "in" else "out"))
    return every
