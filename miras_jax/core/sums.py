"""Sums of the logarithms of keep over a block: all that a decay is made of.

What a gate keeps between two moments of a block is the exponential of a difference of
running sums. They are taken once for all that reads and writes in the block, so that
the derivative by keep takes one sum, too.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.product import column, prefix_sum
from pallas_kernels.fused_scan import platform


class TokenSums(NamedTuple):
    """Of one keep per token."""

    own: jax.Array  # log keep_t: [C, 1]
    seen: jax.Array  # of all tokens up to t: [C, 1]
    pairs: jax.Array  # of those after s and up to t: [C, C]
    later: jax.Array  # of all after t: [C, 1]
    total: jax.Array  # of all: [1, 1]


class ChannelSums(NamedTuple):
    """Of one keep per token and channel."""

    own: jax.Array  # [C, channels]
    seen: jax.Array
    later: jax.Array
    total: jax.Array  # [1, channels]
    # Kept from t to its piece's middle: [C, channels] each, but not of pieces of two;
    # on CPU [sizes, C, channels].
    factors: tuple[jax.Array, ...] | jax.Array


Sums = TokenSums | ChannelSums


def sums(keep: jax.Array, precision: jnp.dtype = jnp.float32) -> Sums:
    """The sums of log keep, `[C, 1 or channels]`, for products of that precision."""
    own = safe_log(keep)
    if own.shape[1] > 1:
        seen, later, total = _running(precision, own)
        between = [between for _, between in halving(len(own))]
        if platform() is None and between:
            kept = jnp.exp(prefix_sum(np.concatenate(between), own, precision))
            factors = kept.reshape(-1, *own.shape)
        else:
            factors = tuple(
                jnp.exp(prefix_sum(each, own, precision)) for each in between[1:]
            )
        return ChannelSums(own, seen, later, total, factors)
    upto = jnp.asarray(np.tri(len(own)).T, own.dtype)
    row = jnp.sum(upto * own, axis=0, keepdims=True)
    seen, total = column(row), jnp.sum(own, axis=0, keepdims=True)
    return TokenSums(own, seen, seen - row, total - seen, total)


def safe_log(rate: jax.Array) -> jax.Array:
    """log(rate), with its gradient finite also where a rate in [0, 1] is about zero.

    Rates below eps^2 count as eps^2, which leaves no trace of what was before. The
    gradient of the log is a difference of sums, true to eps of them, and is divided by
    the rate: at the smallest numbers that gives infinities, and 0 * inf behind a max.
    """
    return jnp.log(jnp.maximum(rate, jnp.finfo(rate.dtype).eps ** 2))


def halving(size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """0/1 masks of a block that is halved again and again, pieces of two tokens first.

    Of each size of pieces: the pairs `[C, C]` in the two halves of a piece, and the
    tokens `[C, C]` whose keep lies between token t and the middle of its piece, its own
    left out: none in pieces of two.
    """
    rows = np.arange(size)[:, None]
    columns = rows.T
    masks = []
    for half in (2**i for i in range((size - 1).bit_length())):
        second = (rows // half) % 2 == 1
        middle = (rows // half + 1 - second) * half
        as_reader = (columns >= middle) & (columns < rows)
        as_writer = (columns > rows) & (columns < middle)
        same = rows // (2 * half) == columns // (2 * half)
        pairs = same & second & ~second.T
        masks.append((pairs, np.where(second, as_reader, as_writer)))
    return masks


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _running(precision, own: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums up to each token, of all after it, and of all."""
    seen, later = (
        prefix_sum(selection, own, precision)
        for selection in (np.tri(len(own)), np.tri(len(own), k=-1).T)
    )
    return seen, later, jnp.sum(own, axis=0, keepdims=True)


def _running_forward(precision, own):
    return _running(precision, own), None


def _running_backward(precision, _, d):
    # What is not later than t is seen by t: one sum for both.
    seen, later, total = d
    everywhere = total + jnp.sum(later, axis=0, keepdims=True)
    return (prefix_sum(np.tri(len(seen)).T, seen - later) + everywhere,)


_running.defvjp(_running_forward, _running_backward)
