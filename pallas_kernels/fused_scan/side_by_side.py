"""A program of several elements at once, and the arrays that it takes.

An array of 64 columns fills half of what it takes in the memory of a TPU, on chip and
off it. Two elements side by side need half as much, and half of the work for whatever
is not a matrix product (`lanes`).
"""

from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.fused_scan.autodiff import Operand
from pallas_kernels.fused_scan.lanes import LANES, Each, Lanes, Shared, Side
from pallas_kernels.fused_scan.program import (
    Function,
    Program,
    Struct,
    multiply_adds,
    rewritten,
)
from pallas_kernels.fused_scan.simplify import Simplifier
from pallas_kernels.fused_scan.vmem import tile


class Leaves(NamedTuple):
    """Shapes of what a program reads and gives, as `Program` has them."""

    carry: tuple[Struct, ...]
    x: tuple[Struct, ...]
    consts: tuple[Struct, ...]
    y: tuple[Struct, ...]
    cotangents: tuple[list[Struct], ...]


class SideBySide:
    """A program of `count` elements as one each, of `size` of them in all.

    `leaves` are `[R, count n]` where that fits into the lanes, else `[count, R, n]`; an
    operand of x or consts that elements beside each other share stays what it is.
    """

    def __init__(
        self,
        program: Program,
        size: int,
        xs: Sequence[Operand],
        consts: Sequence[Operand],
    ):
        operands = (*xs, *consts)
        self.count = _count(program, size, operands)
        self._lanes = Lanes(self.count)
        self._program = program
        is_shared = [operand.repeat > 1 for operand in operands]
        self._shared = [False] * len(program.carry) + is_shared
        self.leaves = Leaves(
            tuple(map(self._leaf, program.carry)),
            tuple(map(self._leaf, program.x, is_shared)),
            tuple(map(self._leaf, program.consts, is_shared[len(xs) :])),
            tuple(map(self._leaf, program.y)),
            tuple(list(map(self._leaf, part)) for part in program.cotangents),
        )

    def function(self, name: str) -> Function:
        """That one of the program's functions."""
        function = getattr(self._program, name)
        if self.count == 1:
            return function
        cotangents = len(function.jaxpr.invars) - len(self._shared)
        return self._function(function, self._shared + [False] * cotangents)

    def multiply_adds(self, name: str) -> int:
        """Of one of the program's functions: those of its elements, without zeros."""
        return self.count * multiply_adds(getattr(self._program, name).jaxpr)

    def operands(self, operands, leaves) -> list[Operand]:
        """x or consts as the program reads them."""
        return [
            Operand(operand.array, operand.repeat // self.count)
            if operand.repeat > 1
            else self._rows(operand, leaf)
            for operand, leaf in zip(operands, leaves, strict=True)
        ]

    def carry(self, operands, leaves) -> list[Operand]:
        """What every element has of its own, in rows that several may start from."""
        return list(map(self._rows, operands, leaves))

    def _rows(self, operand, leaf):
        array, repeat = operand
        if repeat > 1:
            array, repeat = jnp.repeat(array, self.count, axis=0), repeat // self.count
        # Rows that take turns, three say, in an order that comes out even.
        turns = self.count // gcd(self.count, len(array))
        array = jnp.tile(array, (turns, *(1,) * (array.ndim - 1)))
        return Operand(self._together(array, leaf), repeat)

    def arrays(self, arrays, leaves) -> list[jax.Array]:
        """Arrays `[size, ...]` as the program reads them."""
        return list(map(self._together, arrays, leaves))

    def elements(self, arrays, leaves) -> list[jax.Array]:
        """Results of the program as those of single elements, `[size, ...]`."""
        return list(map(self._apart, arrays, leaves))

    def _together(self, array, leaf):
        if self.count == 1:
            return array
        array = array.reshape(-1, self.count, *array.shape[1:])
        if self._lanes.fit(leaf.shape):
            array = jnp.moveaxis(array, 1, -2)
            return array.reshape(*array.shape[:-2], -1)
        lead = array.shape[: array.ndim - len(leaf.shape)]
        return jnp.moveaxis(array.reshape(*lead, *tile(leaf.shape)), 1, len(lead) - 1)

    def _apart(self, array, leaf):
        if self.count == 1:
            return array
        lead = array.shape[1 : array.ndim - len(self._leaf(leaf).shape)]
        if self._lanes.fit(leaf.shape):
            array = array.reshape(*array.shape[:-1], self.count, -1)
            array = jnp.moveaxis(array, -2, 1)
        else:
            array = jnp.moveaxis(array, 1 + len(lead), 1)
        return array.reshape(-1, *lead, *leaf.shape)

    def _leaf(self, leaf, shared=False):
        if shared or self.count == 1:
            shape = leaf.shape
        elif self._lanes.fit(leaf.shape):
            shape = self._lanes.wide(leaf.shape)
        else:
            shape = (self.count, *tile(leaf.shape))
        return Struct(shape, leaf.dtype)

    def _function(self, function, shared):
        inputs, outputs = (
            [var.aval for var in variables]
            for variables in (function.jaxpr.invars, function.jaxpr.outvars)
        )

        def value(array, aval, shared):
            if shared:
                return Shared(array)
            if self._lanes.fit(aval.shape):
                return Side(array)
            return Each([array[i].reshape(aval.shape) for i in range(self.count)])

        def array(value, aval):
            value = self._lanes.formed(value, aval.shape)
            if isinstance(value, Side):
                return value.x
            return jnp.stack([x.reshape(tile(aval.shape)) for x in value.xs])

        def together(*arrays):
            values = list(map(value, arrays, inputs, shared))
            results = self._lanes.run(function.jaxpr, function.constants, values)
            return list(map(array, results, outputs))

        closed = jax.make_jaxpr(together)(*map(self._leaf, inputs, shared))
        return rewritten(Function(closed.jaxpr, tuple(closed.consts)), Simplifier())


def _count(program: Program, size: int, operands: Sequence[Operand]) -> int:
    """How many elements of the matrices in x have room in the lanes, a power of two.

    And divide the elements that share a row.
    """
    widths = [leaf.shape[-1] for leaf in program.x if len(leaf.shape) > 1]
    room = max(1, LANES // max(widths, default=LANES))
    count = gcd(size, 1 << (room.bit_length() - 1))
    for operand in operands:
        count = gcd(count, operand.repeat) if operand.repeat > 1 else count
    return count
