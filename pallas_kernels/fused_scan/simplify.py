"""A traced function without what need not be computed in a kernel."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np


class Simplifier:
    """Applies operations, unless their results are known or were computed before.

    Of what depends on constants alone, results are computed at once; equal operations
    on equal operands are one; a product with ones, a sum with zeros and a number that
    is widened and rounded again to what it was are what went in.
    """

    def __init__(self):
        self.results = {}  # what was applied to what -> results
        self.wide = {}  # id of a widened array -> what it was
        self.constants = {}  # equal ones are the same
        self.alive = []  # so that no id is used twice

    def __call__(self, equation, inputs: Sequence, bind: Callable) -> list:
        primitive, params = equation.primitive, equation.params
        if not equation.effects and not any(
            isinstance(x, jax.core.Tracer) for x in inputs
        ):
            with jax.ensure_compile_time_eval():
                results = bind(inputs)
            return [np.asarray(x) for x in results]
        out = equation.outvars[0].aval
        same = self._unchanged(primitive.name, inputs, out)
        if same is not None:
            return [same]
        key = (primitive.name, str(params), *map(self._key, inputs))
        if key not in self.results:
            self.results[key] = bind([self._array(x) for x in inputs])
            self.alive.append(inputs)
            if primitive.name == "convert_element_type":
                (x,), (result,) = inputs, self.results[key]
                if jnp.promote_types(x.dtype, result.dtype) == result.dtype:
                    self.wide[id(result)] = x
        return self.results[key]

    def _unchanged(self, name, inputs, out):
        if name == "convert_element_type":
            before = self.wide.get(id(inputs[0]))
            is_same = before is not None and before.dtype == out.dtype
            return before if is_same else None
        neutral = {"mul": 1, "add": 0, "add_any": 0, "sub": 0, "div": 1}.get(name)
        if neutral is None:
            return None
        x, y = inputs
        if x.shape == out.shape and _is_uniform(y, neutral):
            return x
        if name not in ("sub", "div") and y.shape == out.shape:
            return y if _is_uniform(x, neutral) else None
        return None

    def _key(self, x):
        if isinstance(x, jax.core.Tracer):
            return id(x)
        x = np.asarray(x)
        return (x.shape, x.dtype.name, x.tobytes())

    def _array(self, x):
        """Constants of one number as that number, spread out; equal ones as one."""
        if isinstance(x, jax.core.Tracer) or np.ndim(x) == 0:
            return x
        x = np.asarray(x)
        first = x.reshape(-1)[0]
        if np.all(x == first):
            return jax.lax.broadcast_in_dim(first, x.shape, ())
        return self.constants.setdefault(self._key(x), x)


def _is_uniform(x, number) -> bool:
    return not isinstance(x, jax.core.Tracer) and bool(np.all(np.asarray(x) == number))
