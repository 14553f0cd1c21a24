"""What a retention gate is, and those whose weights are their dual: Keep, Decay."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.types import Choice
from miras_jax.errors import UserError


class Retention(Protocol):
    """What a rule needs of a retention gate."""

    is_identity: bool  # whether weights(A) = A
    rates: tuple[str, ...]  # the rates that it uses: keep, unless it never forgets
    channelwise: bool  # whether rates.keep may differ between channels
    axis: str  # "key", "value" or "both": where keep acts on a single matrix

    def weights(self, dual: jax.Array) -> jax.Array: ...

    def initial(self, weights: jax.Array) -> jax.Array:
        """What `params.weights` start from, given a memory's plain initial weights."""

    def dual(self, weights: jax.Array) -> jax.Array:
        """A_0 from the learned initial weights `params.weights`."""

    def scale(self, dual: jax.Array) -> jax.Array:
        """Frozen factor s of the linear readout W_s = K_s W_c + s U_s.

        One number, or one for each output, `[1, out]`.
        """

    proportional: bool  # whether weights(A) = scale(A) A, with one number for A

    def scales(self, duals: Sequence[jax.Array], sizes: jax.Array) -> jax.Array:
        """scale(size A) of each of several A with |A|_2 at most 1: `[n, 1]`, as sizes.

        Asked of proportional gates.
        """

    def read(
        self, product: Callable[[jax.Array], jax.Array], dual: jax.Array, inputs: int
    ) -> jax.Array:
        """x weights(dual) of a product(M) = x M, which sums over the axis `inputs`."""

    transposed: "Retention | None"  # the same map of transposed matrices, if there is

    settles: bool  # whether settle does anything

    def settle(self, anchor: jax.Array, dual: jax.Array) -> jax.Array:
        """The dual at a chunk's end, from the one at its start and K A_c + U."""


class Gate(Choice):
    """What most gates have in common."""

    is_identity = False
    rates = ("keep",)
    channelwise = True
    axis = "key"
    proportional = False
    transposed = None

    @property
    def settles(self):
        return type(self).settle is not Gate.settle

    def scales(self, duals, sizes):
        masks = [
            jnp.asarray(column, sizes.dtype)
            for column in np.eye(len(duals))[:, :, None]
        ]
        pairs = zip(masks, duals, strict=True)
        return sum(one * self.scale(jnp.sum(one * sizes) * a) for one, a in pairs)

    def read(self, product, dual, inputs):
        return product(self.weights(dual))

    def initial(self, weights):
        return weights

    def settle(self, anchor, dual):
        return dual


class Identity(Gate):
    """Weights and dual are the same."""

    is_identity = True
    proportional = True

    def weights(self, dual):
        return dual

    def dual(self, weights):
        return weights

    def scale(self, dual):
        return jnp.ones((), dual.dtype)


@dataclass(frozen=True, repr=False)
class Keep(Identity):
    """No forgetting: W_s = W_{s-1} + step_s; `rates.keep` is not used."""

    rates = ()


@dataclass(frozen=True, repr=False)
class Decay(Identity):
    """L2 retention: W_s = keep_s W_{s-1} + step_s (Miras, eq. 26; Titans, eq. 13).

    keep is scalar or channel-wise; on a memory of a single matrix the channels are
    those of the "key" (GLA) or of the "value" axis. With "both", entry (i, j) is kept
    by keep_i keep_value_j (DFW): `keep` acts on the inputs of the memory, the rate
    `keep_value` on its outputs, each scalar or channel-wise.
    """

    axis: Literal["key", "value", "both"] = "key"

    def __post_init__(self):
        if self.axis not in ("key", "value", "both"):
            raise UserError(
                "retention.Decay(axis=...) is 'key', 'value' or 'both'; "
                f"got {self.axis!r}."
            )

    @property
    def rates(self):
        return ("keep", "keep_value") if self.axis == "both" else ("keep",)
