"""`fused_scan` on GPU, by Pallas' Triton backend: what `autodiff` asks of one.

One program per element, with a loop over its chunks. The step is larger than the
registers of a multiprocessor, so it is evaluated tile by tile (`layout.py`); the carry
and what does not fit are kept in scratch arrays, two of which take turns: small enough
for the second-level cache, and read by the program that wrote them alone.

Everything that knows Triton is in this file, so that another GPU compiler can take its
place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.extend import core

from pallas_kernels.fused_scan import layout
from pallas_kernels.fused_scan.autodiff import Operand
from pallas_kernels.fused_scan.layout import Layout, Tuning
from pallas_kernels.fused_scan.program import Function, Program, Struct, floats
from pallas_kernels.fused_scan.tiles import LEAST, Piece, axes

WARPS = 8
TUNING = Tuning(tile=64)
PRECISE = Tuning(tile=32)
"""For kernels of several products at full precision, whose operands are in parts."""


def objection(program: Program) -> str | None:
    """See `autodiff`."""

    for function in (program.step, program.pull_back):
        tiles = tuning(function)
        machine = _Element(None, True, tiles)
        if found := layout.objection(function.jaxpr, tiles, machine):
            return f"the GPU kernel {found}"
    return None


def tuning(function: Function) -> Tuning:
    """What leaves the registers of a kernel with this function enough room."""
    return PRECISE if _precise_products(function.jaxpr) > 1 else TUNING


def _precise_products(jaxpr) -> int:
    inner = (core.jaxprs_in_params(eqn.params) for eqn in jaxpr.eqns)
    return sum(map(_is_precise, jaxpr.eqns)) + sum(
        map(_precise_products, chain.from_iterable(inner))
    )


def _is_precise(eqn) -> bool:
    return (
        eqn.primitive.name == "dot_general"
        and eqn.params["precision"] is not None
        and all(atom.aval.dtype == jnp.float32 for atom in eqn.invars)
    )


def forward(program: Program, size, carry, xs, consts, *, every, interpret):
    """See `autodiff`."""
    chunks = xs[0].array.shape[1]
    stretches = pl.cdiv(chunks, every) if every else 0
    step = Layout(program.step.jaxpr, tuning(program.step))

    def kernel(zero, constants, starts, x, held, *results):
        ends, ys, saved, turns, scratch = results
        n = _Element(zero, interpret, step.tuning)
        starts = _rows(starts, carry, program.carry, n)
        _copy(starts, _arrays(turns, program.carry, n, 0))

        def chunk(c):
            inputs = (
                *_constants(constants, program.step, n),
                *_arrays(turns, program.carry, n, _remainder(c, 2)),
                *_rows(x, xs, program.x, n, c),
                *_rows(held, consts, program.consts, n),
            )
            outputs = (
                *_arrays(turns, program.carry, n, _remainder(c + 1, 2)),
                *_arrays(ys, program.y, n, c),
            )
            step.run(inputs, outputs, _slots(step, scratch, n), n)

        def stretch(s):
            first = s * every
            now = _arrays(turns, program.carry, n, _remainder(first, 2))
            _copy(now, _arrays(saved, program.carry, n, s))
            last = jnp.minimum(first + every, chunks)
            n.loop(first, last, chunk)

        if every:
            n.loop(0, stretches, stretch)
        else:
            n.loop(0, chunks, chunk)
        final = _arrays(turns, program.carry, n, chunks % 2)
        _copy(final, _arrays(ends, program.carry, n))

    results = [
        _structs(program.carry, size),
        _structs(program.y, size, chunks),
        _structs(program.carry, size, stretches) if every else [],
        _structs(program.carry, size, 2),
        _scratch(step, size),
    ]
    operands = [
        _whole(program.step),
        _stored(carry, program.carry),
        _stored(xs, program.x),
        _stored(consts, program.consts),
    ]
    ends, ys, saved, *_ = _call(kernel, size, operands, results, interpret)
    return (
        _results(ends, program.carry),
        _results(ys, program.y),
        _results(saved, program.carry if every else ()),
    )


def backward(
    program: Program, size, saved, xs, consts, d_carry, d_ys, *, every, interpret
):
    """See `autodiff`."""
    chunks = xs[0].array.shape[1]
    stretches = pl.cdiv(chunks, every)
    d_carries, d_xs, d_consts = map(floats, (program.carry, program.x, program.consts))
    d_y, sums = floats(program.y), [_accumulator(leaf) for leaf in d_consts]
    tiles = tuning(program.pull_back)
    advance = Layout(program.advance.jaxpr, tiles)
    pull_back = Layout(program.pull_back.jaxpr, tiles)

    def kernel(zero, constants, saved, x, held, d_ends, d_ys, *results):
        d_starts, d_x, d_held, turns, carries, scratch = results
        n = _Element(zero, interpret, tiles)
        d_held = _arrays(d_held, sums, n)
        _copy(_arrays(d_ends, d_carries, n), _arrays(turns, d_carries, n, 0))
        for array in d_held:
            for place in array.places():
                array.store(place, jnp.zeros([p.size for p in place], array.dtype))

        def carry_at(s, i):
            if every == 1:
                return _arrays(saved, program.carry, n, s)
            return _arrays(carries, program.carry, n, i)

        def stretch(back):
            s = stretches - 1 - back
            first = s * every
            count = jnp.minimum(every, chunks - first)

            def again(i):
                inputs = (
                    *_constants(constants[0], program.advance, n),
                    *carry_at(s, i),
                    *_rows(x, xs, program.x, n, first + i),
                    *_rows(held, consts, program.consts, n),
                )
                slots = _slots(advance, scratch[0], n)
                advance.run(inputs, carry_at(s, i + 1), slots, n)

            def pull(done):
                i = count - 1 - done
                turn = _remainder(chunks - 1 - first - i, 2)
                inputs = (
                    *_constants(constants[1], program.pull_back, n),
                    *carry_at(s, i),
                    *_rows(x, xs, program.x, n, first + i),
                    *_rows(held, consts, program.consts, n),
                    *_arrays(turns, d_carries, n, turn),
                    *_arrays(d_ys, d_y, n, first + i),
                )
                outputs = (
                    *_arrays(turns, d_carries, n, 1 - turn),
                    *_arrays(d_x, d_xs, n, first + i),
                    *map(_Sum, d_held),
                )
                slots = _slots(pull_back, scratch[1], n)
                pull_back.run(inputs, outputs, slots, n)

            if every > 1:
                _copy(_arrays(saved, program.carry, n, s), carry_at(s, 0))
                n.loop(0, count - 1, again)
            n.loop(0, count, pull)

        n.loop(0, stretches, stretch)
        final = _arrays(turns, d_carries, n, chunks % 2)
        _copy(final, _arrays(d_starts, d_carries, n))

    results = [
        _structs(d_carries, size),
        _structs(d_xs, size, chunks),
        _structs(sums, size),
        _structs(d_carries, size, 2),
        _structs(program.carry, size, every) if every > 1 else [],
        [_scratch(advance, size) if every > 1 else [], _scratch(pull_back, size)],
    ]
    constants = [
        _whole(program.advance) if every > 1 else [],
        _whole(program.pull_back),
    ]
    operands = [
        constants,
        _stored(saved, program.carry),
        _stored(xs, program.x),
        _stored(consts, program.consts),
        _stored(d_carry, d_carries),
        _stored(d_ys, d_y),
    ]
    d_starts, d_x, d_held, *_ = _call(kernel, size, operands, results, interpret)
    return (
        _results(d_starts, d_carries),
        _results(d_x, d_xs),
        _results(d_held, d_consts),
    )


def _call(kernel, size: int, operands, results, interpret):
    call = pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(size,),
        compiler_params=pltriton.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="fused_scan",
    )
    return call(jnp.zeros(1, jnp.int32), *operands)


def _stored_dtype(dtype) -> jnp.dtype:
    # One load of bytes would give each thread 16 neighbours of every tile of the shape.
    return jnp.dtype(jnp.int32) if dtype == jnp.bool_ else jnp.dtype(dtype)


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in whole tiles, of whatever extent."""
    return tuple(sum(p.size for p in axis) for axis in axes(shape, LEAST))


def _stored(operands: Sequence, leaves: Sequence) -> list[jax.Array]:
    """The arrays of the operands, each leaf in whole tiles."""
    stored = []
    for operand, leaf in zip(operands, leaves, strict=True):
        array = operand.array if isinstance(operand, Operand) else operand
        array = array.astype(_stored_dtype(leaf.dtype))
        lead = array.ndim - len(leaf.shape)
        more = [m - n for m, n in zip(_padded(leaf.shape), leaf.shape, strict=True)]
        if any(more):
            array = jnp.pad(array, [(0, 0)] * lead + [(0, n) for n in more])
        stored.append(array)
    return stored


def _whole(function: Function) -> list[jax.Array]:
    """The arrays that a function brings along, as operands of one row."""
    constants = [jnp.asarray(c) for c in function.constants]
    return _stored([c[None] for c in constants], constants)


def _structs(leaves: Sequence, *lead: int) -> list[Struct]:
    return [
        Struct((*lead, *_padded(leaf.shape)), _stored_dtype(leaf.dtype))
        for leaf in leaves
    ]


def _results(arrays, leaves):
    """Arrays from the kernel without what fills their last tiles."""
    return [
        a[(..., *(slice(n) for n in leaf.shape))].astype(leaf.dtype)
        for a, leaf in zip(arrays, leaves, strict=True)
    ]


def _accumulator(leaf: Struct) -> Struct:
    return Struct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))


def _scratch(plan: Layout, size: int) -> list[Struct]:
    return [
        _structs([Struct(*key)], size, count)[0] for key, count in plan.scratch.items()
    ]


# Inside the kernel.


def _remainder(i: jax.Array, n: int) -> jax.Array:
    """i % n for i >= 0, without the select for negative ones that `%` would bring."""
    return jax.lax.rem(i, jnp.asarray(n, i.dtype))


class _Element:
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
class _Array:
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
class _Sum:
    """A `tiles.Memory` whose stores add up."""

    array: _Array

    def store(self, place, tile):
        total = self.array.load(place) + tile.astype(self.array.dtype)
        self.array.store(place, total)


def _arrays(refs, leaves, n: _Element, *lead) -> list[_Array]:
    """Arrays of which every element has its own."""
    operands = [Operand(ref, 1) for ref in refs]
    return _rows(refs, operands, leaves, n, *lead)


def _rows(refs, operands: Sequence[Operand], leaves, n: _Element, *lead):
    """The rows of the operands that element n reads."""

    def row(operand):
        if operand.rows == 1:
            return n.origin
        number = n.number
        if operand.repeat > 1:
            number = jax.lax.div(number, jnp.asarray(operand.repeat, number.dtype))
        return _remainder(number, operand.rows)

    return [
        _Array(
            ref, partial(row, operand), lead, leaf.shape, jnp.dtype(leaf.dtype), n.tile
        )
        for ref, operand, leaf in zip(refs, operands, leaves, strict=True)
    ]


def _constants(refs, function: Function, n: _Element) -> list[_Array]:
    operands = [Operand(ref, 1) for ref in refs]
    return _rows(refs, operands, function.constants, n)


def _slots(plan: Layout, refs, n: _Element) -> dict:
    return {
        key: [_arrays([ref], [Struct(*key)], n, i)[0] for i in range(count)]
        for (key, count), ref in zip(plan.scratch.items(), refs, strict=True)
    }


def _copy(sources: Sequence[_Array], targets: Sequence[_Array]) -> None:
    for source, target in zip(sources, targets, strict=True):
        for place in source.places():
            target.store(place, source.load(place))
