"""A traced function without what need not be computed in a kernel."""

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

NEUTRAL = {"mul": 1, "div": 1, "add": 0, "add_any": 0, "sub": 0}
"""Operations that leave the first operand as it is where the second is that number."""

COMMUTE = frozenset(("mul", "add", "add_any"))


class Simplifier:
    """A `program.Rewrite`: what is known or was computed before is not computed again.

    Of what depends on constants alone, results are computed at once (but for `iota`
    and what becomes of it, which kernels have sooner than an array); equal operations
    on equal operands are one; a product with ones, a sum with zeros, a sum over axes of
    length one and a number that is widened and rounded again to what it was are what
    went in.
    """

    def __init__(self):
        self.results = {}  # what was applied to what -> results
        self.narrow = {}  # id of a widened array -> what it was
        self.constants = {}  # equal ones are the same
        self.alive = []  # so that no id is used twice

    def __call__(self, equation, inputs: Sequence, bind: Callable) -> list:
        primitive, params = equation.primitive, equation.params
        if primitive.name == "iota":
            # What kernels count in less time than they read it.
            return self.results.setdefault(str(params), bind(inputs))
        if not equation.effects and not any(map(_is_data, inputs)):
            with jax.ensure_compile_time_eval():
                return [np.asarray(result) for result in bind(inputs)]
        unchanged = self._unchanged(primitive.name, inputs, equation.outvars[0].aval)
        if unchanged is not None:
            return [unchanged]
        arrays = [self._array(x) for x in inputs]
        if next(core.jaxprs_in_params(params), None) or equation.effects:
            # Their text does not tell what they capture.
            return bind(arrays)
        key = (primitive.name, str(params), *map(self._key, inputs))
        if key not in self.results:
            self.results[key] = bind(arrays)
            self.alive.append(inputs)
            if primitive.name == "convert_element_type":
                self._remember(inputs[0], *self.results[key])
        return self.results[key]

    def _remember(self, x, result):
        floats = all(jnp.issubdtype(each.dtype, jnp.floating) for each in (x, result))
        if floats and jnp.promote_types(x.dtype, result.dtype) == result.dtype:
            self.narrow[id(result)] = x

    def _unchanged(self, name, inputs, out):
        x, *others = inputs
        if name == "convert_element_type":
            before = self.narrow.get(id(x))
            return before if before is not None and before.dtype == out.dtype else None
        if name in ("reduce_sum", "reduce_max", "reduce_min"):
            is_same = prod(x.shape) == prod(out.shape)
            return jax.lax.reshape(x, out.shape) if is_same else None
        if name not in NEUTRAL:
            return None
        (y,) = others
        if x.shape == out.shape and _is_all(y, NEUTRAL[name]):
            return x
        if name in COMMUTE and y.shape == out.shape and _is_all(x, NEUTRAL[name]):
            return y
        return None

    def _key(self, x):
        if _is_data(x):
            return id(x)
        x = np.asarray(x)
        return (x.shape, x.dtype.name, x.tobytes())

    def _array(self, x):
        """Constants of one number as that number, spread out; equal ones as one."""
        if _is_data(x) or np.ndim(x) == 0:
            return x
        x = np.asarray(x)
        first = x.reshape(-1)[0]
        if np.all(x == first):
            return jax.lax.broadcast_in_dim(first, x.shape, ())
        return self.constants.setdefault(self._key(x), x)


def _is_data(x) -> bool:
    return isinstance(x, jax.core.Tracer)


def _is_all(x, number) -> bool:
    return not _is_data(x) and bool(np.all(np.asarray(x) == number))
