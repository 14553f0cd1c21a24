"""Arrays outside the registers that are made of others."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from pallas_kernels.fused_scan.tiles import Memory, Piece


@dataclass(frozen=True)
class Row:
    """A `Memory`: row i of another."""

    memory: Memory
    i: jax.Array

    def load(self, place):
        tile = self.memory.load((Piece(self.i, 1, 1), *place))
        return tile.reshape(tile.shape[1:])

    def store(self, place, tile):
        self.memory.store((Piece(self.i, 1, 1), *place), tile[None])


@dataclass(frozen=True)
class Value:
    """A `Memory` that holds a number."""

    literal: Literal

    def load(self, place):
        return jnp.asarray(self.literal.val, self.literal.aval.dtype)


@dataclass(frozen=True)
class Part:
    """A `Memory`: what another has from a place on."""

    memory: Memory
    start: tuple[int, ...]

    def load(self, place):
        return self.memory.load(self._moved(place))

    def store(self, place, tile):
        self.memory.store(self._moved(place), tile)

    def _moved(self, place):
        pairs = zip(place, self.start, strict=True)
        return tuple(p._replace(start=p.start + first) for p, first in pairs)
