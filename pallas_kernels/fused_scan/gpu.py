"""`fused_scan` on GPU, by Pallas' Triton backend: what `autodiff` asks of one.

One program per element, with a loop over its chunks. The step is larger than the
registers of a multiprocessor, so it is evaluated tile by tile (`layout.py`); the carry
and what does not fit are kept in scratch arrays, two of which take turns: small enough
for the second-level cache, and read by the program that wrote them alone.

Everything that knows Triton is in this file and in `triton.py`, so that another GPU
compiler can take their place.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.fused_scan import layout, triton
from pallas_kernels.fused_scan.autodiff import Operand
from pallas_kernels.fused_scan.layout import Layout, Tuning
from pallas_kernels.fused_scan.program import Function, Program, Struct, floats
from pallas_kernels.fused_scan.tiles import padded

WARPS = 8
TUNING = Tuning(tile=64, precise=32)


def objection(program: Program) -> str | None:
    """See `autodiff`."""

    for function in (program.step, program.pull_back):
        machine = triton.Element(None, True, TUNING)
        if found := layout.objection(function.jaxpr, TUNING, machine):
            return f"the GPU kernel {found}"
    return None


def forward(program: Program, size, carry, xs, consts, *, every, interpret):
    """See `autodiff`."""
    chunks = xs[0].array.shape[1]
    stretches = pl.cdiv(chunks, every) if every else 0
    step = Layout(program.step.jaxpr, TUNING)

    def kernel(zero, constants, starts, x, held, *results):
        ends, ys, saved, turns, scratch = results
        n = triton.Element(zero, interpret, TUNING)
        starts = triton.rows(starts, carry, program.carry, n)
        triton.copy(starts, triton.arrays(turns, program.carry, n, 0))

        def chunk(c):
            inputs = (
                *triton.constants(constants, program.step, n),
                *triton.arrays(turns, program.carry, n, triton.remainder(c, 2)),
                *triton.rows(x, xs, program.x, n, c),
                *triton.rows(held, consts, program.consts, n),
            )
            outputs = (
                *triton.arrays(turns, program.carry, n, triton.remainder(c + 1, 2)),
                *triton.arrays(ys, program.y, n, c),
            )
            step.run(inputs, outputs, triton.slots(step, scratch, n), n)

        def stretch(s):
            first = s * every
            now = triton.arrays(turns, program.carry, n, triton.remainder(first, 2))
            triton.copy(now, triton.arrays(saved, program.carry, n, s))
            last = jnp.minimum(first + every, chunks)
            n.loop(first, last, chunk)

        if every:
            n.loop(0, stretches, stretch)
        else:
            n.loop(0, chunks, chunk)
        final = triton.arrays(turns, program.carry, n, chunks % 2)
        triton.copy(final, triton.arrays(ends, program.carry, n))

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
    advance = Layout(program.advance.jaxpr, TUNING)
    pull_back = Layout(program.pull_back.jaxpr, TUNING)

    def kernel(zero, constants, saved, x, held, d_ends, d_ys, *results):
        d_starts, d_x, d_held, turns, carries, scratch = results
        n = triton.Element(zero, interpret, TUNING)
        d_held = triton.arrays(d_held, sums, n)
        triton.copy(
            triton.arrays(d_ends, d_carries, n), triton.arrays(turns, d_carries, n, 0)
        )
        for array in d_held:
            for place in array.places():
                array.store(place, jnp.zeros([p.size for p in place], array.dtype))

        def carry_at(s, i):
            if every == 1:
                return triton.arrays(saved, program.carry, n, s)
            return triton.arrays(carries, program.carry, n, i)

        def stretch(back):
            s = stretches - 1 - back
            first = s * every
            count = jnp.minimum(every, chunks - first)

            def again(i):
                inputs = (
                    *triton.constants(constants[0], program.advance, n),
                    *carry_at(s, i),
                    *triton.rows(x, xs, program.x, n, first + i),
                    *triton.rows(held, consts, program.consts, n),
                )
                slots = triton.slots(advance, scratch[0], n)
                advance.run(inputs, carry_at(s, i + 1), slots, n)

            def pull(done):
                i = count - 1 - done
                turn = triton.remainder(chunks - 1 - first - i, 2)
                inputs = (
                    *triton.constants(constants[1], program.pull_back, n),
                    *carry_at(s, i),
                    *triton.rows(x, xs, program.x, n, first + i),
                    *triton.rows(held, consts, program.consts, n),
                    *triton.arrays(turns, d_carries, n, turn),
                    *triton.arrays(d_ys, d_y, n, first + i),
                )
                outputs = (
                    *triton.arrays(turns, d_carries, n, 1 - turn),
                    *triton.arrays(d_x, d_xs, n, first + i),
                    *map(triton.Sum, d_held),
                )
                slots = triton.slots(pull_back, scratch[1], n)
                pull_back.run(inputs, outputs, slots, n)

            if every > 1:
                triton.copy(triton.arrays(saved, program.carry, n, s), carry_at(s, 0))
                n.loop(0, count - 1, again)
            n.loop(0, count, pull)

        n.loop(0, stretches, stretch)
        final = triton.arrays(turns, d_carries, n, chunks % 2)
        triton.copy(final, triton.arrays(d_starts, d_carries, n))

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


def _stored(operands: Sequence, leaves: Sequence) -> list[jax.Array]:
    """The arrays of the operands, each leaf in whole tiles."""
    stored = []
    for operand, leaf in zip(operands, leaves, strict=True):
        array = operand.array if isinstance(operand, Operand) else operand
        array = array.astype(_stored_dtype(leaf.dtype))
        lead = array.ndim - len(leaf.shape)
        more = [
            m - n
            for m, n in zip(padded(leaf.shape, TUNING.tile), leaf.shape, strict=True)
        ]
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
        Struct((*lead, *padded(leaf.shape, TUNING.tile)), _stored_dtype(leaf.dtype))
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
