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
from pallas_kernels.fused_scan.layout import Tuning
from pallas_kernels.fused_scan.program import Program, Struct, floats
from pallas_kernels.fused_scan.tiles import padded
from pallas_kernels.fused_scan.triton import Packed, Stage, in_tiles, stored_dtype

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
    step = Stage(program.step, TUNING)
    both = Packed(program.carry, TUNING.tile, 2)

    def kernel(zero, constants, starts, x, held, *results):
        ends, ys, saved, turns, scratch = results
        n = triton.Element(zero, interpret, TUNING)

        def now(c):
            return both.arrays(turns, n, lambda: n.number, triton.remainder(c, 2))

        triton.copy(triton.rows(starts, carry, program.carry, n), now(0))

        def chunk(c):
            inputs = (
                *now(c),
                *triton.rows(x, xs, program.x, n, c),
                *triton.rows(held, consts, program.consts, n),
            )
            outputs = (*now(c + 1), *triton.arrays(ys, program.y, n, c))
            step.run(constants, scratch, inputs, outputs, n)

        def stretch(s):
            first = s * every
            triton.copy(now(first), triton.arrays(saved, program.carry, n, s))
            last = jnp.minimum(first + every, chunks)
            n.loop(first, last, chunk)

        if every:
            n.loop(0, stretches, stretch)
        else:
            n.loop(0, chunks, chunk)
        triton.copy(now(chunks), triton.arrays(ends, program.carry, n))

    results = [
        _structs(program.carry, size),
        _structs(program.y, size, chunks),
        _structs(program.carry, size, stretches) if every else [],
        both.structs(size),
        step.scratch(size),
    ]
    operands = [
        step.constants(),
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
    advance = Stage(program.advance, TUNING)
    pull_back = Stage(program.pull_back, TUNING)
    both = Packed(d_carries, TUNING.tile, 2)
    recomputed = Packed(program.carry, TUNING.tile, every)

    def kernel(zero, constants, saved, x, held, d_ends, d_ys, *results):
        d_starts, d_x, d_held, turns, carries, scratch = results
        n = triton.Element(zero, interpret, TUNING)
        d_held = triton.arrays(d_held, sums, n)

        def now(c):
            return both.arrays(turns, n, lambda: n.number, triton.remainder(c, 2))

        triton.copy(triton.arrays(d_ends, d_carries, n), now(0))
        for array in d_held:
            for place in array.places():
                array.store(place, jnp.zeros([p.size for p in place], array.dtype))

        def carry_at(s, i):
            if every == 1:
                return triton.arrays(saved, program.carry, n, s)
            return recomputed.arrays(carries, n, lambda: n.number, i)

        def stretch(back):
            s = stretches - 1 - back
            first = s * every
            count = jnp.minimum(every, chunks - first)

            def again(i):
                inputs = (
                    *carry_at(s, i),
                    *triton.rows(x, xs, program.x, n, first + i),
                    *triton.rows(held, consts, program.consts, n),
                )
                advance.run(constants[0], scratch[0], inputs, carry_at(s, i + 1), n)

            def pull(done):
                i = count - 1 - done
                turn = chunks - 1 - first - i
                inputs = (
                    *carry_at(s, i),
                    *triton.rows(x, xs, program.x, n, first + i),
                    *triton.rows(held, consts, program.consts, n),
                    *now(turn),
                    *triton.arrays(d_ys, d_y, n, first + i),
                )
                outputs = (
                    *now(turn + 1),
                    *triton.arrays(d_x, d_xs, n, first + i),
                    *map(triton.Sum, d_held),
                )
                pull_back.run(constants[1], scratch[1], inputs, outputs, n)

            if every > 1:
                triton.copy(triton.arrays(saved, program.carry, n, s), carry_at(s, 0))
                n.loop(0, count - 1, again)
            n.loop(0, count, pull)

        n.loop(0, stretches, stretch)
        triton.copy(now(chunks), triton.arrays(d_starts, d_carries, n))

    recomputes = every > 1
    results = [
        _structs(d_carries, size),
        _structs(d_xs, size, chunks),
        _structs(sums, size),
        both.structs(size),
        recomputed.structs(size) if recomputes else [],
        [advance.scratch(size) if recomputes else [], pull_back.scratch(size)],
    ]
    operands = [
        [advance.constants() if recomputes else [], pull_back.constants()],
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


def _stored(operands: Sequence, leaves: Sequence) -> list[jax.Array]:
    """The arrays of the operands, each leaf in whole tiles."""
    arrays = (o.array if isinstance(o, Operand) else o for o in operands)
    pairs = zip(arrays, leaves, strict=True)
    return [in_tiles(array, leaf, TUNING.tile) for array, leaf in pairs]


def _structs(leaves: Sequence, *lead: int) -> list[Struct]:
    return [
        Struct((*lead, *padded(leaf.shape, TUNING.tile)), stored_dtype(leaf.dtype))
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
