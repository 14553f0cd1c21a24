"""A step, traced into what a kernel can run: flat jaxprs that capture no arrays.

Three functions of flat lists of arrays follow from one `step(carry, x, consts)`:

    step       (carry, x, consts) -> (carry, y)
    advance    (carry, x, consts) -> carry
    pull_back  (carry, x, consts, d_carry, d_y) -> (d_carry, d_x, d_consts)

with cotangents for the leaves of a floating dtype only. The arrays that a step brings
along (masks, triangular matrices) may not be captured by a kernel, so they become its
first operands, `constants`. Calls inside are inlined; loops of a fixed number of rounds
stay, as `scan`s whose body captures and calls nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import partial_eval

from pallas_kernels.fused_scan.simplify import Simplifier

Struct = jax.ShapeDtypeStruct

Rewrite = Callable[[Any, Sequence, Callable], list]
"""`rewrite(equation, inputs, bind)`: its results; `bind(inputs)` if it stays."""

CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}
"""Primitives that only call a jaxpr, and the name of the parameter that holds it."""


@dataclass(frozen=True)
class Function:
    """A jaxpr of flat lists of arrays, to be given its constants first."""

    jaxpr: Any
    constants: tuple[jax.Array, ...]

    def __call__(self, constants: Sequence, *operands: jax.Array) -> list[jax.Array]:
        return _evaluate(self.jaxpr, constants, [operands])[0]

    def each(
        self,
        constants: Sequence,
        operands: Sequence[Sequence],
        loop: Callable[["Loop", list[list]], list[list]],
    ) -> list[list]:
        """Its results for several lists of operands, operation by operation.

        What is written next to each other can overlap in the hardware. loop: how the
        results of a loop follow from its inputs, each for all of the lists.
        """
        return _evaluate(self.jaxpr, constants, operands, loop)


@dataclass(frozen=True)
class Loop:
    """A `lax.scan`: inputs are consts, carry and xs, results carry and stacked ys."""

    body: Function
    length: int
    reverse: bool
    consts: int
    carries: int

    @staticmethod
    def of(equation) -> "Loop":
        params = equation.params
        return Loop(
            Function(params["jaxpr"].jaxpr, ()),
            params["length"],
            params["reverse"],
            params["num_consts"],
            params["num_carry"],
        )


@dataclass(frozen=True)
class Program:
    """All that a backend needs to know of a step; shapes are of one element."""

    carry: tuple[Struct, ...]
    x: tuple[Struct, ...]
    consts: tuple[Struct, ...]
    y: tuple[Struct, ...]
    step: Function
    advance: Function
    pull_back: Function

    @property
    def cotangents(self) -> tuple[list[Struct], list[Struct], list[Struct]]:
        """What `pull_back` gives, of carry, x and consts."""
        avals = (var.aval for var in self.pull_back.jaxpr.outvars)
        results = iter([Struct(aval.shape, aval.dtype) for aval in avals])
        parts = (self.carry, self.x, self.consts)
        return tuple([next(results) for _ in floats(part)] for part in parts)

    @property
    def primitives(self) -> frozenset[str]:
        """Names of all operations that its functions are made of."""
        functions = (self.step, self.advance, self.pull_back)
        return frozenset().union(*(_primitives(f.jaxpr) for f in functions))

    @property
    def dtypes(self) -> frozenset[str]:
        """Names of the dtypes of its operands and results."""
        leaves = (*self.carry, *self.x, *self.consts, *self.y)
        return frozenset(leaf.dtype.name for leaf in leaves)


def _primitives(jaxpr) -> set[str]:
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in core.jaxprs_in_params(equation.params):
            names |= _primitives(inner)
    return names


def is_float(leaf: Any) -> bool:
    """Whether an array or shape has cotangents."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def floats(leaves: Sequence) -> list:
    """Those that have cotangents."""
    return [leaf for leaf in leaves if is_float(leaf)]


def multiply_adds(jaxpr) -> int:
    """Of the products in a jaxpr; of loops whose rounds are data, one round."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            contracted = prod(left[axis] for axis in axes)
            total += contracted * prod(equation.outvars[0].aval.shape)
        rounds = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in core.jaxprs_in_params(equation.params):
            total += rounds * multiply_adds(inner)
    return total


def trace(
    step: Callable[..., list],
    carry: Sequence[Struct],
    x: Sequence[Struct],
    consts: Sequence[Struct],
) -> Program:
    """The program of `step(*carry, *x, *consts) -> [*carry, *y]`."""
    operands = (*carry, *x, *consts)
    outputs = jax.eval_shape(step, *operands)

    def pull_back(*given):
        given, cotangents = given[: len(operands)], given[len(operands) :]

        def of_floats(*values):
            values = iter(values)
            full = [next(values) if is_float(leaf) else leaf for leaf in given]
            return floats(step(*full))

        _, pull = jax.vjp(of_floats, *floats(given))
        return pull(list(cotangents))

    whole = _trace(step, *operands)
    return Program(
        carry=tuple(carry),
        x=tuple(x),
        consts=tuple(consts),
        y=tuple(outputs[len(carry) :]),
        step=whole,
        advance=_keep(whole, [i < len(carry) for i in range(len(outputs))]),
        pull_back=_trace(pull_back, *operands, *floats(outputs)),
    )


def _trace(function: Callable, *operands: Struct) -> Function:
    closed = jax.make_jaxpr(function)(*operands)
    traced = Function(closed.jaxpr, tuple(closed.consts))
    return rewritten(traced, Simplifier())


def rewritten(function: Function, rewrite: Rewrite) -> Function:
    """The same with calls inlined, every operation as `rewrite` has it."""
    jaxpr, constants = function.jaxpr, function.constants
    closed = jax.make_jaxpr(lambda *xs: _inline(jaxpr, constants, xs, rewrite))(
        *(Struct(var.aval.shape, var.aval.dtype) for var in jaxpr.invars)
    )
    everything = Function(closed.jaxpr, tuple(closed.consts))
    return _keep(everything, [True] * len(closed.jaxpr.outvars))


def _keep(function: Function, outputs: Sequence[bool]) -> Function:
    """The same with some of the outputs only, and nothing computed in vain."""
    jaxpr, used, _ = partial_eval.dce_jaxpr_consts(function.jaxpr, outputs, True)
    constants = zip(function.constants, used, strict=True)
    return Function(jaxpr, tuple(c for c, use in constants if use))


def _inline(jaxpr, constants, operands, rewrite=None):
    """Evaluate a jaxpr, and those that it calls as if they were written in it."""
    return _evaluate(jaxpr, constants, [operands], None, rewrite)[0]


def _evaluate(jaxpr, constants, elements, loop=None, rewrite=None):
    shared = dict(zip(jaxpr.constvars, constants, strict=True))
    values = [shared | dict(zip(jaxpr.invars, e, strict=True)) for e in elements]

    def read(known, atom):
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        inputs = [[read(known, atom) for atom in equation.invars] for known in values]
        if loop and equation.primitive.name == "scan":
            results = loop(Loop.of(equation), inputs)
        else:
            results = [_apply(equation, each, rewrite) for each in inputs]
        for known, each in zip(values, results, strict=True):
            known |= zip(equation.outvars, each, strict=True)

    def result(known, atom):
        if not isinstance(atom, core.Literal):
            return known[atom]
        # An operation, so that every result of a traced function is a variable of it.
        value = jnp.asarray(atom.val, atom.aval.dtype)
        return jax.lax.max(value, value)

    return [[result(known, atom) for atom in jaxpr.outvars] for known in values]


def _apply(equation, inputs, rewrite=None):
    name = equation.primitive.name
    if name not in CALLS:
        params = equation.params

        def bind(inputs):
            given = params
            if name == "scan":
                captured, given = _closed(params)
                inputs = [*captured, *inputs]
            results = equation.primitive.bind(*inputs, **given)
            return results if equation.primitive.multiple_results else [results]

        return rewrite(equation, inputs, bind) if rewrite else bind(inputs)
    called = equation.params[CALLS[name]]
    if isinstance(called, core.ClosedJaxpr):
        return _inline(called.jaxpr, called.consts, inputs, rewrite)
    return _inline(called, (), inputs, rewrite)


def _closed(params):
    """Of a scan: the arrays that its body captures, and it with them as its consts."""
    body = params["jaxpr"]
    inlined = jax.make_jaxpr(lambda *xs: _inline(body.jaxpr, body.consts, xs))
    closed = inlined(*body.in_avals)
    captured = len(closed.consts)

    def given_all(*operands):
        return jax.core.eval_jaxpr(
            closed.jaxpr, operands[:captured], *operands[captured:]
        )

    avals = [Struct(c.shape, c.dtype) for c in closed.consts]
    return closed.consts, params | {
        "jaxpr": jax.make_jaxpr(given_all)(*avals, *body.in_avals),
        "num_consts": params["num_consts"] + captured,
    }
