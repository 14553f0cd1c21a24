"""Retention gates: a linear recurrence of a dual state and a map from dual to weights.

    A_s = keep_s A_{s-1} + step_s          W_s = weights(A_s)

Each method takes and gives one matrix `[in, out]` of the memory.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp

from miras_jax.core.types import Choice
from miras_jax.errors import UserError


class Retention(Protocol):
    """What a rule needs of a retention gate."""

    is_identity: bool  # whether weights(A) = A
    rates: tuple[str, ...]  # the rates that it uses: keep, unless it never forgets
    channelwise: bool  # whether rates.keep may differ between channels
    axis: str  # "key" or "value": where a channel-wise keep acts on a single matrix

    def weights(self, dual: jax.Array) -> jax.Array: ...

    def initial(self, weights: jax.Array) -> jax.Array:
        """What `params.weights` start from, given a memory's plain initial weights."""

    def dual(self, weights: jax.Array) -> jax.Array:
        """A_0 from the learned initial weights `params.weights`."""

    def scale(self, dual: jax.Array) -> jax.Array:
        """Frozen factor s of the linear readout W_s = K_s W_c + s U_s."""


class _Identity(Choice):
    """Weights and dual are the same."""

    is_identity = True
    rates = ("keep",)
    channelwise = True
    axis = "key"

    def initial(self, weights):
        return weights

    def weights(self, dual):
        return dual

    def dual(self, weights):
        return weights

    def scale(self, dual):
        return jnp.ones((), dual.dtype)


@dataclass(frozen=True, repr=False)
class Keep(_Identity):
    """No forgetting: W_s = W_{s-1} + step_s; `rates.keep` is not used."""

    rates = ()


@dataclass(frozen=True, repr=False)
class Decay(_Identity):
    """L2 retention: W_s = keep_s W_{s-1} + step_s (Miras, eq. 26; Titans, eq. 13).

    keep is scalar or channel-wise; on a memory of a single matrix the channels are
    those of the "key" (GLA) or of the "value" axis.
    """

    axis: Literal["key", "value"] = "key"

    def __post_init__(self):
        if self.axis not in ("key", "value"):
            raise UserError(
                f"retention.Decay(axis=...) is 'key' or 'value'; got {self.axis!r}."
            )


def q_norm(x: jax.Array, q: float) -> jax.Array:
    """|x|_q over all entries, with the largest taken out so that no power overflows."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    largest = jnp.where(largest > 0, largest, 1)
    total = jnp.sum((jnp.abs(x) / largest) ** q)
    return largest * jnp.where(total > 0, total, 1) ** (1 / q)


@dataclass(frozen=True, repr=False)
class Lq(Choice):
    """L_q memory stability (Miras, section 5.2.4 and eq. 24), Moneta's gate.

    "paper"   W = A / |A|_q^(q-2), as printed; of degree 3 - q: at q = 4 doubling A
              halves W. At q = 3 only the direction of A counts, and W_0 is the learned
              initial weight divided by its norm.
    "mirror"  W = Sign(A) |A|^(q-1) / |A|_q^(q-2), the exact map of the regulariser
              |W|_p^2 / 2 with 1/p + 1/q = 1, whose element-wise power the print
              dropped; of degree 1.

    Norms are per matrix and head. A_0 is the inverse of the map at the initial weights.
    """

    q: float = 4.0
    form: Literal["paper", "mirror"] = "paper"

    is_identity = False
    rates = ("keep",)
    channelwise = True
    axis = "key"

    def __post_init__(self):
        if self.form not in ("paper", "mirror"):
            raise UserError(
                f"retention.Lq(form=...) is 'paper' or 'mirror'; got {self.form!r}."
            )
        if self.q <= 1:
            raise UserError(f"retention.Lq needs q > 1; got q={self.q}.")

    def initial(self, weights):
        return weights

    def weights(self, dual):
        direction = dual / q_norm(dual, self.q) ** (self.q - 2)
        if self.form == "paper":
            return direction
        return (
            jnp.sign(dual)
            * _power(dual, self.q - 1)
            / _power(q_norm(dual, self.q), self.q - 2)
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
        size = q_norm(dual, self.q)
        if self.form == "paper":
            return size ** (2 - self.q)
        # The scalar s that brings s A closest to W: <A, W> / <A, A>.
        return size**2 / jnp.sum(jnp.square(dual))


def _power(x: jax.Array, exponent: float) -> jax.Array:
    """|x|^exponent, with derivative zero instead of infinite at zero."""
    size = jnp.abs(x)
    return jnp.where(size > 0, jnp.where(size > 0, size, 1) ** exponent, 0)


@dataclass(frozen=True, repr=False)
class KL(Choice):
    """Weights on a scaled simplex: W = mass softmax(A) along `axis` (Miras, eq. 27).

    The dual is the logarithm of the weights up to one constant per slice, which the
    softmax removes; so Memora's W_s = softmax(keep_s log W_{s-1} + step_s) is exactly
    the linear recurrence A_s = keep_s A_{s-1} + step_s, with no lag token, as long as
    keep is constant inside a slice: it must be one number per token. `params.weights`
    are logits. `axis` is 0 (each output unit takes a weighted mean of its inputs), 1 or
    -1.
    """

    mass: float = 1.0
    axis: int = 0

    is_identity = False
    rates = ("keep",)
    channelwise = False

    def __post_init__(self):
        if self.axis not in (0, 1, -1):
            raise UserError(
                "retention.KL(axis=...) is 0 (inputs) or 1 (outputs); "
                f"got {self.axis!r}."
            )
        if self.mass <= 0:
            raise UserError(f"retention.KL needs mass > 0; got mass={self.mass}.")

    def initial(self, weights):
        # Logits of unit variance: nearly equal ones would make every output unit the
        # same mean, and a norm behind it would divide by almost nothing.
        rms = jnp.sqrt(jnp.mean(jnp.square(weights)))
        return weights / jnp.where(rms > 0, rms, 1)

    def weights(self, dual):
        return self.mass * jax.nn.softmax(dual, axis=self.axis)

    def dual(self, weights):
        return weights

    def scale(self, dual):
        return jnp.full((), self.mass / dual.shape[self.axis], dual.dtype)
