"""A function to compile, and what can be said of it before it is compiled."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
from jax.extend import core


class Case(NamedTuple):
    """One row: the same function once with kernels and once without."""

    name: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any] | None  # through XLA alone; None: not compared
    operands: tuple[Any, ...]  # pytrees of ShapeDtypeStruct
    tokens: int  # that it reads, of all elements together


class Work(NamedTuple):
    """What a program must do, whatever compiles it."""

    multiply_adds: int  # of matrix products, as the kernels' estimates have them
    bytes: int  # into and out of kernels
    blocks: int  # bytes on chip of a kernel's operands and results, the most of any
    steps: dict[str, int]  # grid steps of each kernel, by name
    loops: dict[str, list[int]]  # rounds of the loops in each, an outer one first


def work(function: Callable, *operands: Any) -> Work:
    """Count the work of a function's kernels from its jaxpr."""
    kernels = list(_kernels(jax.make_jaxpr(function)(*operands).jaxpr))
    steps = [prod(k.params["grid_mapping"].grid) for k in kernels]
    pairs = list(zip(kernels, steps, strict=True))
    return Work(
        sum(k.params["cost_estimate"].flops // 2 for k in kernels),
        sum(_size(atom.aval) for k in kernels for atom in (*k.invars, *k.outvars)),
        max((_blocks(k) for k in kernels), default=0),
        {k.params["name"]: n for k, n in pairs},
        {k.params["name"]: list(_loops(k.params["jaxpr"])) for k in kernels},
    )


def _kernels(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for inner in core.jaxprs_in_params(equation.params):
            if equation.primitive.name != "pallas_call":
                yield from _kernels(inner)


def _loops(jaxpr):
    for equation in jaxpr.eqns:
        # One round is no loop.
        if equation.primitive.name == "scan" and equation.params["length"] > 1:
            yield equation.params["length"]
        for inner in core.jaxprs_in_params(equation.params):
            yield from _loops(inner)


def _size(aval) -> int:
    return prod(aval.shape) * aval.dtype.itemsize


def _blocks(kernel) -> int:
    """Bytes of its blocks in VMEM, twice each: one is read while the next arrives."""
    total = 0
    for block in kernel.params["grid_mapping"].block_mappings:
        shape = [size for size in block.block_aval.shape]
        lanes, rows = -(-shape[-1] // 128) * 128, -(-shape[-2] // 8) * 8
        total += 2 * prod(shape[:-2]) * rows * lanes * block.block_aval.dtype.itemsize
    return total
