"""What a program of a GPU kernel does with tiles, in Triton's terms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.fused_scan.autodiff import Operand
from pallas_kernels.fused_scan.layout import Layout, Tuning
from pallas_kernels.fused_scan.program import Function, Struct
from pallas_kernels.fused_scan.tiles import Piece, axes


def remainder(i: jax.Array, n: int) -> jax.Array:
    """i % n for i >= 0, without the select for negative ones that `%` would bring."""
    return jax.lax.rem(i, jnp.asarray(n, i.dtype))


class Element:
    """The `tiles.Machine` of one program, and the number of the element it works on.

    Addresses depend on nothing else inside a chunk. Were the number a constant, the
    compilers would compute the addresses of all scratch arrays once, before the loop
    over chunks, and spill them: there are several times as many as registers. So zero
    is read from memory and added at every barrier; as it was read, it is also the row
    of what all elements share.
    """

    def __init__(self, zero, interpret, tuning: Tuning):
        self.zero, self.interpret, self.tile = zero, interpret, tuning.tile
        self.first = self.number = None if zero is None else pl.program_id(0)
        self.origin = 0

    def multiply(self, left, right, precision, dtype) -> jax.Array:
        """See `tiles.Machine`."""
        if self.interpret or left.dtype != right.dtype:
            # A unit takes operands of one kind, and in interpret mode only wide ones.
            left, right = left.astype(dtype), right.astype(dtype)
        if not self.interpret and left.dtype == jnp.float32 and precision is not None:
            # The plain form would not use the matrix unit.
            precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        return jax.lax.dot_general(
            left,
            right,
            (((1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=dtype,
        )

    def barrier(self) -> None:
        """See `tiles.Machine`; and a new number."""
        if not self.interpret:
            pltriton.debug_barrier()
            self.origin = pltriton.load(self.zero.at[0])
            self.number = self.first + self.origin

    def loop(self, first, last, body: Callable[[jax.Array], None]) -> None:
        """`body(i)` for i from first to last, whose numbers stay inside."""

        def whole(i, _):
            self.barrier()
            body(i)

        jax.lax.fori_loop(first, last, whole, None)
        self.number, self.origin = self.first, 0
        self.barrier()


@dataclass(frozen=True)
class Array:
    """A `tiles.Memory`: an array of the given shape inside a larger one."""

    ref: Any
    row: Callable[[], jax.Array]  # the first index, from the element
    lead: tuple[Any, ...]
    shape: tuple[int, ...]
    dtype: jnp.dtype
    tile: int  # the largest extent of those that it is copied by

    def places(self):
        return product(*axes(self.shape, self.tile))

    def load(self, place: tuple[Piece, ...]) -> jax.Array:
        tile = pltriton.load(self._at(place))
        return tile != 0 if self.dtype == jnp.bool_ else tile

    def store(self, place: tuple[Piece, ...], tile: jax.Array) -> None:
        tile = tile.astype(self.ref.dtype)
        pltriton.store(self._at(place), tile)

    def _at(self, place):
        # Interpret mode wants arrays where an index is one number.
        lead = (jnp.asarray(i, jnp.int32) for i in (self.row(), *self.lead))
        return self.ref.at[(*lead, *(pl.ds(p.start, p.size) for p in place))]


@dataclass(frozen=True)
class Sum:
    """A `tiles.Memory` whose stores add up."""

    array: Array

    def store(self, place, tile):
        total = self.array.load(place) + tile.astype(self.array.dtype)
        self.array.store(place, total)


def arrays(refs, leaves, n: Element, *lead) -> list[Array]:
    """Arrays of which every element has its own."""
    operands = [Operand(ref, 1) for ref in refs]
    return rows(refs, operands, leaves, n, *lead)


def rows(refs, operands: Sequence[Operand], leaves, n: Element, *lead):
    """The rows of the operands that element n reads."""

    def row(operand):
        if operand.rows == 1:
            return n.origin
        number = n.number
        if operand.repeat > 1:
            number = jax.lax.div(number, jnp.asarray(operand.repeat, number.dtype))
        return remainder(number, operand.rows)

    return [
        Array(
            ref, partial(row, operand), lead, leaf.shape, jnp.dtype(leaf.dtype), n.tile
        )
        for ref, operand, leaf in zip(refs, operands, leaves, strict=True)
    ]


def constants(refs, function: Function, n: Element) -> list[Array]:
    """The arrays that a function brings along, which all elements share."""
    operands = [Operand(ref, 1) for ref in refs]
    return rows(refs, operands, function.constants, n)


def slots(plan: Layout, refs, n: Element) -> dict:
    """The scratch memory of element n, as `Layout.run` takes it."""
    return {
        key: [arrays([ref], [Struct(*key)], n, i)[0] for i in range(count)]
        for (key, count), ref in zip(plan.scratch.items(), refs, strict=True)
    }


def copy(sources: Sequence[Array], targets: Sequence[Array]) -> None:
    """Copy arrays, tile by tile."""
    for source, target in zip(sources, targets, strict=True):
        for place in source.places():
            target.store(place, source.load(place))
