"""What a program of a GPU kernel does with tiles, in Triton's terms."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.fused_scan.autodiff import Operand
from pallas_kernels.fused_scan.layout import Layout, Tuning
from pallas_kernels.fused_scan.program import Function, Struct
from pallas_kernels.fused_scan.tiles import Piece, axes, padded


def remainder(i: jax.Array | int, n: int) -> jax.Array:
    """i % n for i >= 0, without the select for negative ones that `%` would bring."""
    i = jnp.asarray(i)
    return jax.lax.rem(i, jnp.asarray(n, i.dtype))


class Element:
    """The `tiles.Machine` of one program, and the number of the element it works on.

    Addresses depend on nothing else inside a chunk. Were the number a constant, the
    compilers would compute the addresses of all scratch arrays once, before the loop
    over chunks, and spill them: there are several times as many as registers. So zero
    is read from memory and added at every barrier; as it was read, it is also the row
    of what all elements share, and hides the numbers of chunks and scratch arrays.
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

    def hidden(self, number: jax.Array | int) -> jax.Array:
        """The number, as no compiler can know: what is added would be taken apart.

        A constant would be added once, before the loop, and the number of a chunk
        would become a step that addresses take from one round to the next.
        """
        return jax.lax.bitwise_xor(jnp.asarray(number, jnp.int32), self.origin)

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
    index: Callable[[tuple[Piece, ...]], tuple[Any, ...]]  # of a place, in the larger
    shape: tuple[int, ...]
    dtype: jnp.dtype
    tile: int  # the largest extent of those that it is copied by

    def places(self):
        return product(*axes(self.shape, self.tile))

    def load(self, place: tuple[Piece, ...]) -> jax.Array:
        tile = pltriton.load(self.ref.at[self.index(place)])
        return tile != 0 if self.dtype == jnp.bool_ else tile

    def store(self, place: tuple[Piece, ...], tile: jax.Array) -> None:
        tile = tile.astype(self.ref.dtype)
        pltriton.store(self.ref.at[self.index(place)], tile)


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

    def index(operand, place):
        number = n.number
        if operand.rows == 1:
            number = n.origin
        elif operand.repeat > 1:
            number = jax.lax.div(number, jnp.asarray(operand.repeat, number.dtype))
        if operand.rows > 1:
            number = remainder(number, operand.rows)
        # Interpret mode wants arrays where an index is one number.
        first = jnp.asarray(number, jnp.int32), *map(n.hidden, lead)
        return (*first, *(pl.ds(p.start, p.size) for p in place))

    return [
        Array(ref, partial(index, operand), leaf.shape, jnp.dtype(leaf.dtype), n.tile)
        for ref, operand, leaf in zip(refs, operands, leaves, strict=True)
    ]


ALIGNMENT = 16
"""Entries at whose multiples arrays begin, so that one load takes several entries."""


def stored_dtype(dtype) -> jnp.dtype:
    """Of an array in memory."""
    # One load of bytes would give each thread 16 neighbours of every tile of the shape.
    return jnp.dtype(jnp.int32) if dtype == jnp.bool_ else jnp.dtype(dtype)


def in_tiles(array: jax.Array, leaf, tile: int) -> jax.Array:
    """The array as it is stored: its last axes, those of the leaf, in whole tiles."""
    lead = [(0, 0)] * (array.ndim - len(leaf.shape))
    tiles = padded(leaf.shape, tile)
    more = [(0, m - n) for m, n in zip(tiles, leaf.shape, strict=True)]
    array = array.astype(stored_dtype(leaf.dtype))
    return jnp.pad(array, lead + more) if tiles != tuple(leaf.shape) else array


class Packed:
    """Arrays in whole tiles behind each other, in one of each dtype; `count` times.

    Where an array begins takes two registers of every thread as long as it is in use,
    and a step has dozens of them.
    """

    def __init__(self, leaves: Sequence[Any], tile: int, count: int = 1):
        self.leaves, self.tile, self.count = leaves, tile, count
        self.sizes, self.starts = {}, []
        for leaf in leaves:
            dtype = stored_dtype(leaf.dtype)
            start = self.sizes.get(dtype, 0)
            self.starts.append(start)
            entries = prod(padded(leaf.shape, tile))
            self.sizes[dtype] = start + pl.cdiv(entries, ALIGNMENT) * ALIGNMENT

    def structs(self, size: int) -> list[Struct]:
        """The arrays that hold these of so many elements."""
        return [Struct((size, self.count * n), d) for d, n in self.sizes.items()]

    def joined(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays that hold these values, of one element."""
        parts = {dtype: [] for dtype in self.sizes}
        for value in values:
            flat = in_tiles(value, value, self.tile).reshape(-1)
            parts[flat.dtype].append(jnp.pad(flat, (0, -len(flat) % ALIGNMENT)))
        return [jnp.concatenate(each)[None] for each in parts.values()]

    def arrays(self, refs, n: Element, row: Callable[[], Any], turn=0) -> list[Array]:
        """The arrays of an element; row: its number, turn: of the `count` times."""
        of = dict(zip(self.sizes, refs, strict=True))

        def index(dtype, start, shape, place):
            units = self.sizes[dtype] // ALIGNMENT
            first = jnp.asarray(turn, jnp.int32) * units + n.hidden(start // ALIGNMENT)
            entry, stride = first * ALIGNMENT, 1
            sizes = [p.size for p in place]
            tiles = padded(shape, self.tile)
            for axis in reversed(range(len(shape))):
                along = jax.lax.broadcasted_iota(jnp.int32, sizes, axis)
                entry = entry + (along + place[axis].start) * stride
                stride *= tiles[axis]
            return jnp.asarray(row(), jnp.int32), entry

        found = []
        for leaf, start in zip(self.leaves, self.starts, strict=True):
            dtype = stored_dtype(leaf.dtype)
            at = partial(index, dtype, start, leaf.shape)
            found.append(Array(of[dtype], at, leaf.shape, leaf.dtype, self.tile))
        return found


class Stage:
    """A function of a program as a kernel runs it, with its constants and scratch."""

    def __init__(self, function: Function, tuning: Tuning):
        self._layout = Layout(function.jaxpr, tuning)
        self._values = [jnp.asarray(c) for c in function.constants]
        self._constants = Packed(self._values, tuning.tile)
        self._keys = [
            key for key, count in self._layout.scratch.items() for _ in range(count)
        ]
        self._slots = Packed([Struct(*key) for key in self._keys], tuning.tile)

    def constants(self) -> list[jax.Array]:
        """An operand of the kernel: the arrays that the function brings along."""
        return self._constants.joined(self._values)

    def scratch(self, size: int) -> list[Struct]:
        """A result of the kernel: what is stored on the way, of so many elements."""
        return self._slots.structs(size)

    def run(self, constants, scratch, inputs, outputs, n: Element) -> None:
        """The function of element n, from arrays to arrays."""
        held = self._constants.arrays(constants, n, lambda: n.origin)
        slots = defaultdict(list)
        arrays = self._slots.arrays(scratch, n, lambda: n.number)
        for key, array in zip(self._keys, arrays, strict=True):
            slots[key].append(array)
        self._layout.run((*held, *inputs), outputs, slots, n)


def copy(sources: Sequence[Array], targets: Sequence[Array]) -> None:
    """Copy arrays, tile by tile."""
    for source, target in zip(sources, targets, strict=True):
        for place in source.places():
            target.store(place, source.load(place))
