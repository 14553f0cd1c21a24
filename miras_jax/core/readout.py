"""Point 4 of a block: what its tokens read, inside the chunk."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core import coefficients
from miras_jax.core.algorithm.muon import TINY_SQUARE
from miras_jax.core.product import Dot, column
from miras_jax.core.retention import Retention
from pallas_kernels.fused_scan import platform

EXACT_READOUT_TOKENS = 8
"""Tokens at most from one matrix that a derivative remembers to the next."""


def product_at(
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
    full = Dot(x.dtype, x.dtype)
    kept, mix = carried.kept, steps.mix
    cross = jnp.sum(full(a, momentum) * d, axis=1, keepdims=True)
    square = (
        kept**2 * jnp.sum(momentum**2)
        - 2 * kept * full(mix, cross)
        + jnp.sum(
            full(mix, full.rows(a, a) * full.rows(d, d)) * mix, axis=1, keepdims=True
        )
    )
    if stride is not None and stride.side == "in":
        x = x * stride.kept
    own = carried.read(dot, x, momentum) - steps.read(dot, x, a, d)
    if stride is not None and stride.side == "out":
        own = own * stride.kept
    return own * jax.lax.rsqrt(jnp.maximum(square, 0) + TINY_SQUARE)


def exactly(
    dot,
    rule,
    params,
    anchor,
    state,
    flows,
    queries,
    rates,
    inputs,
    cotangents,
    strides,
    written,
    sums,
):
    """Point 4, exact: W_t = weights(settle(A_c, A_t)), token by token.

    A matrix at a time: it takes its steps while what its tokens ask of it is read, so
    that no more than one of a token's own matrices exists. Where the weights are the
    dual times a number, only that number is asked for, and x A_t is read as in the
    linear readout. sums `[C, n]`: which pairs make a token's step, where that is more
    than its own.
    """
    proportional = rule.retention.proportional and not rule.settles
    size = len(queries)
    group = next(n for n in range(EXACT_READOUT_TOKENS, 0, -1) if size % n == 0)
    # Those of a group, one after the other.
    each_of_group = jnp.asarray(np.eye(group)[:, :, None], queries.dtype)
    keeps = coefficients.keeps(rule, rates, len(state.dual), queries)

    def grouped(x):
        return x.reshape(-1, group, x.shape[1])

    def product(i, x):
        side, keep = keeps[i]
        stride = strides[i] if strides else None
        view = View.of(rule, state.dual[i])
        a, d = view.pair(inputs[i], -cotangents[i])
        start, momentum = map(view.turned, (state.dual[i], state.momentum[i : i + 1]))
        before = view.turned(anchor[i])
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
            own = rows._replace(x=None, pairs=None)
            own = jax.tree.map(partial(_row, one), own)
            if sums is None:
                step = dot.columns(*(_alone(one, part) for part in rows.pairs))
            else:
                step = dot.columns(column(_row(one, rows.pairs)) * a, d)
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
                read = one * view.read(dot, _alone(one, rows.x), settled)
            return (dual, running, total + read), None

        def read_group(carry, rows):
            width = 1 if proportional else state.dual[i].shape[1]
            total = jnp.zeros((group, width), x.dtype)
            body = jax.checkpoint(partial(read_token, rows), prevent_cse=False)
            carry, _ = jax.lax.scan(body, (*carry, total), each_of_group)
            return carry[:2], carry[2]

        body = jax.checkpoint(read_group, prevent_cse=False)
        _, outputs = jax.lax.scan(body, (start, momentum), jax.tree.map(grouped, rows))
        outputs = outputs.reshape(size, -1)
        if not proportional:
            return outputs
        unscaled = product_at(
            dot,
            rule,
            flows,
            state.dual,
            (1,) * len(flows),
            state.momentum,
            strides,
            inputs,
            cotangents,
            i,
            x,
        )
        return outputs * unscaled

    return rule.memory.read(product, params, queries)


class View(NamedTuple):
    """How the matrices of tokens are laid out: as they are, or transposed.

    A matrix with more inputs than outputs leaves lanes of a TPU idle that its transpose
    fills.
    """

    gate: Retention
    is_turned: bool

    @staticmethod
    def of(rule, dual) -> "View":
        gate = rule.retention
        plain = not rule.settles and gate.transposed is not None
        if platform() == "tpu" and plain and dual.shape[0] > dual.shape[1]:
            return View(gate.transposed, True)
        return View(gate, False)

    def turned(self, matrices):
        return jax.tree.map(jnp.transpose, matrices) if self.is_turned else matrices

    def pair(self, a, d):
        return (d, a) if self.is_turned else (a, d)

    def factor(self, side, rates):
        """One token's rates as what multiplies a matrix whose axis they belong to."""
        if side == "both":
            return column(rates[0]) * rates[1]
        return column(rates) if (side == "in") != self.is_turned else rates

    def read(self, dot, x, dual):
        product = partial(dot.rows if self.is_turned else dot, x)
        return self.gate.read(product, dual, inputs=int(self.is_turned))


class Rows(NamedTuple):
    """What a token's own weights depend on, beside the state: a row for each."""

    x: jax.Array | None
    keep: jax.Array | tuple[jax.Array, jax.Array]
    momentum: jax.Array | None
    written: jax.Array | None
    stride: jax.Array | None
    pairs: tuple[jax.Array, jax.Array] | jax.Array


def _alone(one: jax.Array, x: jax.Array) -> jax.Array:
    """The row of x that the mask shows, for a product of it alone.

    Kernels multiply all rows, the others zero, which is what matrix units are fed with.
    """
    return _row(one, x) if platform() is None else one * x


def _row(one: jax.Array, x: jax.Array) -> jax.Array:
    """The row of x that the mask `[C, 1]` shows: `[1, n]`."""
    return jnp.sum(one * x, axis=0, keepdims=True)
