"""What libtpu does not compile, written in another way."""

from functools import partial

import jax.numpy as jnp

from pallas_kernels.fused_scan.program import Function, rewritten


def compilable(function: Function) -> Function:
    """The same with some products x^T y as (y^T x)^T: where x is the y of another.

    With them the compiler for v6e ends in internal errors (libtpu 0.0.42.1): in the
    backward pass of rules that keep everything, whose keys or queries are factors of
    several gradients just as they came.
    """
    products = [e for e in function.jaxpr.eqns if _is_columns(e)]
    rights = {id(product.invars[1]) for product in products}
    return rewritten(function, partial(_turn, rights))


def _is_columns(equation) -> bool:
    if equation.primitive.name != "dot_general":
        return False
    return equation.params["dimension_numbers"] == (((0,), (0,)), ((), ()))


def _turn(rights, equation, inputs, bind):
    if not (_is_columns(equation) and id(equation.invars[0]) in rights):
        return bind(inputs)
    (product,) = bind(inputs[::-1])
    return [jnp.transpose(product)]
