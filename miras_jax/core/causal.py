"""How a matrix evolves over a block: the decays of gates and algorithms, combined.

`steps` says who counts for whom; here a gate's decay, and a running step on top of it,
become the `Flow` of a matrix. Beside it the solutions that the delta rule needs.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.channels import ChannelSteps
from miras_jax.core.product import Dot, apply
from miras_jax.core.steps import (
    Carried,
    DenseSteps,
    Steps,
    TokenSteps,
    When,
    dense_decay,
    pairwise_decay,
)
from miras_jax.core.sums import ChannelSums, Sums, sums
from miras_jax.core.types import Side


class Flow(NamedTuple):
    """How a matrix evolves over a block: what enters, and what each token adds."""

    start: Carried
    steps: Steps
    momentum_in_dual: Carried | None = None  # m_0 as part of A_t
    momentum: tuple[Carried, TokenSteps] | None = None  # m_C from m_0 and the steps

    def scaled(self, rate: jax.Array) -> "Flow":
        """The same for steps rate_s a_s d_s^T, rate `[C, 1]`."""
        momentum = self.momentum and (self.momentum[0], self.momentum[1].scaled(rate))
        return self._replace(steps=self.steps.scaled(rate), momentum=momentum)

    def summed(self, sums: jax.Array) -> "Flow":
        """The same for steps sum_i sums_si a_i d_i^T, sums `[C, n]`."""
        momentum = self.momentum and (self.momentum[0], self.momentum[1].summed(sums))
        return self._replace(steps=self.steps.summed(sums), momentum=momentum)


def decay_flow(
    decay: Sums | tuple[ChannelSums, ChannelSums],
    side: Side | None,
    when: When = "after",
) -> Flow:
    """A_s = keep_s A_{s-1} + step_s, keep as sums of logarithms.

    Of side "both" it is a pair, of the key and the value channels.
    """
    if side == "both":
        rows, columns = (
            decay_flow(each, of, when)
            for each, of in zip(decay, ("in", "out"), strict=True)
        )
        start = rows.start._replace(side="both", values=columns.start)
        return Flow(start, ChannelSteps(*decay, when))
    seen = decay.seen - decay.own if when == "before" else decay.seen
    start = Carried(jnp.exp(seen), jnp.exp(decay.total), side)
    if isinstance(decay, ChannelSums):
        by_axis = (decay, None) if side == "in" else (None, decay)
        return Flow(start, ChannelSteps(*by_axis, when))
    pairs = decay.pairs - decay.own if when == "before" else decay.pairs
    mix = pairwise_decay(pairs, np.tri(len(seen), k=0 if when == "after" else -1))
    return Flow(start, TokenSteps(mix, jnp.exp(decay.later)))


def momentum_flow(
    decay: Sums,
    momentum: jax.Array,
    side: Side | None,
    when: When = "after",
    written: jax.Array | None = None,
) -> Flow:
    """m_s = momentum_s m_{s-1} + u_s, then A_s = keep_s A_{s-1} + written_s m_s.

    The composition of two decays. `momentum` is `[C, 1]`; `written` `[C, 1]` is 0 for
    tokens that must leave no trace (padding).
    """
    flow = decay_flow(decay, side, when)
    steps = flow.steps
    own = decay_flow(sums(momentum), None)
    through = own.start.kept
    if isinstance(steps, TokenSteps):
        if written is not None:
            steps = steps.scaled(written)
        composed = steps.after(own.steps)
        carried = apply(steps.mix, through)
    else:
        mix, to_end = dense_decay(decay, when)
        if written is not None:
            mix, to_end = mix * written[None], to_end * written
        composed = DenseSteps(mix, to_end, side).after(own.steps)
        carried = jnp.einsum("trc,r->tc", mix, through[:, 0])
        steps = TokenSteps(mix, to_end)
    at_end = jnp.sum(steps.to_end * through, axis=0, keepdims=True)
    return Flow(
        flow.start,
        composed,
        momentum_in_dual=Carried(carried, at_end, side),
        momentum=(own.start, own.steps),
    )


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unit_lower_inverse(lower: jax.Array, dot: Dot) -> jax.Array:
    """(I + N)^{-1} of a strictly lower triangular N `[C, C]`, by log2(C) block merges.

    If X inverts the diagonal blocks of size b, the blocks of size 2b are inverted by
    X - X N' X, with N' the part of N between the two halves of each: forward
    substitution by blocks, as stable as it, in matrix products only. Its derivative
    takes two products: X = (I + N)^{-1} has dX = -X dN X.
    """
    size = lower.shape[0]
    rows = np.arange(size)[:, None]
    columns = rows.T
    inverse = jnp.asarray(np.eye(size), lower.dtype)
    half = 1
    while half < size:
        same = rows // (2 * half) == columns // (2 * half)
        between = same & (rows // half != columns // half)
        part = jnp.asarray(between, lower.dtype) * lower
        # The first blocks are single ones, whose inverse changes nothing.
        change = part if half == 1 else dot(dot(inverse, part), inverse)
        inverse = inverse - change
        half *= 2
    return inverse


def _inverse_forward(lower, dot):
    inverse = unit_lower_inverse(lower, dot)
    return inverse, inverse


def _inverse_backward(dot, inverse, d):
    d = dot.columns(inverse, dot.rows(d, inverse))
    below = jnp.asarray(np.tri(len(d), k=-1), d.dtype)
    return (-below * d,)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def substitute(
    lower: jax.Array, rate: jax.Array, known: jax.Array, dot: Dot
) -> jax.Array:
    """r of (I + N diag(rate_v)) r_v = known_v for every value channel v: `[C, V]`.

    N strictly lower triangular `[C, C]`, rate `[C, V]`: as many systems as channels, so
    that they are solved row by row, r_t = known_t - sum_{s<t} N_ts rate_s r_s, and not
    by an inverse. A row costs C V multiplications, where a token that updates the
    memory itself costs K V several times.
    """
    return _substitute(lower, rate, known, dot, reverse=False)


def _substitute(triangle, rate, known, dot, reverse):
    def advance(written, row):
        triangle, own, rate, known = (x[None] for x in row)
        r = known - dot(triangle, written)
        return written + dot.columns(own, rate * r), r[0]

    own = jnp.asarray(np.eye(len(known)), known.dtype)
    rows = (triangle, own, rate, known)
    return jax.lax.scan(advance, jnp.zeros_like(known), rows, reverse=reverse)[1]


def _substitute_forward(lower, rate, known, dot):
    solved = substitute(lower, rate, known, dot)
    return solved, (lower, rate, solved)


def _substitute_backward(dot, kept, d):
    # The cotangent of known is d - rate z, z = N^T of it: the transposed systems.
    lower, rate, solved = kept
    z = _substitute(lower.T, rate, dot.columns(lower, d), dot, reverse=True)
    d = d - rate * z
    below = jnp.asarray(np.tri(len(d), k=-1), d.dtype)
    return -below * dot.rows(d, rate * solved), -solved * z, d


substitute.defvjp(_substitute_forward, _substitute_backward)
