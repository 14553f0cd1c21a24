"""The code of a jaxpr, equation by equation and tile by tile, as `layout` plans it."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from pallas_kernels.fused_scan.memories import Part, Row, Value
from pallas_kernels.fused_scan.products import Product
from pallas_kernels.fused_scan.tiles import (
    ELEMENTWISE,
    REDUCTIONS,
    Index,
    Memory,
    Piece,
    Refused,
    axes,
    each,
    is_precise,
    misaligned,
    padded,
    piece,
)


class Emitter:
    """One run through the equations of a layout; see `layout.Layout.run`."""

    def __init__(self, layout, inputs, scratch, machine):
        self.tuning = layout.tuning
        self.limit = self.tuning.tile
        self.slots = layout.slots
        self.scratch = scratch
        self.machine = machine
        variables = (*layout.jaxpr.constvars, *layout.jaxpr.invars)
        self.memory = dict(zip(variables, inputs, strict=True))
        self.held = {}  # variable -> its only tile
        self.defined = {}  # variable -> equation, computed where it is read
        self.layers = [{}]  # tiles computed on the way to the one being emitted

    def axes(self, atom):
        return axes(atom.aval.shape, self.limit)

    def place(self, atom, index) -> tuple[Piece, ...]:
        return tuple(map(piece, self.axes(atom), index))

    def shape(self, atom, index) -> tuple[int, ...]:
        return tuple(piece.size for piece in self.place(atom, index))

    @contextmanager
    def tiles_of(self, eqn):
        """Inside, arrays are cut as suits the equation."""
        before = self.limit
        self.limit = self.tuning.precise if is_precise(eqn) else before
        yield
        self.limit = before

    @contextmanager
    def session(self):
        """Tiles computed inside are forgotten afterwards."""
        self.layers.append({})
        yield
        self.layers.pop()

    def tile(self, atom, index: Index) -> jax.Array:
        if isinstance(atom, Literal):
            return jnp.asarray(atom.val, atom.aval.dtype)
        for layer in self.layers:
            if (atom, index) in layer:
                return layer[atom, index]
        if atom in self.held:
            return self.held[atom]
        if atom in self.memory:
            tile = self.memory[atom].load(self.place(atom, index))
        else:
            tile = self.compute(self.defined[atom], index)
        self.layers[-1][atom, index] = tile
        return tile

    def masked(self, atom, index, along, fill) -> jax.Array:
        """The tile with `fill` where an axis of `along` has nothing."""
        tile = self.tile(atom, index)
        for axis in along:
            piece = self.place(atom, index)[axis]
            if piece.may_be_padded:
                position = jax.lax.broadcasted_iota(jnp.int32, tile.shape, axis)
                tile = jnp.where(position < piece.valid, tile, _full(tile, fill))
        return tile

    # One tile of an equation that is not stored.

    def compute(self, eqn, index: Index) -> jax.Array:
        name, (out,) = eqn.primitive.name, eqn.outvars
        shape = self.shape(out, index)
        if name in ELEMENTWISE:
            # Axes of length one are broadcast by the functions themselves.
            sources = (
                tuple(
                    i if n > 1 else 0 for i, n in zip(index, v.aval.shape, strict=False)
                )
                for v in eqn.invars
            )
            operands = [
                self.tile(*pair) for pair in zip(eqn.invars, sources, strict=True)
            ]
            return _elementwise(eqn, operands)
        if name == "dot_general":
            return self.product(Product(eqn), index)
        if name == "iota":
            axis = eqn.params["dimension"]
            start = self.place(out, index)[axis].start
            return start + jax.lax.broadcasted_iota(out.aval.dtype, shape, axis)

        (atom,) = eqn.invars
        if name == "transpose":
            permutation = eqn.params["permutation"]
            source = [0] * len(index)
            for i, axis in zip(index, permutation, strict=True):
                source[axis] = i
            tile = jnp.transpose(self.tile(atom, tuple(source)), permutation)
        elif name == "broadcast_in_dim":
            mapped = eqn.params["broadcast_dimensions"]
            source = tuple(
                index[axis] if atom.aval.shape[i] == out.aval.shape[axis] else 0
                for i, axis in enumerate(mapped)
            )
            tile = self.tile(atom, source)
            inner = [1] * len(shape)
            for i, axis in enumerate(mapped):
                inner[axis] = tile.shape[i]
            if not all(n in (1, m) for n, m in zip(inner, shape, strict=True)):
                raise misaligned(eqn)
            tile = jax.lax.broadcast_in_dim(tile, shape, mapped)
        else:  # reshape, squeeze: axes of length one come and go
            long = [i for i, n in zip(index, out.aval.shape, strict=True) if n > 1]
            lengths = [n for n in out.aval.shape if n > 1]
            if lengths != [n for n in atom.aval.shape if n > 1]:
                raise misaligned(eqn)
            long = iter(long)
            source = tuple(next(long) if n > 1 else 0 for n in atom.aval.shape)
            tile = self.tile(atom, source)
            if prod(tile.shape) != prod(shape):
                raise misaligned(eqn)
            tile = jnp.reshape(tile, shape)
        if tile.shape != shape:
            raise misaligned(eqn)
        return tile

    def define(self, eqn) -> None:
        """What is not stored: computed where it is read, or a part of what is."""
        if eqn.primitive.name != "split":
            self.defined[eqn.outvars[0]] = eqn
            return
        (atom,), axis = eqn.invars, eqn.params["axis"]
        start = [0] * atom.aval.ndim
        for out in eqn.outvars:
            self.memory[out] = self.part(self.memory[atom], atom, out, start)
            start[axis] += out.aval.shape[axis]

    def part(self, memory: Memory, whole, part, start) -> Part:
        """The memory of a part of an array, all tiles of which lie in this array's."""
        shape = self.slots[whole][0][0] if whole in self.slots else whole.aval.shape
        ends = (padded(s, self.limit) for s in (part.aval.shape, shape))
        for first, inner, outer in zip(start, *ends, strict=True):
            if first + inner > outer:
                raise Refused(
                    f"cannot take {part.aval} at {tuple(start)} of {whole.aval}, whose "
                    "tiles end before its own"
                )
        return Part(memory, tuple(start))

    # Equations whose result is stored.

    def keep(self, eqn) -> None:
        (out,) = eqn.outvars
        if out in self.slots:
            key, number = self.slots[out]
            memory = self.scratch[key][number]
            self.machine.barrier()  # others may still read what was in this slot
            if eqn.primitive.name == "concatenate":
                self.join(eqn, memory)
            else:
                with self.tiles_of(eqn):
                    self.each(out, partial(self.save, out, memory, self.result, eqn))
            self.machine.barrier()
            self.memory[out] = memory
        else:
            index = (0,) * out.aval.ndim
            with self.session():
                self.held[out] = self.result(eqn, index)

    def join(self, eqn, memory: Memory) -> None:
        """Concatenate: the padding of a part lies where the next one is written."""
        (out,), axis = eqn.outvars, eqn.params["dimension"]
        start = [0] * out.aval.ndim
        for atom in eqn.invars:
            part = self.part(memory, out, atom, start)
            self.write(atom, part)
            start[axis] += atom.aval.shape[axis]

    def loop(self, eqn, rounds) -> None:
        """A `scan`, whose results are slots: the carry at once that of every round."""
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        length = eqn.params["length"]
        inputs = list(map(self._operand, eqn.invars))
        outputs = [self._slot(*self.slots[var]) for var in eqn.outvars]
        after = [self._slot(*slot) for slot in rounds.carry]
        scratch = {
            key: [self._slot(key, number) for number in numbers]
            for key, numbers in rounds.scratch.items()
        }
        now, before = outputs[:carries], eqn.invars[consts : consts + carries]
        for atom, memory in zip(before, now, strict=True):
            self.write(atom, memory)

        def one(i):
            i = length - 1 - i if eqn.params["reverse"] else i
            rows = [Row(memory, i) for memory in inputs[consts + carries :]]
            ys = [Row(memory, i) for memory in outputs[carries:]]
            rounds.body.run(
                (*inputs[:consts], *now, *rows), (*after, *ys), scratch, self.machine
            )
            self.machine.barrier()
            for var, source, target in zip(eqn.outvars, after, now, strict=False):
                self.each(var, partial(self._copy, var, source, target))

        self.machine.loop(0, length, one)
        self.memory.update(zip(eqn.outvars, outputs, strict=True))

    def _copy(self, var, source: Memory, target: Memory, index: Index) -> None:
        place = self.place(var, index)
        target.store(place, source.load(place))

    def _operand(self, atom) -> Memory:
        return Value(atom) if isinstance(atom, Literal) else self.memory[atom]

    def _slot(self, key, number: int) -> Memory:
        return self.scratch[key][number]

    def write(self, atom, memory: Memory) -> None:
        self.machine.barrier()
        self.each(atom, lambda index: self.save(atom, memory, self.tile, atom, index))

    def each(self, atom, body: Callable[[Index], None]) -> None:
        each(self.axes(atom), lambda index, _: body(index))

    def save(self, atom, memory: Memory, compute: Callable, *args) -> None:
        *_, index = args
        with self.session():
            tile = jnp.broadcast_to(compute(*args), self.shape(atom, index))
            memory.store(self.place(atom, index), tile)

    def result(self, eqn, index: Index) -> jax.Array:
        """A tile of what is stored."""
        if eqn.primitive.name not in REDUCTIONS:
            return self.compute(eqn, index)
        (atom,), (out,) = eqn.invars, eqn.outvars
        reduce, combine, neutral = REDUCTIONS[eqn.primitive.name]
        along = eqn.params["axes"]

        def add(inner, total):
            rest, reduced = iter(index), dict(zip(along, inner, strict=True))
            source = tuple(
                reduced[a] if a in reduced else next(rest)
                for a in range(atom.aval.ndim)
            )
            with self.session():
                part = reduce(self.masked(atom, source, along, neutral), axis=along)
            return combine(total, part)

        start = jnp.full(self.shape(out, index), neutral, out.aval.dtype)
        total = each([self.axes(atom)[a] for a in along], add, start)
        if total.shape != self.shape(out, index):
            raise misaligned(eqn)
        return total

    def product(self, product: Product, index: Index) -> jax.Array:
        def add(inner, total):
            with self.session():
                term = product.multiply(self, index, *inner)
            return total + term

        start = jnp.zeros(self.shape(product.out, index), product.out.aval.dtype)
        return each([self.axes(product.left)[product.left_inner]], add, start)


def _full(tile, fill):
    return jnp.full(tile.shape, fill, tile.dtype)


def _elementwise(eqn, operands):
    match eqn.primitive.name:
        case "add_any":
            return jnp.add(*operands)
        case "copy" | "stop_gradient":
            return operands[0]
        case "select_n" if operands[0].ndim == 0 and operands[1].ndim:
            operands[0] = jnp.broadcast_to(operands[0], operands[1].shape)
    return eqn.primitive.bind(*operands, **eqn.params)
