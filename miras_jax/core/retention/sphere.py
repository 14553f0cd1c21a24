"""Weight normalisation: what is retained of the weights is their norm."""

from dataclasses import dataclass

import jax.numpy as jnp

from miras_jax.core.retention.gate import Identity


@dataclass(frozen=True, repr=False)
class Sphere(Identity):
    """Each output unit's weights return to the norm they started from, chunk by chunk.

    W = A |A_c| / |A|, norms over the inputs of a unit: the projection on a product of
    spheres with the radii of W_0 (L2norm of LaCT, arXiv 2505.23884, section 3.1, which
    restores the initial norms). Nothing else is forgotten; rates.keep is not used. A
    unit of zeros stays one.
    """

    is_identity = False
    rates = ()

    def settle(self, anchor, dual):
        before, after = (jnp.sum(x * x, axis=0, keepdims=True) for x in (anchor, dual))
        gone = (before == 0) | (after == 0)
        ratio = jnp.where(gone, 1, before) / jnp.where(gone, 1, after)
        return dual * jnp.where(gone, 0, jnp.sqrt(ratio))
