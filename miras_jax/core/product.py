"""Products inside a block: matrices in the dtype of tokens, masks in full precision.

What a kernel compiles best decides the form. A product of transposes is asked for as
such instead of transposing first. A column `[C, 1]` becomes a row, and prefix sums of
it are taken, by multiplying with constant 0/1 matrices and adding up: exact in any
dtype, and without a matrix product of a single column.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.fused_scan import platform


@dataclass(frozen=True)
class Dot:
    """Matrix products with operands and accumulation in the given dtypes.

    float32 operands are multiplied as float32 on every device. Cotangents are rounded
    to the dtype of the operands before they are multiplied in turn.
    """

    operands: jnp.dtype
    accumulator: jnp.dtype

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x y."""
        return self._contract(x, y, (-1, -2))

    def rows(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x y^T, products of all rows with all rows."""
        return self._contract(x, y, (-1, -1))

    def columns(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """x^T y, products of all columns with all columns."""
        return self._contract(x, y, (-2, -2))

    def _contract(self, x, y, axes):
        if self.operands == self.accumulator == jnp.float64:
            # Where derivatives are checked: JAX's own have a forward mode, too.
            x, y = x.astype(self.operands), y.astype(self.operands)
            return _general(x, y, axes, self.accumulator)
        return _product(self, axes, x.dtype, y.dtype, x, y)


@dataclass(frozen=True)
class NarrowDot(Dot):
    """Products in full precision with a second operand that bfloat16 holds as it is.

    Three of bfloat16 instead of the six of float32, in kernels; without derivatives.
    """

    def _contract(self, x, y, axes):
        y = y.astype(jnp.bfloat16)
        products = (_general(part, y, axes, self.accumulator) for part in _parts(x, 3))
        return reduce(jnp.add, products)


def _parts(x, number):
    """bfloat16 numbers whose sum is x: three make up all of a float32."""
    for _ in range(number):
        part = x.astype(jnp.bfloat16)
        x = x - part.astype(x.dtype)
        yield part


def _general(x, y, axes, accumulator):
    if x.dtype == jnp.bfloat16 and platform() is None:
        # XLA:CPU lacks this product for some layouts; rounded operands in float32
        # give the same numbers.
        x, y = x.astype(accumulator), y.astype(accumulator)
    if platform() is None and axes == (-1, -1) and x.shape[-2] == 1 < y.shape[-2]:
        # XLA:CPU transposes the second operand: let it be the row.
        return jnp.swapaxes(_general(y, x, axes, accumulator), -1, -2)
    batch = tuple(range(x.ndim - 2))
    contracting = tuple((axis + x.ndim,) for axis in axes)
    is_float32 = x.dtype == jnp.float32
    return jax.lax.dot_general(
        x,
        y,
        (contracting, (batch, batch)),
        precision=jax.lax.Precision.HIGHEST if is_float32 else None,
        preferred_element_type=accumulator,
    )


# JAX's own derivative transposes results; compilers then compute whatever is fused with
# that in the order of the transpose, which on CPU takes many times as long.
@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _product(dot, axes, x_dtype, y_dtype, x, y):
    x, y = x.astype(dot.operands), y.astype(dot.operands)
    return _general(x, y, axes, dot.accumulator)


def _product_forward(dot, axes, x_dtype, y_dtype, x, y):
    # The product itself, for whoever differentiates this in turn.
    return _product(dot, axes, x_dtype, y_dtype, x, y), (x, y)


def _product_backward(dot, axes, x_dtype, y_dtype, operands, d):
    x, y = operands
    (i, j), other = axes, {-1: -2, -2: -1}
    # Each in the order of axes that its operand has, so that nothing is transposed.
    if i == -1:
        dx = dot._contract(d, y, (-1, other[j]))
    else:
        dx = dot._contract(y, d, (other[j], -1))
    if j == -2:
        dy = dot._contract(x, d, (other[i], -2))
    else:
        dy = dot._contract(d, x, (-2, other[i]))
    return dx.astype(x_dtype), dy.astype(y_dtype)


_product.defvjp(_product_forward, _product_backward)


def row(column: jax.Array) -> jax.Array:
    """`[C, 1]` as `[1, C]`."""
    own = jnp.asarray(np.eye(len(column)), column.dtype)
    return jnp.sum(own * column, axis=0, keepdims=True)


def column(row: jax.Array) -> jax.Array:
    """`[1, C]` as `[C, 1]`."""
    own = jnp.asarray(np.eye(row.shape[1]), row.dtype)
    return jnp.sum(own * row, axis=1, keepdims=True)


def apply(matrix: jax.Array, x: jax.Array) -> jax.Array:
    """matrix x in full precision, for a column or for several: `[C, n]`."""
    if x.shape[1] == 1:
        return jnp.sum(matrix * row(x), axis=1, keepdims=True)
    return jnp.matmul(matrix, x, precision=jax.lax.Precision.HIGHEST)


def total(x: jax.Array) -> jax.Array:
    """The sum of all entries, `[1, 1]`."""
    if platform() is None:
        # XLA:CPU adds up long axes number by number, and short ones that are not the
        # last by whole rows; the barrier keeps it from making one sum of the two.
        rows = x.reshape(-1, math.gcd(len(x), 32), x.shape[1])
        x = jax.lax.optimization_barrier(jnp.sum(rows, axis=1))
    return jnp.sum(x, keepdims=True)


def totals(matrices: Sequence[jax.Array]) -> jax.Array:
    """The sum of all entries of each, `[n, 1]`."""
    columns = np.eye(len(matrices))[:, :, None]
    rows = [
        jnp.asarray(one, x.dtype) * jnp.sum(x, axis=0, keepdims=True)
        for one, x in zip(columns, matrices, strict=True)
    ]
    return jnp.sum(reduce(jnp.add, rows), axis=1, keepdims=True)


def prefix_sum(
    selection: np.ndarray, x: jax.Array, precision: jnp.dtype = jnp.float32
) -> jax.Array:
    """selection x for a constant 0/1 matrix, in full precision.

    Unless what becomes of it is rounded to bfloat16 afterwards: then no more than 16
    bits of x may count.
    """
    if x.shape[1] > 1 and x.dtype == jnp.float32 and platform():
        return _selected(2 if precision == jnp.bfloat16 else 3, x, selection)
    return apply(jnp.asarray(selection, x.dtype), x)


# Matrix units take six products of bfloat16 for one of float32, or none; 0 and 1 have a
# single part.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _selected(parts, x, selection):
    mask, split = jnp.asarray(selection, jnp.bfloat16), list(_parts(x, parts))
    if platform() == "tpu":
        # Its units add up 128 products at a time: those of two parts of 64 tokens.
        mask, split = jnp.concatenate([mask] * parts, axis=1), [jnp.concatenate(split)]
    products = (_general(mask, part, (-1, -2), jnp.float32) for part in split)
    return reduce(jnp.add, products)


def _selected_forward(parts, x, selection):
    return _selected(parts, x, selection), selection


def _selected_backward(_, selection, d):
    return _selected(3, d, selection.T), None


_selected.defvjp(_selected_forward, _selected_backward)


def column_sums(x: jax.Array, selection: jax.Array) -> jax.Array:
    """x selection for a 0/1 matrix that no derivative is asked of, in full precision.

    `[C, n]`: of each of n columns, which of the C columns of x it adds up.
    """
    if x.dtype == jnp.float32 and platform():
        return _summed(x, selection)
    return apply(x, selection)


@jax.custom_vjp
def _summed(x, selection):
    return NarrowDot(x.dtype, x.dtype)(x, selection)


def _summed_forward(x, selection):
    return _summed(x, selection), selection


def _summed_backward(selection, d):
    return NarrowDot(d.dtype, d.dtype).rows(d, selection), None


_summed.defvjp(_summed_forward, _summed_backward)
