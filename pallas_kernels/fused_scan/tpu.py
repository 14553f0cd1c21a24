"""`fused_scan` on TPU (Mosaic): the interface that `autodiff` describes.

The grid is (elements / group, stretches of chunks), the stretches in sequence. What is
carried lives in the block of the output that will hold it at the end: as that block
stays the same from one stretch to the next, it stays in VMEM. Elements that fit beside
each other into the lanes are one (`side_by_side.py`). Several go through one grid step,
written out operation by operation, so that the compiler can fill the waits of one with
the work of another.
"""

from collections.abc import Sequence
from functools import partial
from math import gcd, prod

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.fused_scan import blocks
from pallas_kernels.fused_scan.autodiff import Operand
from pallas_kernels.fused_scan.mosaic import compilable
from pallas_kernels.fused_scan.program import Program, Struct, floats
from pallas_kernels.fused_scan.side_by_side import Leaves, SideBySide
from pallas_kernels.fused_scan.vmem import (
    load,
    loop,
    loop_bytes,
    padded,
    store,
    stored,
    tile,
    value,
    value_bytes,
)

GROUP = 8
"""Elements per grid step, where their number and the memory allow it."""

VMEM_BYTES = 60 * 2**20
"""What a kernel may use of VMEM; every chip since v5e has at least 64 MiB."""

SPILLED = 1 / 8
"""Of that, what is left to values that the compiler spills."""

PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
)


PRIMITIVES = frozenset(
    "abs add add_any and atan2 broadcast_in_dim concatenate convert_element_type copy "
    "div dot_general eq exp exp2 ge gt integer_pow iota is_finite le log log1p "
    "logistic lt max min mul ne neg not or pow reduce_max reduce_min reduce_sum "
    "reshape rsqrt scan select_n sign split square sqrt squeeze stop_gradient sub tanh "
    "transpose".split()
)
"""Operations of a step that Mosaic compiles."""

DTYPES = frozenset(("float32", "bfloat16", "int32", "bool"))


def objection(program: Program) -> str | None:
    """See `autodiff`."""
    if unknown := program.primitives - PRIMITIVES:
        return (
            f"the TPU kernel has no {', '.join(sorted(unknown))}, which the step uses"
        )
    if unknown := program.dtypes - DTYPES:
        return f"the TPU kernel takes no {', '.join(sorted(unknown))}"
    return None


def forward(program: Program, size, carry, xs, consts, *, every, interpret):
    """See `autodiff`."""
    side = SideBySide(program, size, xs, consts)
    ends, ys, saved = _forward(
        side,
        size // side.count,
        side.carry(carry, program.carry),
        side.operands(xs, program.x),
        side.operands(consts, program.consts),
        every,
        interpret,
    )
    return (
        side.elements(ends, program.carry),
        side.elements(ys, program.y),
        side.elements(saved, program.carry if every else ()),
    )


def backward(
    program: Program, size, saved, xs, consts, d_carry, d_ys, *, every, interpret
):
    """See `autodiff`."""
    side = SideBySide(program, size, xs, consts)
    results = _backward(
        side,
        size // side.count,
        side.arrays(saved, program.carry),
        side.operands(xs, program.x),
        side.operands(consts, program.consts),
        side.arrays(d_carry, floats(program.carry)),
        side.arrays(d_ys, floats(program.y)),
        every,
        interpret,
    )
    return tuple(map(side.elements, results, program.cotangents))


def _forward(side: SideBySide, size, carry, xs, consts, every, interpret):
    leaves, step = side.leaves, compilable(side.function("step"))
    chunks = xs[0].array.shape[1]
    needed = _bytes(leaves, [step], 3 if every else 2)
    group = _group(side, size, [*carry, *xs, *consts], needed)

    def kernel(constants, starts, x, held, ends, ys, saved):
        chunk = pl.program_id(1)

        @pl.when(chunk == 0)
        def _():
            for g in range(group):
                store(ends, g, load(starts, leaves.carry, g))

        if every:

            @pl.when(jax.lax.rem(chunk, every) == 0)
            def _():
                for g in range(group):
                    store(saved, g, load(ends, leaves.carry, g))

        shared = _load_constants(constants, step)
        given = [
            (
                *load(ends, leaves.carry, g),
                *load(x, leaves.x, g, 0),
                *load(held, leaves.consts, g),
            )
            for g in range(group)
        ]
        for g, results in enumerate(step.each(shared, given, loop)):
            after, y = _split(results, len(ends))
            store(ends, g, after)
            store(ys, g, y, 0)

    operands = [
        blocks.constants(step),
        [blocks.taken(o, size, group) for o in carry],
        [blocks.taken(o, size, group, (1, lambda i: i)) for o in xs],
        [blocks.taken(o, size, group) for o in consts],
    ]
    kept = leaves.carry if every else ()
    stretches = pl.cdiv(chunks, every) if every else 0

    def stretch(i):
        return jax.lax.div(i, every)

    results = [
        [blocks.given(leaf, size, group) for leaf in leaves.carry],
        [
            blocks.given(leaf, size, group, (chunks, 1, lambda i: i))
            for leaf in leaves.y
        ],
        [
            blocks.given(
                leaf, size, group, (stretches, None, lambda i: jax.lax.div(i, every))
            )
            for leaf in (leaves.carry if every else ())
        ],
    ]
    grid = (size // group, chunks)
    products = size * chunks * side.multiply_adds("step")
    ends, ys, saved = _call(
        "fused_scan_forward", kernel, grid, operands, results, interpret, products
    )
    return (
        blocks.shaped(ends, leaves.carry, size),
        blocks.shaped(ys, leaves.y, size, chunks),
        blocks.shaped(saved, kept, size, stretches),
    )


def _backward(
    side: SideBySide, size, saved, xs, consts, d_carry, d_ys, every, interpret
):
    leaves, pull_back = side.leaves, compilable(side.function("pull_back"))
    advance = compilable(side.function("advance")) if every > 1 else None
    chunks = xs[0].array.shape[1]
    stretches = pl.cdiv(chunks, every)
    functions = [pull_back] if advance is None else [advance, pull_back]
    needed = _bytes(leaves, functions, 3 + every, 2 * every)
    group = _group(side, size, [*xs, *consts], needed)
    d_carries, d_xs, d_consts = leaves.cotangents
    d_y = floats(leaves.y)

    def kernel(
        constants, saved, x, held, d_ends, d_ys, d_starts, d_x, d_held, *carries
    ):
        stretch = stretches - 1 - pl.program_id(1)
        of_advance, of_pull_back = constants

        @pl.when(pl.program_id(1) == 0)
        def _():
            for g in range(group):
                store(d_starts, g, load(d_ends, d_carries, g))
            for ref in d_held:
                ref[...] = jnp.zeros_like(ref)

        def forward_again(i, _):
            shared = _load_constants(of_advance, advance)
            given = [
                (
                    *load(carries, leaves.carry, g, i),
                    *load(x, leaves.x, g, i),
                    *load(held, leaves.consts, g),
                )
                for g in range(group)
            ]
            for g, after in enumerate(advance.each(shared, given, loop)):
                store(carries, g, after, i + 1)

        def back(i):
            shared = _load_constants(of_pull_back, pull_back)
            start = (carries, i) if every > 1 else (saved,)
            given = [
                (
                    *load(start[0], leaves.carry, g, *start[1:]),
                    *load(x, leaves.x, g, i),
                    *load(held, leaves.consts, g),
                    *load(d_starts, d_carries, g),
                    *load(d_ys, d_y, g, i),
                )
                for g in range(group)
            ]
            for g, results in enumerate(pull_back.each(shared, given, loop)):
                parts = _split(results, len(d_starts), len(d_x))
                store(d_starts, g, parts[0])
                store(d_x, g, parts[1], i)
                for ref, part in zip(d_held, parts[2], strict=True):
                    ref[g] += part.reshape(ref.shape[1:]).astype(ref.dtype)

        if every == 1:
            back(0)
        else:
            count = every
            if chunks % every:
                count = jnp.minimum(every, chunks - stretch * every)
            for g in range(group):
                store(carries, g, load(saved, leaves.carry, g), 0)
            jax.lax.fori_loop(0, count - 1, forward_again, None)
            jax.lax.fori_loop(0, count, lambda i, _: back(count - 1 - i), None)

    def reverse(i):
        return stretches - 1 - i

    operands = [
        [
            blocks.constants(advance) if every > 1 else [],
            blocks.constants(pull_back),
        ],
        [blocks.taken(Operand(s, 1), size, group, (None, reverse)) for s in saved],
        [blocks.taken(o, size, group, (every, reverse)) for o in xs],
        [blocks.taken(o, size, group) for o in consts],
        [blocks.taken(Operand(d, 1), size, group) for d in d_carry],
        [blocks.taken(Operand(d, 1), size, group, (every, reverse)) for d in d_ys],
    ]
    results = [
        [blocks.given(leaf, size, group) for leaf in d_carries],
        [blocks.given(leaf, size, group, (chunks, every, reverse)) for leaf in d_xs],
        [blocks.given(_accumulator(leaf), size, group) for leaf in d_consts],
    ]
    scratch = [
        pltpu.VMEM((group, every, *tile(leaf.shape)), stored(leaf.dtype))
        for leaf in (leaves.carry if every > 1 else ())
    ]
    grid = (size // group, stretches)
    again = (chunks - stretches) * side.multiply_adds("advance")
    products = size * (again + chunks * side.multiply_adds("pull_back"))
    d_carry, d_x, d_held = _call(
        "fused_scan_backward",
        kernel,
        grid,
        operands,
        results,
        interpret,
        products,
        scratch,
    )
    return (
        blocks.shaped(d_carry, d_carries, size),
        blocks.shaped(d_x, d_xs, size, chunks),
        blocks.shaped(d_held, d_consts, size),
    )


def _bytes(leaves: Leaves, functions, carries: int, chunks: int = 1) -> int:
    """On chip for one element: blocks of so many carries and chunks, twice each.

    And the values of the functions that it runs through, those of their loops twice:
    where a loop keeps them, and in a round.
    """
    flow = padded(leaves.x) + padded(leaves.y)
    held = 2 * (carries * padded(leaves.carry) + chunks * flow)
    return held + max(loop_bytes(each) + value_bytes(each) for each in functions)


def _group(side: SideBySide, size: int, operands, element_bytes: int) -> int:
    """Programs side by side per grid step; all find their rows in one block.

    As many as the estimate lets in, with room for what it does not count: values that
    the compiler spills (Atlas's backward pass on v5p took 66.1 MiB where 59.6 were
    expected).
    """
    group = gcd(size, max(1, GROUP // side.count))
    for operand in operands:
        group = gcd(group, operand.rows if operand.repeat == 1 else operand.repeat)
    while group > 1 and group * element_bytes > (1 - SPILLED) * VMEM_BYTES:
        group = next(n for n in range(group - 1, 0, -1) if group % n == 0)
    return group


def _accumulator(leaf: Struct) -> Struct:
    return Struct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))


def _call(name, kernel, grid, operands, results, interpret, products, scratch=()):
    is_pair = lambda x: isinstance(x, tuple)  # noqa: E731
    first, second = (
        partial(jax.tree.map, lambda pair, i=i: pair[i], is_leaf=is_pair)
        for i in (0, 1)
    )
    call = pl.pallas_call(
        kernel,
        out_shape=first(results),
        grid=grid,
        in_specs=second(operands),
        out_specs=second(results),
        scratch_shapes=list(scratch),
        compiler_params=PARAMS,
        cost_estimate=_cost(products, jax.tree.leaves(first([operands, results]))),
        interpret=interpret,
        name=name,
    )
    return call(*first(operands))


def _cost(multiply_adds: int, arrays: Sequence) -> pl.CostEstimate:
    """What XLA's scheduler is told of a kernel."""
    size = sum(prod(array.shape) * array.dtype.itemsize for array in arrays)
    return pl.CostEstimate(
        flops=2 * multiply_adds, transcendentals=0, bytes_accessed=size
    )


def _load_constants(refs, function):
    pairs = zip(refs, function.constants, strict=True)
    return [value(ref[...], constant) for ref, constant in pairs]


def _split(values: Sequence, *sizes: int) -> list[list]:
    parts, start = [], 0
    for size in sizes:
        parts.append(list(values[start : start + size]))
        start += size
    return [*parts, list(values[start:])]
