"""A product of two arrays as sums of products of their tiles."""

from math import prod

import jax.numpy as jnp

from pallas_kernels.fused_scan.tiles import misaligned


class Product:
    """A `dot_general` with one contracted axis, as sums of products of tiles."""

    def __init__(self, eqn):
        (contract, self.batch) = eqn.params["dimension_numbers"]
        if len(contract[0]) != 1:
            raise misaligned(eqn)
        (self.left_inner,), (self.right_inner,) = contract
        self.left, self.right = eqn.invars
        (self.out,) = eqn.outvars
        self.eqn = eqn
        taken = (self.left_inner, *self.batch[0])
        self.left_free = [a for a in range(self.left.aval.ndim) if a not in taken]
        taken = (self.right_inner, *self.batch[1])
        self.right_free = [a for a in range(self.right.aval.ndim) if a not in taken]

    def left_tile(self, row, inner):
        index = [0] * self.left.aval.ndim
        for axis, i in zip((*self.batch[0], *self.left_free), row, strict=False):
            index[axis] = i
        index[self.left_inner] = inner
        return self.left, tuple(index), (self.left_inner,), 0

    def right_tile(self, out_index, inner):
        batch = len(self.batch[1])
        column = out_index[len(out_index) - len(self.right_free) :]
        index = [0] * self.right.aval.ndim
        for axis, i in zip(self.batch[1], out_index[:batch], strict=True):
            index[axis] = i
        for axis, i in zip(self.right_free, column, strict=True):
            index[axis] = i
        index[self.right_inner] = inner
        return self.right, tuple(index), (self.right_inner,), 0

    def multiply(self, emitter, index, inner):
        left = emitter.masked(*self.left_tile(index, inner))
        right = emitter.masked(*self.right_tile(index, inner))
        left = _matrix(self.eqn, left, self.left_inner, inner_last=True)
        right = _matrix(self.eqn, right, self.right_inner, inner_last=False)
        dtype = self.out.aval.dtype
        rows, inner_size, columns = *left.shape, right.shape[1]
        if min(rows, inner_size, columns) >= 16:
            precision = self.eqn.params["precision"]
            product = emitter.machine.multiply(left, right, precision, dtype)
        else:
            left, right = left.astype(dtype), right.astype(dtype)
            if inner_size == 1:
                product = left * right
            elif columns == 1:
                product = jnp.sum(left * right.T, axis=1, keepdims=True)
            else:
                product = jnp.sum(left.T * right, axis=0, keepdims=True)
        return product.reshape(emitter.shape(self.out, index))


def _matrix(eqn, tile, inner: int, inner_last: bool):
    """The tile as a matrix, its contracted axis last or first."""
    free = [a for a in range(tile.ndim) if a != inner]
    long = [a for a in free if tile.shape[a] > 1]
    if len(long) > 1:
        raise misaligned(eqn)
    before = bool(long) and long[0] < inner if long else inner_last
    width = prod(tile.shape[a] for a in free)
    shape = (width, tile.shape[inner]) if before else (tile.shape[inner], width)
    matrix = tile.reshape(shape)
    return matrix if before == inner_last else matrix.T
