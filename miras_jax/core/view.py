"""A token's own matrix, and a token's row among those of others."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.core.product import column
from miras_jax.core.retention import Retention
from pallas_kernels.fused_scan import platform


class View(NamedTuple):
    """How the matrices of tokens are laid out: as they are, or transposed.

    A matrix with more inputs than outputs leaves lanes of a TPU idle that its transpose
    fills, and makes deeper products (`together.py`).
    """

    gate: Retention
    is_turned: bool

    @staticmethod
    def of(rule, dual) -> "View":
        gate = rule.retention
        plain = not rule.settles and gate.transposed is not None
        if platform() and plain and dual.shape[0] > dual.shape[1]:
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


def alone(one: jax.Array, x: jax.Array) -> jax.Array:
    """The row of x that the mask shows, for a product of it alone.

    Kernels multiply all rows, the others zero, which is what matrix units are fed with.
    """
    return row(one, x) if platform() is None else one * x


def row(one: jax.Array, x: jax.Array) -> jax.Array:
    """The row of x that the mask `[C, 1]` shows: `[1, n]`."""
    return jnp.sum(one * x, axis=0, keepdims=True)
