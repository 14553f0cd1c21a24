"""Point 4 of a block: what its tokens read by the linear readout."""

import jax
import jax.numpy as jnp

from miras_jax.core.algorithm.muon import TINY_SQUARE
from miras_jax.core.product import Dot
from miras_jax.core.updates import Updates


def product_at(updates: Updates, base, scales, i: int, x: jax.Array) -> jax.Array:
    """Point 4, linear: x W_t = K_t (x B) - scale ((x a^T) * D) (learn d)."""
    dot, rule, flow = updates.dot, updates.rule, updates.flows[i]
    if rule.algorithm.settles:
        own = _provisional(updates, i, x)
    else:
        own = -flow.steps.read(dot, x, updates.inputs[i], updates.cotangents[i])
    if flow.momentum_in_dual is not None:
        own = own + flow.momentum_in_dual.read(dot, x, updates.state.momentum[i])
    if not rule.retention.is_identity:
        own = scales[i] * own
    return flow.start.read(dot, x, base[i]) + own


def _provisional(updates, i, x):
    """x (stride_t m_t / |m_t|), the norm of m_t by products of its factors alone."""
    dot, momentum = updates.dot, updates.state.momentum[i]
    carried, steps = updates.flows[i].momentum
    a, d = updates.inputs[i], updates.cotangents[i]
    stride = updates.strides[i] if updates.strides else None
    if stride is not None and stride.side == "in":
        x = x * stride.kept
    own = carried.read(dot, x, momentum) - steps.read(dot, x, a, d)
    if stride is not None and stride.side == "out":
        own = own * stride.kept
    square = momentum_square(dot, carried.kept, steps.mix, momentum, a, d)
    return own * jax.lax.rsqrt(jnp.maximum(square, 0) + TINY_SQUARE)


def momentum_square(dot, kept, mix, m, a, d):
    """|m_t|^2 of m_t = kept_t m - sum_s mix_ts a_s d_s^T: `[C, 1]`.

    Of m, a and d as products round them, in every term: where m_t is a small difference
    of large numbers, so is its square, and that of other roundings would be noise.
    """
    m, d = (x.astype(dot.operands).astype(x.dtype) for x in (m, d))
    full = Dot(d.dtype, d.dtype)
    cross = jnp.sum(dot(a, m) * d, axis=1, keepdims=True)
    pairs = full(mix, dot.rows(a, a) * dot.rows(d, d)) * mix
    return (
        kept**2 * jnp.sum(m**2)
        - 2 * kept * full(mix, cross)
        + jnp.sum(pairs, axis=1, keepdims=True)
    )
