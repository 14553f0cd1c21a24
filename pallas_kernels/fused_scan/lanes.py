"""Several elements side by side in the lanes of a TPU, as one element of a program.

Registers have 128 lanes, and matrix units as many columns; a head of 64 channels fills
half of them. `Lanes` evaluates a jaxpr of one element for several of them at once.
Every value has one of three forms:

    Side     `[..., R, count n]`, where n lanes of each element fit: what is elementwise
             is done for all of them at once, and their products x y are one, of x with
             y in blocks along a diagonal
    Each     an array for each element: where the lanes are full, and columns `[C, 1]`
    Shared   one array that all elements read

Products with blocks take the zeros between them as operands: infinities of one element
become NaN in those beside it.
"""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from pallas_kernels.fused_scan.tiles import ELEMENTWISE

LANES = 128


class Shared(NamedTuple):
    """One array that all elements read."""

    x: jax.Array


class Side(NamedTuple):
    """The arrays of all elements side by side, `[..., R, count n]`."""

    x: jax.Array


class Each(NamedTuple):
    """An array for each element."""

    xs: Sequence[jax.Array]


Value = Shared | Side | Each


class Lanes:
    """Evaluates jaxprs of one element for `count` of them.

    A method `_name` gives the result of an equation of the primitive with that name, or
    None where it is to be computed for each element apart.
    """

    def __init__(self, count: int):
        self.count = count

    def fit(self, shape: tuple[int, ...]) -> bool:
        """Whether arrays of that shape have room side by side."""
        return len(shape) > 0 and 1 < shape[-1] <= LANES // self.count

    def wide(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What is side by side of arrays of that shape."""
        return (*shape[:-1], self.count * shape[-1])

    def own(self, shape: tuple[int, ...], i: int) -> jax.Array:
        """Whether a lane is of element i, in what is side by side of that shape."""
        width = shape[-1] // self.count
        lane = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
        if i == 0:
            return lane < width
        if i == self.count - 1:
            return lane >= i * width
        return (lane >= i * width) & (lane < (i + 1) * width)

    def pick(self, options: Sequence[jax.Array]) -> jax.Array:
        """The lanes of every element from the array that is its own."""
        if options[0].dtype == jnp.bool_:
            # Mosaic does not select between masks.
            options = [self.own(x.shape, i) & x for i, x in enumerate(options)]
            return reduce(jnp.logical_or, options)
        picked = options[0]
        for i in range(1, self.count):
            picked = jnp.where(self.own(picked.shape, i), options[i], picked)
        return picked

    def only(self, x: jax.Array, i: int, fill=0) -> jax.Array:
        """x with the lanes of all but element i at another number."""
        return jnp.where(self.own(x.shape, i), x, jnp.asarray(fill, x.dtype))

    def diagonal(self, y: jax.Array) -> jax.Array:
        """[R, count n] as blocks along the diagonal: [count R, count n]."""
        return jnp.concatenate([self.only(y, i) for i in range(self.count)], axis=0)

    def each(self, value: Value) -> Sequence[jax.Array]:
        """The value of every element."""
        match value:
            case Shared(x):
                return [x] * self.count
            case Each(xs):
                return xs
            case Side(x):
                width = x.shape[-1] // self.count
                return [x[..., i * width : (i + 1) * width] for i in range(self.count)]

    def side(self, value: Value, shape) -> jax.Array:
        """The values side by side, of that shape or broadcast to it."""
        if isinstance(value, Side):
            return value.x
        xs = self.each(value)
        if jnp.ndim(xs[0]) == 0 or xs[0].shape[-1] == 1 < shape[-1]:
            wide = self.wide((*xs[0].shape[:-1], shape[-1]) if xs[0].shape else shape)
            if isinstance(value, Shared):
                return jnp.broadcast_to(value.x, wide)
            return self.pick([jnp.broadcast_to(x, wide) for x in xs])
        return jnp.concatenate(xs, axis=-1)

    def run(self, jaxpr, constants: Sequence, inputs: Sequence[Value]) -> list[Value]:
        """The results of a jaxpr, whose constants all elements share."""
        known = dict(zip(jaxpr.constvars, map(Shared, constants), strict=True))
        known |= zip(jaxpr.invars, inputs, strict=True)

        def read(atom):
            return Shared(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for equation in jaxpr.eqns:
            results = self.apply(equation, [read(atom) for atom in equation.invars])
            known |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]

    def apply(self, equation, values: Sequence[Value]) -> list[Value]:
        """The results of an equation."""
        name = equation.primitive.name
        if name == "scan":
            return self._scan(equation, values)
        if all(isinstance(value, Shared) for value in values):
            return [Shared(x) for x in _bind(equation, [value.x for value in values])]
        out = equation.outvars[0].aval
        kind = "elementwise" if name in ELEMENTWISE else name
        special = getattr(self, f"_{kind}", None)
        result = special and special(equation, values, out.shape)
        if result is not None:
            return result if isinstance(result, list) else [result]
        by_element = zip(*map(self.each, values), strict=True)
        results = [_bind(equation, each) for each in by_element]
        return [Each(each) for each in zip(*results, strict=True)]

    def _elementwise(self, equation, values, shape):
        if not self.fit(shape):
            return None
        spread = any(atom.aval.shape != shape for atom in equation.invars)
        if not (spread or any(isinstance(value, Side) for value in values)):
            return None
        inputs = [
            value.x
            if isinstance(value, Shared) and np.ndim(value.x) == 0
            else self.side(value, shape)
            for value in values
        ]
        return Side(_bind(equation, inputs)[0])

    def _broadcast_in_dim(self, equation, values, shape):
        (value,), (atom,) = values, equation.invars
        axes = equation.params["broadcast_dimensions"]
        if not self.fit(shape):
            return None
        own = atom.aval.shape
        lanes = own and axes[-1] == len(shape) - 1 and own[-1] == shape[-1]
        if lanes:
            x = self.side(value, own)
            return Side(jax.lax.broadcast_in_dim(x, self.wide(shape), axes))
        if isinstance(value, Side):
            return None
        wide = self.wide(shape)
        each = [jax.lax.broadcast_in_dim(x, wide, axes) for x in self.each(value)]
        return Side(self.pick(each))

    def _reshape(self, equation, values, shape):
        ((value,), (atom,)) = values, equation.invars
        own = atom.aval.shape
        if isinstance(value, Side) and shape and shape[-1] == own[-1]:
            return Side(jnp.reshape(value.x, self.wide(shape)))
        return None

    _squeeze = _reshape

    def _reduced(self, equation, value, fill):
        is_float = jnp.issubdtype(equation.invars[0].aval.dtype, jnp.floating)
        if not (isinstance(value, Side) and is_float):
            return None
        axes = equation.params["axes"]
        if value.x.ndim - 1 not in axes:
            return Side(_bind(equation, [value.x])[0])
        parts = [self.only(value.x, i, fill) for i in range(self.count)]
        return Each([_bind(equation, [part])[0] for part in parts])

    def _reduce_sum(self, equation, values, shape):
        return self._reduced(equation, values[0], 0)

    def _reduce_max(self, equation, values, shape):
        return self._reduced(equation, values[0], -np.inf)

    def _reduce_min(self, equation, values, shape):
        return self._reduced(equation, values[0], np.inf)

    def _transpose(self, equation, values, shape):
        (value,) = values
        if not isinstance(value, Side) or equation.params["permutation"] != (1, 0):
            return None
        return Each(jnp.split(value.x.T, self.count))

    def _split(self, equation, values, shape):
        (value,), axis = values, equation.params["axis"]
        if not isinstance(value, Side) or axis == len(shape) - 1:
            return None
        return list(map(Side, _bind(equation, [value.x])))

    def _concatenate(self, equation, values, shape):
        is_side = any(isinstance(value, Side) for value in values)
        if not is_side or equation.params["dimension"] == len(shape) - 1:
            return None
        sides = [
            self.side(v, a.aval.shape)
            for v, a in zip(values, equation.invars, strict=True)
        ]
        return Side(jnp.concatenate(sides, equation.params["dimension"]))

    def _dot_general(self, equation, values, shape):
        axes, batch = equation.params["dimension_numbers"]
        if batch != ((), ()) or len(shape) != 2:
            return None
        ((left,), (right,)), (x, y) = axes, values
        y_shape = equation.invars[1].aval.shape
        fits = self.fit(shape)
        is_side = isinstance(x, Side), isinstance(y, Side)

        def dot(x, y):
            return _bind(equation, [x, y])[0]

        if right == 0 and fits:
            wide = self.side(y, y_shape)
            if isinstance(x, Shared):
                return Side(dot(x.x, wide))
            if is_side[0] and left == 1:
                return Side(dot(x.x, self.diagonal(wide)))
            if is_side[0]:
                return Side(self.pick(jnp.split(dot(x.x, wide), self.count)))
            return Side(self.pick([dot(each, wide) for each in self.each(x)]))
        if (left, right) != (1, 1):
            return None
        if all(is_side) and fits:
            return Side(dot(x.x, self.diagonal(y.x)))
        if all(is_side):
            return Each([dot(self.only(x.x, i), y.x) for i in range(self.count)])
        if fits and not any(is_side):
            rows = jnp.concatenate(self.each(y), axis=0)
            return Side(self.pick([dot(each, rows) for each in self.each(x)]))
        return None

    def _scan(self, equation, values):
        """A loop: what it carries and stacks in the form that its shape has."""
        params = equation.params
        body = params["jaxpr"]
        consts, carries = params["num_consts"], params["num_carry"]
        first = consts + carries
        carry_avals = body.in_avals[consts:first]
        y_avals = body.out_avals[carries:]

        def formed(values, avals):
            return [self.formed(v, a.shape) for v, a in zip(values, avals, strict=True)]

        def round_(carry, xs):
            given = [*values[:consts], *carry, *xs]
            after = self.run(body.jaxpr, body.consts, given)
            carry, ys = after[:carries], after[carries:]
            return formed(carry, carry_avals), formed(ys, y_avals)

        start = formed(values[consts:first], carry_avals)
        carry, ys = jax.lax.scan(
            round_, start, list(values[first:]), params["length"], params["reverse"]
        )
        return [*carry, *ys]

    def formed(self, value: Value, shape) -> Value:
        """Side by side if it fits, else an array for each element."""
        if self.fit(shape):
            return Side(self.side(value, shape))
        return Each(list(self.each(value)))


def _bind(equation, inputs):
    result = equation.primitive.bind(*inputs, **equation.params)
    return result if equation.primitive.multiple_results else [result]
