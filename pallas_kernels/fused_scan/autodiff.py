"""What every kernel of `fused_scan` shares: batching, residuals, derivatives.

A backend is a module with three functions, and knows nothing of pytrees, of vmap or of
how derivatives are taken. `objection(program) -> str | None` tells what of a program it
cannot run, None: nothing. The others take a `program.Program` and flat lists of
operands in its order, for `size` independent elements (the merged vmapped axes):

    forward(program, size, carry, xs, consts, *, every, interpret)
        -> (carry, ys, saved)
    backward(program, size, saved, xs, consts, d_carry, d_ys, *, every, interpret)
        -> (d_carry, d_xs, d_consts)

carry, xs, consts   lists of `Operand`: carry and consts `[rows, *shape]`, xs `[rows,
                    chunks, *shape]`; element n reads row (n // repeat) % rows, so that
                    what all or some elements share is stored once
carry, ys (out)     lists of arrays `[size, *shape]`, `[size, chunks, *shape]`
every               a carry is saved at chunks 0, every, 2 every, ...; None: none is,
                    and `saved` is empty
saved               list like carry, `[size, ceil(chunks / every), *shape]`
d_carry, d_ys (in)  arrays like the outputs, those of a floating dtype only
d_carry, d_xs, d_consts (out)
                    one array for each operand of a floating dtype, `[size, ...]`, in
                    the operand's dtype; sums over chunks in at least float32
interpret           what `pl.pallas_call` takes under that name: False, or how to run
                    the kernel without its chip

forward runs `program.step`; backward goes through the chunks in reverse, each stretch
of `every` chunks first forward again from its saved carry by `program.advance`, then
back by `program.pull_back`. The `constants` of these three are arrays that every
element reads, to be brought into the kernel as operands and given to the function that
they are of.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from pallas_kernels.fused_scan import program as programs
from pallas_kernels.fused_scan.partition import by_batch
from pallas_kernels.fused_scan.program import Program, is_float

SAVED_BYTES = 2**22
"""What the saved carries of one element may take; 64 elements then take 256 MiB."""


class Unsupported(ValueError):
    """A step that a backend's kernels cannot run; the message says why."""


class Operand(NamedTuple):
    """Rows of an operand; element n reads row (n // repeat) % rows."""

    array: jax.Array
    repeat: int

    @property
    def rows(self) -> int:
        """How many different ones there are."""
        return self.array.shape[0]


class Backend(Protocol):
    """A module that runs a program on some kind of chip; see above."""

    def objection(self, program: Program) -> str | None: ...

    def forward(self, program, size, carry, xs, consts, *, every, interpret): ...

    def backward(
        self, program, size, saved, xs, consts, d_carry, d_ys, *, every, interpret
    ): ...


def fused_scan(
    backend: Backend, step, carry, xs, consts, *, interpret: Any = False
) -> tuple[Any, Any]:
    """`api.fused_scan` by the kernels of a backend; Unsupported if they cannot."""
    leaves, structures = zip(*map(jax.tree.flatten, (carry, xs, consts)), strict=True)
    carry, xs, consts = ([jnp.asarray(x) for x in part] for part in leaves)
    structure = None

    def flat_step(*operands):
        nonlocal structure
        parts = _cut(operands, len(carry), len(xs))
        after, y = step(*map(jax.tree.unflatten, structures, parts))
        y, structure = jax.tree.flatten(y)
        return *jax.tree.leaves(after), *y

    x_shapes = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    operands = [*map(_struct, carry), *x_shapes, *map(_struct, consts)]
    closed = jax.make_jaxpr(flat_step)(*operands)
    # Values of an outer transformation that the step captured are operands like others.
    is_captured = [isinstance(c, jax.core.Tracer) for c in closed.consts]
    captured = [c for c, is_in in zip(closed.consts, is_captured, strict=True) if is_in]

    def pure_step(*given):
        given, values = given[: len(operands)], iter(given[len(operands) :])
        pairs = zip(closed.consts, is_captured, strict=True)
        constants = [next(values) if is_in else c for c, is_in in pairs]
        return jax.core.eval_jaxpr(closed.jaxpr, constants, *given)

    consts = [*consts, *captured]
    program = programs.trace(
        pure_step, list(map(_struct, carry)), x_shapes, list(map(_struct, consts))
    )
    if objection := backend.objection(program):
        raise Unsupported(objection)
    after, ys = _differentiable(backend, program, interpret)(carry, xs, consts)
    return jax.tree.unflatten(structures[0], after), jax.tree.unflatten(structure, ys)


def _struct(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _cut(operands: Sequence, *sizes: int) -> list[list]:
    """A list in parts of the given sizes, and the rest."""
    parts, start = [], 0
    for size in sizes:
        parts.append(list(operands[start : start + size]))
        start += size
    return [*parts, list(operands[start:])]


def _differentiable(backend: Backend, program: Program, interpret) -> Callable:
    """The scan of flat lists `(carry, xs, consts) -> (carry, ys)`, with derivative."""
    carries, ys = len(program.carry), len(program.y)

    def run(carry, xs, consts, every):
        def call(size, operands):
            parts = _cut(operands, carries, len(xs))
            results = backend.forward(
                program, size, *parts, every=every, interpret=interpret
            )
            return [array for part in results for array in part]

        results = _over_elements(call, [*carry, *xs, *consts])
        return _cut(results, carries, ys)

    @jax.custom_vjp
    def scan(carry, xs, consts):
        after, outputs, _ = run(carry, xs, consts, None)
        return after, outputs

    def forward(carry, xs, consts):
        every = stretch(program, xs[0].shape[0])
        after, outputs, saved = run(carry, xs, consts, every)
        return (after, outputs), (saved, xs, consts)

    def backward(residuals, cotangents):
        saved, xs, consts = residuals
        every = stretch(program, xs[0].shape[0])
        d_after, d_outputs = (
            [d for d, leaf in zip(part, like, strict=True) if is_float(leaf)]
            for part, like in zip(cotangents, (program.carry, program.y), strict=True)
        )
        operands = [saved, xs, consts, d_after, d_outputs]

        def call(size, operands):
            parts = _cut(operands, *map(len, (saved, xs, consts, d_after)))
            # Written for this very call: one row for each element.
            whole = [[_spread(o, size) for o in parts[i]] for i in (0, 3, 4)]
            results = backend.backward(
                program,
                size,
                whole[0],
                *parts[1:3],
                *whole[1:],
                every=every,
                interpret=interpret,
            )
            return [array for part in results for array in part]

        flat = [array for part in operands for array in part]
        given = iter(_over_elements(call, flat))
        return tuple(
            [next(given) if is_float(leaf) else None for leaf in part]
            for part in (program.carry, program.x, program.consts)
        )

    scan.defvjp(forward, backward)
    return scan


def stretch(program: Program, chunks: int) -> int:
    """Chunks from one saved carry to the next, so that all fit into SAVED_BYTES."""
    size = sum(prod(leaf.shape) * leaf.dtype.itemsize for leaf in program.carry)
    return min(chunks, -(-chunks * size // SAVED_BYTES)) or 1


def _over_elements(call: Callable, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """`call(size, operands)` where vmapped axes are merged into one of that size.

    call takes a list of `Operand` and gives arrays `[size, ...]`.
    """

    def batched(masks: tuple[tuple[bool, ...], ...]):
        """The call where operand i has those of the batch axes that masks[i] tells."""

        def merged(*arrays):
            sizes = _sizes(arrays, masks)
            rows = [_merge(a, sizes, m) for a, m in zip(arrays, masks, strict=True)]
            results = call(prod(sizes), rows)
            return [r.reshape(*sizes, *r.shape[1:]) for r in results]

        @custom_vmap
        def apply(*arrays):
            return by_batch(merged, _sizes(arrays, masks), masks)(*arrays)

        @apply.def_vmap
        def over_one_more(axis_size, in_batched, *arrays):
            wider = tuple((b, *m) for b, m in zip(in_batched, masks, strict=True))
            results = batched(wider)(*arrays)
            return results, [True] * len(results)

        return apply

    return batched(((),) * len(operands))(*operands)


def _sizes(arrays, masks) -> tuple[int, ...]:
    """Of the batch axes, each from an operand that has it."""
    sizes = []
    for axis in range(len(masks[0])):
        pairs = zip(arrays, masks, strict=True)
        array, mask = next(pair for pair in pairs if pair[1][axis])
        sizes.append(array.shape[sum(mask[:axis])])
    return tuple(sizes)


def _merge(array: jax.Array, sizes: tuple[int, ...], mask: tuple[bool, ...]) -> Operand:
    """Its batch axes as rows; those that it lacks inside others are written out."""
    own = [i for i, has in enumerate(mask) if has]
    if not own:
        return Operand(array[None], prod(sizes))
    first, last = own[0], own[-1]
    for i in range(first, last):
        if not mask[i]:
            position = i - first
            array = jnp.broadcast_to(
                jnp.expand_dims(array, position),
                (*array.shape[:position], sizes[i], *array.shape[position:]),
            )
    span = sizes[first : last + 1]
    array = array.reshape(prod(span), *array.shape[len(span) :])
    return Operand(array, prod(sizes[last + 1 :]))


def _spread(operand: Operand, size: int) -> jax.Array:
    """One row for each element."""
    array = jnp.repeat(operand.array, operand.repeat, axis=0)
    return jnp.tile(array, (size // len(array), *(1,) * (array.ndim - 1)))
