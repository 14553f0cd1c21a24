"""The elastic net: weights that are exactly zero (Miras, section 5.2.2 and 5.2.3)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from miras_jax.core.retention.gate import Gate
from miras_jax.errors import UserError

NEWTON_STEPS = 30


@dataclass(frozen=True, repr=False)
class ElasticNet(Gate):
    """Soft thresholding S(z) = Sign(z) max(0, |z| - threshold), hard forgetting.

    "proximal"  A is the weights themselves and becomes S(A) where a chunk ends: with
                chunks of one token W_t = S(keep W_{t-1} - learn gradient) (eq. 22)
    "lazy"      W = S(A), A a decaying sum of the steps (eq. 23, follow the regularised
                leader); A_0 is the initial weight plus the threshold

    smooth: |z| arctan(z / threshold) 2 / pi instead of S, as the paper offers, which
    gives the outer loop a derivative also at entries near zero.
    """

    form: Literal["proximal", "lazy"] = "proximal"
    threshold: float = 0.001
    smooth: bool = False

    def __post_init__(self):
        if self.form not in ("proximal", "lazy"):
            raise UserError(
                f"retention.ElasticNet(form=...) is 'proximal' or 'lazy'; "
                f"got {self.form!r}."
            )
        if self.threshold <= 0:
            raise UserError(
                f"retention.ElasticNet needs threshold > 0; got {self.threshold}. "
                "Without one it is retention.Decay()."
            )

    @property
    def settles(self):
        return self.form == "proximal"

    def shrink(self, z: jax.Array) -> jax.Array:
        """S(z), or its smooth surrogate."""
        if self.smooth:
            return jnp.abs(z) * jnp.arctan2(z, self.threshold) * (2 / jnp.pi)
        return jnp.sign(z) * jnp.maximum(0, jnp.abs(z) - self.threshold)

    def weights(self, dual):
        return dual if self.form == "proximal" else self.shrink(dual)

    def settle(self, anchor, dual):
        return self.shrink(dual) if self.form == "proximal" else dual

    def dual(self, weights):
        if self.form == "proximal":
            return weights
        guess = weights + self.threshold * jnp.sign(weights)
        return self._unshrink(weights, guess) if self.smooth else guess

    def _unshrink(self, weights, guess):
        """The inverse of the smooth S by Newton's method, with its exact derivative."""

        def improve(z, target):
            value, slope = jax.jvp(self.shrink, (z,), (jnp.ones_like(z),))
            flat = slope == 0
            return z - jnp.where(flat, 0, (value - target) / jnp.where(flat, 1, slope))

        target, z = jax.lax.stop_gradient((weights, guess))
        z = jax.lax.fori_loop(0, NEWTON_STEPS, lambda _, z: improve(z, target), z)
        z = jax.lax.stop_gradient(z)
        slope = jax.jvp(self.shrink, (z,), (jnp.ones_like(z),))[1]
        flat = slope == 0
        correction = (weights - self.shrink(z)) / jnp.where(flat, 1, slope)
        return z + jnp.where(flat, 0, correction)

    def scale(self, dual):
        return jnp.ones((), dual.dtype)
