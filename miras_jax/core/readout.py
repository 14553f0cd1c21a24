"""Point 4 of a block: what its tokens read, inside the chunk."""

from functools import partial

import jax
import jax.numpy as jnp

from miras_jax.core import causal, coefficients
from miras_jax.core.algorithm.muon import TINY_SQUARE
from miras_jax.core.product import Dot

EXACT_READOUT_TOKENS = 8
"""Tokens whose own weights are materialised at once by the exact readout."""


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
    rule, params, anchor, state, queries, rates, inputs, cotangents, written, sums
):
    """Point 4, exact: W_t = weights(settle(A_c, A_t)), for a few tokens at a time."""
    size, matrices = len(queries), len(state.dual)
    group = min(EXACT_READOUT_TOKENS, size)
    ones = jnp.ones((size, 1), queries.dtype)
    sides, keeps = zip(*coefficients.keeps(rule, rates, matrices, queries), strict=True)
    momentum = ones if rates.momentum is None else rates.momentum
    written = ones if written is None else written
    strides = ()
    if rule.algorithm.strides:
        strides = tuple(
            s.kept for s in coefficients.strides(rule, rates, state, queries)
        )

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
