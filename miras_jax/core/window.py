"""The pairs of a block together with those that the window still holds from before."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.product import prefix_sum
from miras_jax.core.types import Past, Weights


def empty(window: int, start: Weights, entries: int) -> Past | tuple[()]:
    """Before the first token: pairs of no weight. () if the window is the token's."""
    if window == 1:
        return ()
    value_dim = start[-1].shape[1]
    key_dim = start[0].shape[0] if entries else value_dim
    length, dtype = window - 1, start[0].dtype
    nothing = jnp.zeros((length, value_dim), dtype)
    keys = jnp.zeros((length, key_dim), dtype)
    return Past(keys, nothing, nothing, jnp.ones_like(nothing))


def slide(past: Past, key, value, learn, threshold) -> tuple[tuple, Past]:
    """One token further: the pairs that it learns from, and the next one's past."""
    wide = jnp.ones_like(value)
    rates = learn * wide, wide if threshold is None else threshold * wide
    last = Past(key, value, *rates)
    keys, values, learns, thresholds = (
        jnp.concatenate([rows, row[None]]) for rows, row in zip(past, last, strict=True)
    )
    past = Past(keys[1:], values[1:], learns[1:], thresholds[1:])
    if learn.ndim == 0:
        learns = jnp.mean(learns, axis=1)
    return (keys, values, learns, None if threshold is None else thresholds), past


class Window(NamedTuple):
    """Rows of a block's C tokens followed by those of the past, n in all.

    sums `[C, n]` says whose pairs each token learns from, next `[window - 1, n]` whose
    the next block's will still need. Both count written tokens alone, so that those
    that leave no trace take no place in a window.
    """

    sums: jax.Array
    next: jax.Array

    def rows(self, past: jax.Array, block: jax.Array) -> jax.Array:
        """`[window - 1, channels]` and `[C, channels]` as `[n, channels]`.

        A rate of one number per token is kept with equal channels; their mean is it.
        """
        if block.shape[1] < past.shape[1]:
            past = jnp.mean(past, axis=1, keepdims=True)
        return jnp.concatenate([block, past])

    def ending(self, rows: jax.Array, channels: int) -> jax.Array:
        """The last window - 1 of the rows, with so many channels."""
        return prefix_sum(self.next, rows) * jnp.ones((1, channels), rows.dtype)


def window(width: int, written: jax.Array) -> Window:
    """The window over a block of which `written` `[C, 1]` says who leaves a trace."""
    kept, size = width - 1, len(written)
    dtype = written.dtype
    place = Window(jnp.zeros(()), jnp.zeros(()))
    before = jnp.asarray(np.arange(1 - kept, 1)[:, None], dtype)
    count = prefix_sum(np.tri(size), written)
    order = place.rows(before, count).T
    real = place.rows(jnp.ones_like(before), written).T
    near = (order <= count) & (order > count - width)
    end = jnp.sum(written) + before
    return Window(
        sums=jnp.where(near, real * written, 0),
        next=jnp.where(order == end, real, 0),
    )
