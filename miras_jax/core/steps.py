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

from functools import partial
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.product import Dot, apply, column, prefix_sum, row
from miras_jax.core.types import Side

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
        later = prefix_sum(np.tri(len(log_keep), k=-1).T, log_keep)
        mix = _summed_decay(log_keep, self.when, sums)
        return DenseSteps(mix, sums.T @ jnp.exp(later), side)

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
        if self.log_in is None:
            pairs = jnp.asarray(_halving(len(x))[0], x.dtype)
            return pairs * dot.rows(x, a)[None]
        return _by_size(dot, self._kept(x, self.log_in), a, _factors(self.log_in))

    def scores(self, dot, x, a):
        a = a if self.rate is None else a * self.rate
        own = jnp.asarray(np.eye(len(x)), x.dtype) * self._own(x, a)
        if len(x) == 1:
            return own
        if self.log_in is None:
            return own + jnp.sum(self._products(dot, x, a), axis=0)
        return own + _decayed(dot, self.when, x, a, self.log_in)

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
    return jnp.exp(prefix_sum(_halving(len(log_keep))[1], log_keep))


def _by_size(dot, x, a, factors):
    """x_t^T D_ts a_s of the pairs of each size, D as factors: `[n, C, C]`."""
    pairs = jnp.asarray(_halving(len(x))[0], x.dtype)
    return pairs * dot(x[None] * factors, jnp.swapaxes(a[None] * factors, 1, 2))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decayed(dot: Dot, when: When, x: jax.Array, a: jax.Array, log_keep: jax.Array):
    """x_t^T D_ts a_s of all s < t, one keep per token and channel: `[C, C]`.

    As D_ts is the exponential of a difference b_t - b_s of sums of logs, the derivative
    by b is x dx at the reader and -a da at the writer, channel by channel: none of the
    factors is differentiated (as in GLA, arXiv 2312.06635).
    """
    return _decayed_forward(dot, when, x, a, log_keep)[0]


def _decayed_forward(dot, when, x, a, log_keep):
    factors = _factors(log_keep)
    kept = None if when == "before" else jnp.exp(log_keep)
    x = x if kept is None else x * kept
    products = _by_size(dot, x, a, factors)
    return jnp.sum(products, axis=0), (x, a, factors, kept)


def _decayed_backward(dot, when, residuals, d):
    x, a, factors, kept = residuals
    pairs = jnp.asarray(_halving(len(x))[0], x.dtype) * d[None]
    dx = jnp.sum(factors * dot(pairs, a[None] * factors), axis=0)
    da = jnp.sum(factors * dot.columns(pairs, x[None] * factors), axis=0)
    at_reader, at_writer = x * dx, a * da
    if kept is None:
        # Before its own decay a reader does not see it.
        worth = prefix_sum(np.tri(len(x)).T, at_reader - at_writer) - at_reader
        return dx, da, worth
    return dx * kept, da, prefix_sum(np.tri(len(x)).T, at_reader - at_writer)


_decayed.defvjp(_decayed_forward, _decayed_backward)


def _summed_decay(log_keep: jax.Array, when: When, sums: jax.Array) -> jax.Array:
    """E_ti = sum_s D_ts sums_si `[C, n, channels]`, by E_t = keep_t E_{t-1} + sums_t.

    C times fewer operations than to sum over s for every t.
    """

    def advance(before, token):
        keep, own = token
        between = keep[None] * before
        after = between + own[:, None]
        return after, {"after": after, "between": between, "before": before}[when]

    nothing = jnp.zeros((sums.shape[1], log_keep.shape[1]), log_keep.dtype)
    return jax.lax.scan(advance, nothing, (jnp.exp(log_keep), sums))[1]


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


def pairwise_decay(log_decay: jax.Array, causal: np.ndarray) -> jax.Array:
    """exp(log_decay) where causal, else 0; no exponential of what is masked."""
    mask = jnp.asarray(causal, bool)
    return jnp.where(mask, jnp.exp(jnp.where(mask, log_decay, 0)), 0)


def dense_decay(log_keep: jax.Array, when: When) -> tuple[jax.Array, jax.Array]:
    """D_ts `[C, C, channels]` and D_Cs `[C, channels]`, one number per channel."""
    size = log_keep.shape[0]
    seen = prefix_sum(np.tri(size, k=-1 if when == "before" else 0), log_keep)
    sums = prefix_sum(np.tri(size), log_keep)
    causal = np.tri(size, k=0 if when == "after" else -1)[:, :, None]
    mix = pairwise_decay(seen[:, None] - sums[None], causal)
    return mix, jnp.exp(prefix_sum(np.tri(size, k=-1).T, log_keep))
