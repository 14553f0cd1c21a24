"""Gates that keep weights on a scaled simplex (Miras, section 5.2.1 and eq. 27)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.core.product import row
from miras_jax.core.retention.gate import Gate
from miras_jax.errors import UserError


def _check_simplex(gate) -> None:
    name = f"retention.{type(gate).__name__}"
    if gate.axis not in (0, 1, -1):
        raise UserError(
            f"{name}(axis=...) is 0 (inputs) or 1 (outputs); got {gate.axis!r}."
        )
    if gate.mass <= 0:
        raise UserError(f"{name} needs mass > 0; got mass={gate.mass}.")


def _logits(weights: jax.Array) -> jax.Array:
    # Of unit variance: nearly equal ones would make every output unit the same mean,
    # and a norm behind it would divide by almost nothing.
    rms = jnp.sqrt(jnp.mean(jnp.square(weights)))
    return weights / jnp.where(rms > 0, rms, 1)


@dataclass(frozen=True, repr=False)
class KL(Gate):
    """Weights on a scaled simplex: W = mass softmax(A) along `axis` (Miras, eq. 27).

    The dual is the logarithm of the weights up to one constant per slice, which the
    softmax removes; so Memora's W_s = softmax(keep_s log W_{s-1} + step_s) is exactly
    the linear recurrence A_s = keep_s A_{s-1} + step_s, with no lag token, as long as
    keep is constant inside a slice: it must be one number per token. `params.weights`
    are logits, of standard deviation `spread` at first. `axis` is 0 (each output unit
    takes a weighted mean of its inputs), 1 or -1.
    """

    mass: float = 1.0
    axis: int = 0
    spread: float = 1.0

    channelwise = False

    def __post_init__(self):
        _check_simplex(self)
        if self.spread < 0:
            raise UserError(f"retention.KL needs spread >= 0; got {self.spread}.")

    def initial(self, weights):
        return self.spread * _logits(weights)

    @property
    def transposed(self):
        return replace(self, axis=1 if self.axis == 0 else 0)

    def read(self, product, dual, inputs):
        if self.axis % 2 != inputs:
            return product(self.weights(dual))
        # What divides is one number per output unit.
        highest = jnp.max(dual, axis=inputs, keepdims=True)
        exponentials = jnp.exp(dual - jax.lax.stop_gradient(highest))
        total = jnp.sum(exponentials, axis=inputs, keepdims=True)
        return product(exponentials) * (self.mass / (row(total) if inputs else total))

    def weights(self, dual):
        return self.mass * jax.nn.softmax(dual, axis=self.axis)

    def dual(self, weights):
        return weights

    def scale(self, dual):
        return jnp.full((), self.mass / dual.shape[self.axis], dual.dtype)


class _Generator(NamedTuple):
    """Of an f-divergence: h(y) = g(y + f'(1)), the pole of h, and f''(1)."""

    inverse: Callable[[jax.Array], jax.Array]
    pole: float
    curvature: float


def _below_one(y: jax.Array) -> jax.Array:
    """1 - y, for y that rounding may have brought to the pole."""
    return jnp.maximum(1 - y, jnp.finfo(y.dtype).eps)


_GENERATORS = {
    # No pole, but beyond 80 float32 would overflow.
    "kl": _Generator(jnp.exp, 80.0, 1.0),
    "reverse_kl": _Generator(lambda y: 1 / _below_one(y), 1.0, 1.0),
    "chi_square": _Generator(lambda y: jnp.maximum(0, 1 + y / 2), jnp.inf, 2.0),
    "hellinger": _Generator(lambda y: _below_one(y) ** -2, 1.0, 0.5),
}


@dataclass(frozen=True, repr=False)
class FDivergence(Gate):
    """W = W_c * g(U - zeta) on a scaled simplex (Miras, eq. 18), U the chunk's steps.

    g inverts the derivative of the generator f of the divergence sum W_c f(W / W_c),
    and the multiplier zeta, one per slice along `axis`, keeps the slice's sum at
    `mass`. The gate forgets nothing, it only measures distance: rates.keep is not used.

        "kl"          f = t log t         g(y) = exp(y - 1)
        "reverse_kl"  f = -log t          g(y) = -1 / y, y < 0
        "chi_square"  f = (t - 1)^2       g(y) = max(0, 1 + y / 2)
        "hellinger"   f = (sqrt t - 1)^2  g(y) = (1 - y)^-2, y < 1

    "kl" is `KL` without forgetting; under "chi_square" a weight that reaches zero stays
    there. zeta is found by bisection; its derivatives are those of the equation that
    it solves. `params.weights` are logits of W_0.
    """

    generator: Literal["kl", "reverse_kl", "chi_square", "hellinger"] = "kl"
    mass: float = 1.0
    axis: int = 0

    rates = ()
    channelwise = False

    def __post_init__(self):
        if self.generator not in _GENERATORS:
            raise UserError(
                f"retention.FDivergence knows {', '.join(_GENERATORS)}; "
                f"got {self.generator!r}."
            )
        _check_simplex(self)

    def initial(self, weights):
        return _logits(weights)

    def weights(self, dual):
        return dual

    def dual(self, weights):
        return self.mass * jax.nn.softmax(weights, axis=self.axis)

    def scale(self, dual):
        # Near no step at all, W = W_c (1 + (U - its mean) / f''(1)).
        mean = self.mass / dual.shape[self.axis]
        return jnp.full((), mean / _GENERATORS[self.generator].curvature, dual.dtype)

    def settle(self, anchor, dual):
        # W = W_c h(U - x), h(y) = g(y + f'(1)), hence h(0) = 1, and x = zeta + f'(1),
        # counted from the largest entry of U. At x = 0 every factor is at most one, so
        # that the sum is at most the mass; at minus the spread of U every factor is at
        # least one, and where h has a pole, the sum grows without bound before that.
        generator = _GENERATORS[self.generator]
        steps = dual - anchor
        # A weight that has vanished stays so, and must not set the scale.
        alive = anchor > jnp.finfo(anchor.dtype).tiny
        counted = jax.lax.stop_gradient(jnp.where(alive, steps, -jnp.inf))
        highest = jnp.max(counted, axis=self.axis, keepdims=True)
        steps = jnp.where(alive, steps - highest, 0)
        spread = -jnp.min(steps, axis=self.axis, keepdims=True)

        def total(x):
            factors = generator.inverse(steps - x)
            return jnp.sum(anchor * factors, axis=self.axis, keepdims=True)

        def halve(_, bounds):
            low, high = bounds
            middle = (low + high) / 2
            too_much = total(middle) > self.mass
            return jnp.where(too_much, middle, low), jnp.where(too_much, high, middle)

        low = -jnp.minimum(spread, generator.pole)
        bounds = jax.lax.stop_gradient((low, jnp.zeros_like(low)))
        rounds = jnp.finfo(dual.dtype).nmant + 4
        x = jax.lax.stop_gradient(jax.lax.fori_loop(0, rounds, halve, bounds)[1])
        # A step of Newton's method, whose derivative is that of the implicit function.
        slope = jax.lax.stop_gradient(jax.jvp(total, (x,), (jnp.ones_like(x),))[1])
        newton = (total(x) - self.mass) / jnp.where(slope < 0, slope, -jnp.inf)
        # Where a weight of nearly nothing must grow by more than x can resolve, x is at
        # its bound, such a step would overflow, and the mass is made up for below.
        is_short = jnp.abs(newton) <= 1e-3 * jnp.maximum(1, -low)
        x = x - jnp.where(is_short, newton, 0)
        weights = anchor * generator.inverse(steps - x)
        return weights * (self.mass / jnp.sum(weights, axis=self.axis, keepdims=True))
