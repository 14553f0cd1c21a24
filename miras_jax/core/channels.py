"""Steps whose decay has a number per channel, without one per pair and channel.

For a pair t, s in the two halves of a piece whose second half begins at m, D_ts =
keep_t (prod_{m <= j < t} keep_j) (prod_{s < j < m} keep_j): all factors are at most 1
and can be multiplied into x_t and a_s, or, of value channels, into the output and d_s.
So each of the log2(C) sizes of pieces costs one matrix product, and the pairs of all
sizes together are the whole triangle. Exact for any keep in (0, 1], with no exponential
of a positive sum.

As D_ts is the exponential of a difference b_t - b_s of sums of logs, the derivative by
b is x dx at the reader and -a da at the writer, channel by channel: none of the factors
is differentiated (as in GLA, arXiv 2312.06635).
"""

from functools import partial
from operator import mul
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.product import Dot
from miras_jax.core.steps import DenseSteps, When
from miras_jax.core.sums import ChannelSums, halving
from pallas_kernels.fused_scan import platform


class ChannelSteps(NamedTuple):
    """`steps.Steps` with one keep per token and channel, by halving the block."""

    rows: ChannelSums | None  # of the key channels; None: none on that axis
    columns: ChannelSums | None  # of the value channels
    when: When
    rate: jax.Array | None = None  # [C, 1]

    def scaled(self, rate):
        return self._replace(rate=rate)

    def summed(self, sums):
        side, decay = ("out", self.columns) if self.rows is None else ("in", self.rows)
        mix = _summed_decay(decay.own, self.when, sums)
        return DenseSteps(mix, sums.T @ jnp.exp(decay.later), side)

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

    def _products(self, dot, x, a):
        """x_t^T D_ts a_s, D of the key axis and of s < t if it has any: `[C, C]`."""
        if self.rows is None:
            return dot.rows(x, a)
        return _by_size(dot, self.when, x, a, self.rows)

    def scores(self, dot, x, a):
        a = a if self.rate is None else a * self.rate
        own = jnp.asarray(np.eye(len(x)), x.dtype) * self._own(x, a)
        if len(x) == 1:
            return own
        earlier = jnp.asarray(np.tri(len(x), k=-1), x.dtype)
        products = self._products(dot, x, a)
        return own + (earlier * products if self.rows is None else products)

    def read(self, dot, x, a, d):
        if self.columns is None:
            return dot(self.scores(dot, x, a), d)
        a, d = self._narrow(a, d)
        own = self._own(x, a) * d
        if len(x) == 1:
            return own
        return own + _mixed(dot, self.when, self._products(dot, x, a), d, self.columns)

    def end(self, dot, a, d):
        a, d = self._narrow(a, d)
        if self.rows is not None:
            a = a * jnp.exp(self.rows.later)
        if self.columns is not None:
            d = d * jnp.exp(self.columns.later)
        return dot.columns(a, d)


# XLA:CPU takes one product of several matrices in less time than several products, and
# one array of factors without putting it together; kernels know no such arrays.


def _pairs(size, dtype):
    """The masks of the pairs of each size of pieces."""
    return [jnp.asarray(pairs, dtype) for pairs, _ in halving(size)]


def _split(products):
    """The pairs of each size of pieces, the others zero."""
    pairs = _pairs(len(products), products.dtype)
    if platform() is None:
        return jnp.stack(pairs) * products[None]
    return [each * products for each in pairs]


def _joined(products):
    """The pairs of all sizes, from the products of each."""
    pairs = _pairs(products[0].shape[0], products[0].dtype)
    return sum(map(mul, pairs, products))


def _kept(when, x, sums):
    """x_t with what is kept at t itself, unless it looks before its decay."""
    return x if when == "before" else x * jnp.exp(sums.own)


def _weighed(x, sums):
    """x_t with what is kept to the middle of its piece, for each size of pieces."""
    if platform() is None:
        return x[None] * sums.factors
    return [x, *(x * factor for factor in sums.factors)]


def _added(parts, sums):
    """The sum of the parts of each size, with what is kept to the middle."""
    if platform() is None:
        return sum(map(mul, parts, sums.factors))
    first, *others = parts
    return sum(map(mul, others, sums.factors), first)


def _each(product, xs, ys):
    return product(xs, ys) if platform() is None else list(map(product, xs, ys))


def _cotangent(when, at_reader, at_writer):
    """Of the sums, from what each channel is worth where it is read and written."""
    # Before its own decay a reader does not see it.
    own = -at_reader if when == "before" else None
    return ChannelSums(own, at_reader - at_writer, None, None, None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_size(dot: Dot, when: When, x: jax.Array, a: jax.Array, sums: ChannelSums):
    """x_t^T D_ts a_s of all s < t, D of the key axis: `[C, C]`."""
    return _by_size_forward(dot, when, x, a, sums)[0]


def _by_size_forward(dot, when, x, a, sums):
    readers = _weighed(_kept(when, x, sums), sums)
    products = _each(dot.rows, readers, _weighed(a, sums))
    return _joined(products), (x, a, sums)


def _by_size_backward(dot, when, residuals, cotangent):
    x, a, sums = residuals
    x = _kept(when, x, sums)
    d = _split(cotangent)
    dx = _added(_each(dot, d, _weighed(a, sums)), sums)
    da = _added(_each(dot.columns, d, _weighed(x, sums)), sums)
    return _kept(when, dx, sums), da, _cotangent(when, x * dx, a * da)


_by_size.defvjp(_by_size_forward, _by_size_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _mixed(dot: Dot, when: When, products, d: jax.Array, sums: ChannelSums):
    """sum_s D_ts products_ts d_s of all s < t, D of the value axis: `[C, V]`."""
    return _mixed_forward(dot, when, products, d, sums)[0]


def _mixed_forward(dot, when, products, d, sums):
    outputs = _added(_each(dot, _split(products), _weighed(d, sums)), sums)
    outputs = _kept(when, outputs, sums)
    return outputs, (products, d, sums, outputs)


def _mixed_backward(dot, when, residuals, cotangent):
    products, d, sums, outputs = residuals
    at_reader = outputs * cotangent
    each = _weighed(_kept(when, cotangent, sums), sums)
    d_products = _joined(_each(dot.rows, each, _weighed(d, sums)))
    dd = _added(_each(dot.columns, _split(products), each), sums)
    return d_products, dd, _cotangent(when, at_reader, d * dd)


_mixed.defvjp(_mixed_forward, _mixed_backward)


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
