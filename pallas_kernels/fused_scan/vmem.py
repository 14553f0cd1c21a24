"""Values of a kernel on TPU and the memory that holds them: VMEM.

Mosaic takes arrays with at least two axes, which a block holds whole, and no bools.
"""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core

from pallas_kernels.fused_scan.program import Function, Loop


def tile(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with at least two axes."""
    return (1,) * (2 - len(shape)) + tuple(shape)


def stored(dtype) -> jnp.dtype:
    """The dtype that stands for it in memory."""
    return jnp.dtype(jnp.int32) if dtype == jnp.bool_ else jnp.dtype(dtype)


def padded(leaves: Sequence) -> int:
    """Bytes of arrays of 32 bits: rows come in eights and lanes in 128."""
    tiles = (tile(leaf.shape) for leaf in leaves)
    return sum(
        4 * prod(t[:-2]) * pl.cdiv(t[-2], 8) * 8 * pl.cdiv(t[-1], 128) * 128
        for t in tiles
    )


def value(array: jax.Array, leaf) -> jax.Array:
    """What an array read from memory stands for."""
    array = array.reshape(leaf.shape)
    return array != 0 if leaf.dtype == jnp.bool_ else array


def load(refs, leaves, element: int, *index) -> list[jax.Array]:
    """The leaves of one element (the only row where all share it), at a chunk."""
    return [
        value(ref[(element if ref.shape[0] > 1 else 0, *index)], leaf)
        for ref, leaf in zip(refs, leaves, strict=True)
    ]


def store(refs, element: int, values, *index) -> None:
    """Write the leaves of one element."""
    for ref, array in zip(refs, values, strict=True):
        at = (element, *index)
        ref[at] = array.reshape(ref.shape[len(at) :]).astype(ref.dtype)


def loop(this: Loop, inputs: Sequence[Sequence[jax.Array]]) -> list[list[jax.Array]]:
    """A loop of several elements at once, as `Function.each` asks for it.

    What it carries, takes apart and stacks is in VMEM while it runs; scalars that it
    carries (counters) are not.
    """
    size, first_x = len(inputs), this.consts + this.carries
    avals = [v.aval for v in this.body.jaxpr.invars]
    carries = avals[this.consts : first_x]
    ys = [v.aval for v in this.body.jaxpr.outvars[this.carries :]]
    is_held = [leaf.ndim > 0 for leaf in carries]

    def split(values):
        """What VMEM holds of a carry, and its scalars."""
        pairs = list(zip(values, is_held, strict=True))
        return [v for v, held in pairs if held], [v for v, held in pairs if not held]

    def merged(held, scalars):
        held, scalars = iter(held), iter(scalars)
        return [next(held if is_in else scalars) for is_in in is_held]

    held = split(carries)[0]

    def memory(leaf, lead=()):
        return pltpu.VMEM((size, *lead, *tile(leaf.shape)), stored(leaf.dtype))

    def run(carried, xs, stacked):
        starts = []
        for g, each in enumerate(inputs):
            start, scalars = split(each[this.consts : first_x])
            store(carried, g, start)
            store(xs, g, each[first_x:])
            starts.append(scalars)

        def round_(i, scalars):
            i = this.length - 1 - i if this.reverse else i
            given = [
                (
                    *each[: this.consts],
                    *merged(load(carried, held, g), scalars[g]),
                    *load(xs, avals[first_x:], g, i),
                )
                for g, each in enumerate(inputs)
            ]
            after = []
            for g, results in enumerate(this.body.each((), given, loop)):
                values, counters = split(results[: this.carries])
                store(carried, g, values)
                store(stacked, g, results[this.carries :], i)
                after.append(counters)
            return after

        scalars = jax.lax.fori_loop(0, this.length, round_, starts)
        return [
            [
                *merged(load(carried, held, g), scalars[g]),
                *(
                    value(
                        ref[g], jax.ShapeDtypeStruct((this.length, *y.shape), y.dtype)
                    )
                    for ref, y in zip(stacked, ys, strict=True)
                ),
            ]
            for g in range(size)
        ]

    return pl.run_scoped(
        run,
        [memory(leaf) for leaf in held],
        [memory(leaf, (this.length,)) for leaf in avals[first_x:]],
        [memory(leaf, (this.length,)) for leaf in ys],
    )


def value_bytes(function: Function) -> int:
    """What a function of one element computes and still needs, where it is most.

    Too high: of what is only passed on, not all is ever in memory.
    """
    return _value_bytes(function.jaxpr)


def _value_bytes(jaxpr) -> int:
    lasts = {var: len(jaxpr.eqns) for var in jaxpr.outvars}
    for moment, equation in enumerate(jaxpr.eqns):
        for atom in equation.invars:
            if not isinstance(atom, core.Literal):
                lasts[atom] = max(moment, lasts.get(atom, moment))
    alive, most = {}, 0
    for moment, equation in enumerate(jaxpr.eqns):
        for var in equation.outvars:
            alive[var] = padded([var.aval]) * var.aval.dtype.itemsize // 4
        inner = map(_value_bytes, core.jaxprs_in_params(equation.params))
        most = max(most, sum(alive.values()) + max(inner, default=0))
        alive = {v: size for v, size in alive.items() if lasts.get(v, -1) > moment}
    return most


def loop_bytes(function: Function) -> int:
    """What the loops of one element keep in VMEM, where it is most."""
    return _loop_bytes(function.jaxpr)


def _loop_bytes(jaxpr) -> int:
    most = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            this = Loop.of(equation)
            carry_and_xs = [v.aval for v in equation.invars[this.consts :]]
            ys = [v.aval for v in equation.outvars[this.carries :]]
            inner = _loop_bytes(this.body.jaxpr)
            most = max(most, padded(carry_and_xs) + padded(ys) + inner)
    return most
