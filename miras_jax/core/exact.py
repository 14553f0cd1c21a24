"""Point 4 of a block, exactly: W_t = weights(settle(A_c, A_t)) of every token."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core import coefficients, readout, together
from miras_jax.core.product import column
from miras_jax.core.updates import Updates
from miras_jax.core.view import View, alone, row

GROUP = 8
"""Tokens at most from one matrix that a derivative remembers to the next."""


def exactly(updates: Updates, params, anchor, queries, rates, written, sums):
    """What the queries read, each at its own weights.

    A matrix at a time: it takes its steps while what its tokens ask of it is read, so
    that no more than one of a token's own matrices exists; or, where there are matrix
    units, several are made at once (`together.py`). Where the weights are the
    dual times a number, only that number is asked for, and x A_t is read as in the
    linear readout. sums `[C, n]`: which pairs make a token's step, where that is more
    than its own.
    """
    dot, rule, state, flows, *_ = updates
    proportional = rule.retention.proportional and not rule.settles
    size = len(queries)
    group = next(n for n in range(GROUP, 0, -1) if size % n == 0)
    # Those of a group, one after the other.
    each_of_group = jnp.asarray(np.eye(group)[:, :, None], queries.dtype)
    keeps = coefficients.keeps(rule, rates, len(state.dual), queries)

    def grouped(x):
        return x.reshape(-1, group, x.shape[1])

    def factor(i, x):
        """x W_t, or the number that x A_t is multiplied by."""
        side, keep = keeps[i]
        stride = updates.strides[i] if updates.strides else None
        view = View.of(rule, state.dual[i])
        a, d = view.pair(updates.inputs[i], -updates.cotangents[i])
        start, momentum = map(view.turned, (state.dual[i], state.momentum[i : i + 1]))
        before = view.turned(anchor[i])
        if together.makes(rule, flows[i]):
            of = together.TokenMatrices.of
            matrices = of(flows[i], start, momentum, a, d, only_scales=proportional)
            if proportional:
                return matrices.scales(dot, view.gate, group)

            def read(one, x, dual):
                (settled,) = rule.settled((before,), (dual,), (), (), dot)
                return one * view.read(dot, alone(one, x), settled)

            return matrices.read(dot, read, x, group)

        rows = Rows(
            None if proportional else x,
            keep,
            rates.momentum,
            written,
            stride and stride.kept,
            (a, d) if sums is None else sums,
        )

        def read_token(rows, carry, one):
            dual, running, total = carry
            own = jax.tree.map(partial(row, one), rows._replace(x=None, pairs=None))
            if sums is None:
                step = dot.columns(*(alone(one, part) for part in rows.pairs))
            else:
                step = dot.columns(column(row(one, rows.pairs)) * a, d)
            if running:
                step = own.momentum * running[0] + step
                running = (step,)
            dual = view.factor(side, own.keep) * dual
            if not rule.algorithm.settles:
                dual = dual + (step if written is None else own.written * step)
            sizes = (view.factor(stride.side, own.stride),) if stride else ()
            (settled,) = rule.settled((before,), (dual,), running, sizes, dot)
            if proportional:
                read = one * view.gate.scale(settled)
            else:
                read = one * view.read(dot, alone(one, rows.x), settled)
            return (dual, running, total + read), None

        def read_group(carry, rows):
            width = 1 if proportional else state.dual[i].shape[1]
            total = jnp.zeros((group, width), x.dtype)
            body = jax.checkpoint(partial(read_token, rows), prevent_cse=False)
            carry, _ = jax.lax.scan(body, (*carry, total), each_of_group)
            return carry[:2], carry[2]

        body = jax.checkpoint(read_group, prevent_cse=False)
        _, outputs = jax.lax.scan(body, (start, momentum), jax.tree.map(grouped, rows))
        return outputs.reshape(size, -1)

    def product(i, x):
        if not proportional:
            return factor(i, x)
        own_scale = (1,) * len(flows)
        linear = readout.product_at(updates, state.dual, own_scale, i, x)
        return factor(i, x) * linear

    return rule.memory.read(product, params, queries)


class Rows(NamedTuple):
    """What a token's own weights depend on, beside the state: a row for each."""

    x: jax.Array | None
    keep: jax.Array | tuple[jax.Array, jax.Array]
    momentum: jax.Array | None
    written: jax.Array | None
    stride: jax.Array | None
    pairs: tuple[jax.Array, jax.Array] | jax.Array
