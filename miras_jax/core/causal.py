"""Linear algebra inside a block of C tokens: who counts for whom, and by how much.

A gate multiplies a matrix by keep_t at every token. Inside a block the matrix that
token t reads is then

    W_t = K_t W_0 + sum_{s <= t} D_ts step_s,    K_t = prod_{j <= t} keep_j,
                                                 D_ts = prod_{s < j <= t} keep_j.

With step_s = a_s d_s^T, reading W_t needs products of `[C, ...]` matrices only. K and D
are one number per token, one per token and channel (kept in logarithms, so that every
exponential is of a sum of logs <= 0 and cannot overflow), or dense per channel. All is
written without slices, concatenations or cumulative sums of values, which Pallas' GPU
lowering lacks: prefix sums are products with constant 0/1 matrices and selections are
masks.
"""

from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.product import Dot, apply, column, prefix_sum, row
from miras_jax.core.types import Side


def safe_log(rate: jax.Array) -> jax.Array:
    """log(rate), finite also where a rate in [0, 1] is or underflows to zero."""
    return jnp.log(jnp.maximum(rate, jnp.finfo(rate.dtype).tiny))


When = Literal["after", "before", "between"]
"""At which moment token t looks at the memory: after its own write (its step counts),
before it and before its decay (neither counts), or between its decay and its write."""


class Carried(NamedTuple):
    """How a matrix that enters the block reaches token t: multiplied by `kept`."""

    kept: jax.Array  # [C, 1] or [C, channels]
    total: jax.Array  # the same at the end of the block: [1, 1] or [1, channels]
    side: Side | None  # None: one number per token
    values: "Carried | None" = None  # the second one of side "both"

    def read(self, dot: Dot, x: jax.Array, start: jax.Array) -> jax.Array:
        """x_t^T K_t W for every t: `[C, in]` -> `[C, out]`."""
        # One number per token can multiply either side: the narrower costs less.
        narrow = self.side is None and x.shape[1] < start.shape[1]
        if self.side == "both":
            return dot(x * self.kept, start) * self.values.kept
        if self.side == "in" or narrow:
            return dot(x * self.kept, start)
        return dot(x, start) * self.kept

    def end(self, start: jax.Array) -> jax.Array:
        """K_C W."""
        return self.factor * start

    @property
    def factor(self) -> jax.Array:
        """K_C, broadcastable to the matrix."""
        if self.side == "both":
            return self.total.T * self.values.total
        return self.total.T if self.side == "in" else self.total


class Steps(Protocol):
    """How the block's own steps a_s d_s^T reach token t."""

    def scaled(self, rate: jax.Array) -> "Steps":
        """The same for steps rate_s a_s d_s^T, rate `[C, 1]`."""

    def summed(self, sums: jax.Array) -> "Steps":
        """The same for steps sum_i sums_si a_i d_i^T, sums `[C, n]`."""

    def scores(self, dot: Dot, x: jax.Array, a: jax.Array) -> jax.Array:
        """x_t^T D_ts a_s, zero for s that t does not see: `[C, C]`."""

    def read(self, dot: Dot, x: jax.Array, a: jax.Array, d: jax.Array) -> jax.Array:
        """x_t^T sum_s D_ts a_s d_s^T for every t: `[C, out]`."""

    def end(self, dot: Dot, a: jax.Array, d: jax.Array) -> jax.Array:
        """sum_s D_Cs a_s d_s^T: `[in, out]`."""


class TokenSteps(NamedTuple):
    """D with one number per pair of tokens."""

    mix: jax.Array  # D_ts [C, C]
    to_end: jax.Array  # D_Cs [C, 1]

    def scaled(self, rate):
        return TokenSteps(self.mix * row(rate), self.to_end * rate)

    def summed(self, sums):
        to_end = jnp.sum(sums * self.to_end, axis=0, keepdims=True)
        return TokenSteps(apply(self.mix, sums), column(to_end))

    def scores(self, dot, x, a):
        return dot.rows(x, a) * self.mix

    def read(self, dot, x, a, d):
        return dot(self.scores(dot, x, a), d)

    def end(self, dot, a, d):
        return dot.columns(self.to_end * a, d)


class ChannelSteps(NamedTuple):
    """D with one keep per token and channel, by halving the block.

    For a pair t, s in the two halves of a piece whose second half begins at m, D_ts =
    keep_t (prod_{m <= j < t} keep_j) (prod_{s < j < m} keep_j): all factors are at most
    1 and can be multiplied into x_t and a_s, or, of value channels, into the output and
    d_s. So each of the log2(C) sizes of pieces costs one matrix product, and the pairs
    of all sizes together are the whole triangle. Exact for any keep in (0, 1], with no
    exponential of a positive sum.
    """

    log_in: jax.Array | None  # [C, K], None: no channels on the key axis
    log_out: jax.Array | None  # [C, V], the same of the value axis
    when: When
    rate: jax.Array | None = None  # [C, 1]

    def scaled(self, rate):
        return self._replace(rate=rate)

    def summed(self, sums):
        side, log_keep = (
            ("out", self.log_out) if self.log_in is None else ("in", self.log_in)
        )
        return DenseSteps(*_dense(log_keep, self.when), side).summed(sums)

    def _narrow(self, a, d):
        """The factors of the steps, the rate multiplied into the narrower one."""
        if self.rate is None:
            return a, d
        narrow = a.shape[1] < d.shape[1]
        return (a * self.rate, d) if narrow else (a, d * self.rate)

    def _own(self, x, a):
        """x_t^T a_t where token t sees its own step: `[C, 1]`."""
        seen = 1 if self.when == "after" else 0
        return seen * jnp.sum(x * a, axis=1, keepdims=True)

    def _kept(self, x, log_keep):
        """x_t with what is kept at t itself, unless it looks before its decay."""
        return x if self.when == "before" else x * jnp.exp(log_keep)

    def _products(self, dot, x, a):
        """x_t^T D_ts a_s of the pairs of each size, D of the key axis: `[n, C, C]`."""
        pairs = jnp.asarray(_halving(len(x))[0], x.dtype)
        if self.log_in is None:
            return pairs * dot.rows(x, a)[None]
        factors = _factors(self.log_in)
        x = self._kept(x, self.log_in)
        return pairs * dot(x[None] * factors, jnp.swapaxes(a[None] * factors, 1, 2))

    def scores(self, dot, x, a):
        a = a if self.rate is None else a * self.rate
        own = jnp.asarray(np.eye(len(x)), x.dtype) * self._own(x, a)
        if len(x) == 1:
            return own
        return own + jnp.sum(self._products(dot, x, a), axis=0)

    def read(self, dot, x, a, d):
        if self.log_out is None:
            return dot(self.scores(dot, x, a), d)
        a, d = self._narrow(a, d)
        own = self._own(x, a) * d
        if len(x) == 1:
            return own
        factors = _factors(self.log_out)
        mixed = dot(self._products(dot, x, a), factors * d[None])
        return own + self._kept(jnp.sum(factors * mixed, axis=0), self.log_out)

    def end(self, dot, a, d):
        later = np.tri(len(a), k=-1).T
        a, d = self._narrow(a, d)
        if self.log_in is not None:
            a = a * jnp.exp(prefix_sum(later, self.log_in))
        if self.log_out is not None:
            d = d * jnp.exp(prefix_sum(later, self.log_out))
        return dot.columns(a, d)


def _halving(size: int) -> tuple[np.ndarray, np.ndarray]:
    """0/1 masks of the n sizes of pieces.

    pairs `[n, C, C]` in the two halves of a piece; tokens `[n, C, C]` whose keep lies
    between token t and the middle of its piece, its own left out.
    """
    rows = np.arange(size)[:, None]
    columns = rows.T
    pairs, between = [], []
    for half in (2**i for i in range((size - 1).bit_length())):
        second = (rows // half) % 2 == 1
        middle = (rows // half + 1 - second) * half
        as_reader = (columns >= middle) & (columns < rows)
        as_writer = (columns > rows) & (columns < middle)
        same = rows // (2 * half) == columns // (2 * half)
        pairs.append(same & second & ~second.T)
        between.append(np.where(second, as_reader, as_writer))
    return np.stack(pairs), np.stack(between)


def _factors(log_keep: jax.Array) -> jax.Array:
    """What is kept between each token and the middle of its piece: `[n, C, channels]`.

    The same whenever a token looks, so that it is computed once.
    """
    size, channels = log_keep.shape
    logs = prefix_sum(np.concatenate(_halving(size)[1]), log_keep)
    return jnp.exp(logs).reshape(-1, size, channels)


class SumSteps(NamedTuple):
    """Steps that are a sum of several a_s d_s^T: a and d come as tuples."""

    steps: Steps

    def scaled(self, rate):
        return SumSteps(self.steps.scaled(rate))

    def scores(self, dot, x, a):
        return sum(self.steps.scores(dot, x, part) for part in a)

    def read(self, dot, x, a, d):
        pairs = zip(a, d, strict=True)
        return sum(self.steps.read(dot, x, *pair) for pair in pairs)

    def end(self, dot, a, d):
        return sum(self.steps.end(dot, *pair) for pair in zip(a, d, strict=True))


class DenseSteps(NamedTuple):
    """D with one number per pair of tokens and channel: channel-wise with momentum."""

    mix: jax.Array  # D_ts [C, C, channels]
    to_end: jax.Array  # [C, channels]
    side: Side

    def scaled(self, rate):
        mix = self.mix * row(rate)[:, :, None]
        return DenseSteps(mix, self.to_end * rate, self.side)

    def summed(self, sums):
        mix = jnp.einsum("tic,is->tsc", self.mix, sums)
        return DenseSteps(mix, sums.T @ self.to_end, self.side)

    def scores(self, dot, x, a):
        return jnp.einsum("ti,si,tsi->ts", x, a, self.mix)

    def read(self, dot, x, a, d):
        if self.side == "in":
            return dot(self.scores(dot, x, a), d)
        return jnp.einsum("ts,so,tso->to", dot.rows(x, a), d, self.mix)

    def end(self, dot, a, d):
        if self.side == "in":
            return dot.columns(self.to_end * a, d)
        return dot.columns(a, self.to_end * d)


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
    log_keep: jax.Array | tuple[jax.Array, jax.Array],
    side: Side | None,
    when: When = "after",
) -> Flow:
    """A_s = keep_s A_{s-1} + step_s, keep as logarithms `[C, 1 or channels]`.

    Of side "both" it is a pair, of the key and the value channels.
    """
    if side == "both":
        rows, columns = (
            decay_flow(log, each, when)
            for log, each in zip(log_keep, ("in", "out"), strict=True)
        )
        start = rows.start._replace(side="both", values=columns.start)
        return Flow(start, ChannelSteps(*log_keep, when))
    size = log_keep.shape[0]
    total = jnp.sum(log_keep, axis=0, keepdims=True)
    if log_keep.shape[1] > 1:
        seen = prefix_sum(np.tri(size, k=-1 if when == "before" else 0), log_keep)
        logs = (log_keep, None) if side == "in" else (None, log_keep)
        start = Carried(jnp.exp(seen), jnp.exp(total), side)
        return Flow(start, ChannelSteps(*logs, when))
    upto = jnp.asarray(np.tri(size).T, log_keep.dtype)
    sums_row = jnp.sum(upto * log_keep, axis=0, keepdims=True)
    sums = column(sums_row)
    seen = sums - log_keep if when == "before" else sums
    mix = _decay(seen - sums_row, np.tri(size, k=0 if when == "after" else -1))
    start = Carried(jnp.exp(seen), jnp.exp(total), side)
    return Flow(start, TokenSteps(mix, jnp.exp(total - sums)))


def _decay(log_decay: jax.Array, causal: np.ndarray) -> jax.Array:
    """exp(log_decay) where causal, else 0; no exponential of what is masked."""
    mask = jnp.asarray(causal, bool)
    return jnp.where(mask, jnp.exp(jnp.where(mask, log_decay, 0)), 0)


def _dense(log_keep: jax.Array, when: When) -> tuple[jax.Array, jax.Array]:
    """D_ts `[C, C, channels]` and D_Cs `[C, channels]`, one number per channel."""
    size = log_keep.shape[0]
    seen = prefix_sum(np.tri(size, k=-1 if when == "before" else 0), log_keep)
    sums = prefix_sum(np.tri(size), log_keep)
    causal = np.tri(size, k=0 if when == "after" else -1)[:, :, None]
    mix = _decay(seen[:, None] - sums[None], causal)
    return mix, jnp.exp(prefix_sum(np.tri(size, k=-1).T, log_keep))


def momentum_flow(
    log_keep: jax.Array,
    log_momentum: jax.Array,
    side: Side | None,
    when: When = "after",
    written: jax.Array | None = None,
) -> Flow:
    """m_s = momentum_s m_{s-1} + u_s, then A_s = keep_s A_{s-1} + written_s m_s.

    The composition of two decays. `log_momentum` is `[C, 1]`; `written` `[C, 1]` is 0
    for tokens that must leave no trace (padding).
    """
    decay = decay_flow(log_keep, side, when)
    steps = decay.steps
    own = decay_flow(log_momentum, None)
    through = own.start.kept
    if isinstance(steps, TokenSteps):
        if written is not None:
            steps = steps.scaled(written)
        composed = steps.summed(own.steps.mix)
        carried = apply(steps.mix, through)
    else:
        mix, to_end = _dense(log_keep, when)
        if written is not None:
            mix, to_end = mix * written[None], to_end * written
        composed = DenseSteps(mix, to_end, side).summed(own.steps.mix)
        carried = jnp.einsum("trc,r->tc", mix, through[:, 0])
        steps = TokenSteps(mix, to_end)
    at_end = jnp.sum(steps.to_end * through, axis=0, keepdims=True)
    return Flow(
        decay.start,
        composed,
        momentum_in_dual=Carried(carried, at_end, side),
        momentum=(own.start, own.steps),
    )


def unit_lower_inverse(lower: jax.Array, dot: Dot) -> jax.Array:
    """(I + N)^{-1} of a strictly lower triangular N `[C, C]`, by log2(C) block merges.

    If X inverts the diagonal blocks of size b, the blocks of size 2b are inverted by
    X - X N' X, with N' the part of N between the two halves of each: forward
    substitution by blocks, as stable as it, in matrix products only.
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


def affine_scan(keep: jax.Array, step: jax.Array, start: jax.Array) -> jax.Array:
    """All A_s = keep_s A_{s-1} + step_s at once, by `lax.associative_scan`.

    keep and step `[n, ...]` broadcast against each other; start `[...]`; `[n, ...]`.
    """
    keep = jnp.broadcast_to(keep, step.shape)

    def combine(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    kept, steps = jax.lax.associative_scan(combine, (keep, step))
    return kept * start[None] + steps
