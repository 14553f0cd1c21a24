"""Gates whose weights are a map of the dual: mirror descent (Miras, section 5.2)."""

from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from miras_jax.core.product import total, totals
from miras_jax.core.retention.gate import Gate
from miras_jax.core.types import Choice
from miras_jax.errors import UserError


def q_norm(x: jax.Array, q: float) -> jax.Array:
    """|x|_q over all entries, scaled by |x|_2 so that no power overflows.

    `[1, 1]`, as all of these: vectors are what a kernel can take powers of. A norm of
    zero counts as 1.
    """
    square = jax.lax.stop_gradient(total(x * x))
    scale = jnp.where(square > 0, square, 1) ** 0.5
    return scale * _root(total(_raised(x * (1 / scale), q)), q)


def _raised(x: jax.Array, q: float) -> jax.Array:
    """|x|^q, by products where q is whole."""
    return (x if q % 2 == 0 else jnp.abs(x)) ** (int(q) if q == int(q) else q)


def _root(powers: jax.Array, q: float) -> jax.Array:
    return jnp.where(powers > 0, powers, 1) ** (1 / q)


SMALLEST_NORM = 1e-9
"""Of a dual, in the printed form of `Lq`: what holds its weights below 1e9."""


@dataclass(frozen=True, repr=False)
class Lq(Gate):
    """L_q memory stability (Miras, section 5.2.4 and eq. 24), Moneta's gate.

    "paper"   W = A / |A|_q^(q-2), as printed; of degree 3 - q: at q = 4 doubling A
              halves W. At q = 3 only the direction of A counts, and W_0 is the learned
              initial weight divided by its norm.
    "mirror"  W = Sign(A) |A|^(q-1) / |A|_q^(q-2), the exact map of the regulariser
              |W|_p^2 / 2 with 1/p + 1/q = 1, whose element-wise power the print
              dropped; of degree 1.

    Norms are per matrix and head. A_0 is the inverse of the map at the initial weights.
    As printed, W grows without bound while A fades, and behind a LayerNorm, where
    larger weights have smaller gradients, nothing stops it: |A| counts as 1e-9 or more.
    """

    q: float = 4.0
    form: Literal["paper", "mirror"] = "paper"

    def __post_init__(self):
        if self.form not in ("paper", "mirror"):
            raise UserError(
                f"retention.Lq(form=...) is 'paper' or 'mirror'; got {self.form!r}."
            )
        if self.q <= 1:
            raise UserError(f"retention.Lq needs q > 1; got q={self.q}.")

    @property
    def proportional(self):
        return self.form == "paper"

    @property
    def transposed(self):
        return self

    def read(self, product, dual, inputs):
        # What divides is one number, and the product is smaller than the matrix.
        power = dual
        if self.form == "mirror":
            power = jnp.sign(dual) * _power(dual, self.q - 1)
        return product(power) / _power(self._norm(dual), self.q - 2)

    def weights(self, dual):
        if self.form == "paper":
            return dual / self._norm(dual) ** (self.q - 2)
        return (
            jnp.sign(dual)
            * _power(dual, self.q - 1)
            / _power(self._norm(dual), self.q - 2)
        )

    def dual(self, weights):
        if self.form == "mirror":
            p = self.q / (self.q - 1)
            power = _power(weights, p - 1) / _power(q_norm(weights, p), p - 2)
            return jnp.sign(weights) * power
        if self.q == 3:
            return weights
        # |W| = |A|^(3-q), hence A = W |A|^(q-2) = W |W|^((q-2)/(3-q)).
        return weights * q_norm(weights, self.q) ** ((self.q - 2) / (3 - self.q))

    def scale(self, dual):
        size = self._norm(dual)
        if self.form == "paper":
            return size ** (2 - self.q)
        # The scalar s that brings s A closest to W: <A, W> / <A, A>.
        return size**2 / jnp.sum(jnp.square(dual), keepdims=True)

    def scales(self, duals, sizes):
        if self.q > 4:
            # Powers of what is far below its bound could vanish.
            norms = totals([q_norm(a, self.q) for a in duals])
        else:
            norms = _root(totals([_raised(a, self.q) for a in duals]), self.q)
        return jnp.maximum(sizes * norms, SMALLEST_NORM) ** (2 - self.q)

    def _norm(self, dual):
        norm = q_norm(dual, self.q)
        return jnp.maximum(norm, SMALLEST_NORM) if self.form == "paper" else norm


def _power(x: jax.Array, exponent: float) -> jax.Array:
    """|x|^exponent, with derivative zero instead of infinite at zero."""
    size = jnp.abs(x)
    return jnp.where(size > 0, jnp.where(size > 0, size, 1) ** exponent, 0)


class Link(Protocol):
    """An increasing map from dual to weights, entry by entry."""

    def weights(self, dual: jax.Array) -> jax.Array: ...

    def dual(self, weights: jax.Array) -> jax.Array:
        """A_0 from `params.weights`: the inverse map, or whatever starts W_0."""

    def slope(self, dual: jax.Array) -> jax.Array:
        """Derivative of `weights`, entry by entry."""


@dataclass(frozen=True, repr=False)
class Sigmoid(Choice):
    """W = 1 / (1 + exp(-A)): weights stay in (0, 1); `params.weights` are logits."""

    def weights(self, dual):
        return jax.nn.sigmoid(dual)

    def dual(self, weights):
        return weights

    def slope(self, dual):
        return jax.nn.sigmoid(dual) * jax.nn.sigmoid(-dual)


@dataclass(frozen=True, repr=False)
class SignedPower(Choice):
    """W = Sign(A) |A|^power, the link of f = |w|^(1 + 1 / power); power 1 is plain."""

    power: float = 2.0

    def __post_init__(self):
        if self.power <= 0:
            raise UserError(f"SignedPower needs power > 0; got {self.power}.")

    def weights(self, dual):
        return jnp.sign(dual) * _power(dual, self.power)

    def dual(self, weights):
        return jnp.sign(weights) * _power(weights, 1 / self.power)

    def slope(self, dual):
        return self.power * _power(dual, self.power - 1)


@dataclass(frozen=True, repr=False)
class Bregman(Gate):
    """W = g(A), g the inverse of F' (Miras, section 5.2.5): mirror descent on F.

    With keep = 1 the printed W_t = g(F'(W_{t-1}) - learn gradient); forgetting acts on
    the dual. `link` is g: `Sigmoid()`, `SignedPower(p)` or any `Link`. The linear
    readout takes its mean slope.
    """

    link: Link = Sigmoid()

    @property
    def transposed(self):
        return self

    def weights(self, dual):
        return self.link.weights(dual)

    def dual(self, weights):
        return self.link.dual(weights)

    def scale(self, dual):
        return jnp.mean(self.link.slope(dual))
