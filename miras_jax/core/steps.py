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

from miras_jax.core.product import Dot, apply, column, column_sums, row
from miras_jax.core.sums import ChannelSums
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
        """The same for steps sum_i sums_si a_i d_i^T, sums `[C, n]` of 0 and 1."""

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
        return self._of(column_sums(self.mix, sums), sums)

    def after(self, first: "TokenSteps") -> "TokenSteps":
        """The same for what `first` makes of the steps: the product of both D."""
        return self._of(apply(self.mix, first.mix), first.mix)

    def _of(self, mix, sums):
        to_end = jnp.sum(sums * self.to_end, axis=0, keepdims=True)
        return TokenSteps(mix, column(to_end))

    def scores(self, dot, x, a):
        return dot.rows(x, a) * self.mix

    def read(self, dot, x, a, d):
        return dot(self.scores(dot, x, a), d)

    def end(self, dot, a, d):
        return dot.columns(self.to_end * a, d)


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

    def after(self, first: TokenSteps) -> "DenseSteps":
        return self.summed(first.mix)

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


def dense_decay(sums: ChannelSums, when: When) -> tuple[jax.Array, jax.Array]:
    """D_ts `[C, C, channels]` and D_Cs `[C, channels]`, one number per channel."""
    seen = sums.seen - sums.own if when == "before" else sums.seen
    causal = np.tri(len(seen), k=0 if when == "after" else -1)[:, :, None]
    mix = pairwise_decay(seen[:, None] - sums.seen[None], causal)
    return mix, jnp.exp(sums.later)
