"""The duals of several tokens from one product.

A_t = K_t A_c + M_t S_c + sum_s D_ts a_s d_s^T, S_c the momentum, is a product

    A_t = ([I, I, a^T] * [K_t, M_t, D_t1, ..., D_tn]) [A_c; S_c; d]

of a left side with the token's rates on its columns and a right side that all tokens of
a chunk share, 128 rows for 64 inputs and 64 tokens. Its operands are rounded: a norm
averages that out, but a softmax would make relative errors of absolute ones, so that
what is carried is added in full precision where more than a norm is asked for.

On TPU this takes the place of passes of the vector unit over every matrix, on GPU that
of a loop over tokens. On a CPU, which multiplies no faster than it adds, it takes four
to six times as long as that loop.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core.product import apply
from miras_jax.core.steps import TokenSteps
from miras_jax.core.view import row
from pallas_kernels.fused_scan import platform


def makes(rule, flow) -> bool:
    """Whether duals come from here: where D and K are one number per token."""
    by_token = isinstance(flow.steps, TokenSteps) and flow.start.side is None
    return platform() is not None and by_token and not rule.algorithm.settles


class TokenMatrices(NamedTuple):
    """The duals A_t of a chunk's tokens, none of them made yet."""

    left: jax.Array  # [in, n]
    right: jax.Array  # [n, out]
    rates: jax.Array  # [C, n], of a token, what multiplies the columns of left
    sizes: jax.Array  # [C, 1], |A_t|_2 at most, and so without a derivative
    added: tuple[tuple[jax.Array, jax.Array], ...]  # K_t `[C, 1]` and A_c, or none

    @staticmethod
    def of(flow, start, momentum, a, d, only_scales: bool) -> "TokenMatrices":
        """Of a matrix and its momentum, with the factors of the steps a_s d_s^T."""
        carried = [(flow.start.kept, start)]
        if flow.momentum_in_dual is not None:
            carried.append((flow.momentum_in_dual.kept, *momentum))
        own = jnp.asarray(np.eye(len(start)), start.dtype)
        ones = jnp.ones((1, len(start)), start.dtype)
        mix = flow.steps.mix
        bounds = [jnp.abs(kept) * _norm(matrix) for kept, matrix in carried]
        bounds.append(apply(jnp.abs(mix), _norm(a, 1) * _norm(d, 1)))
        sizes = jax.lax.stop_gradient(sum(bounds))
        # Below 1e-22 squares vanish: its inverse is finite.
        sizes = jnp.where(sizes > 0, sizes, 1)
        if not only_scales:
            return TokenMatrices(a.T, d, mix, sizes, tuple(carried))
        return TokenMatrices(
            jnp.concatenate([own] * len(carried) + [a.T], axis=1),
            jnp.concatenate([matrix for _, matrix in carried] + [d]),
            jnp.concatenate([kept * ones for kept, _ in carried] + [mix], axis=1),
            sizes,
            (),
        )

    def scales(self, dot, gate, group: int) -> jax.Array:
        """The gate's scale of every A_t, `[C, 1]`."""
        unit = self._replace(rates=self.rates * (1 / self.sizes))
        return unit._map(dot, gate.scales, self.sizes, group)

    def read(self, dot, read: Callable, x: jax.Array, group: int) -> jax.Array:
        """The sum of read(mask of a token, x, A_t) over the tokens of a group."""

        def read_all(duals, x):
            return sum(map(read, _masks(group, x.dtype), [x] * group, duals))

        return self._map(dot, read_all, x, group)

    def _map(self, dot, function, x, group):
        """function(duals of a group, its rows of x), groups one below the other."""

        def body(_, rows):
            x, rates, *added = rows
            masks = _masks(group, rates.dtype)
            left = _stacked(tuple(self.left * row(one, rates) for one in masks))
            duals = jnp.split(dot(left, self.right), group)
            for kept, (_, matrix) in zip(added, self.added, strict=True):
                pairs = zip(masks, duals, strict=True)
                duals = [dual + row(one, kept) * matrix for one, dual in pairs]
            return None, function(duals, x)

        columns = (x, self.rates, *(kept for kept, _ in self.added))
        xs = [y.reshape(-1, group, y.shape[1]) for y in columns]
        body = jax.checkpoint(body, prevent_cse=False)
        _, results = jax.lax.scan(body, None, xs)
        return results.reshape(len(x), -1)


def _masks(size, dtype):
    return [jnp.asarray(column, dtype) for column in np.eye(size)[:, :, None]]


def _norm(x, axis=None):
    return jnp.sqrt(jnp.sum(jnp.square(x), axis=axis, keepdims=True))


# JAX's own derivative takes slices, which kernels have not.
@jax.custom_vjp
def _stacked(matrices):
    return jnp.concatenate(matrices)


def _stacked_forward(matrices):
    return jnp.concatenate(matrices), len(matrices)


def _stacked_backward(number, d):
    return (tuple(jnp.split(d, number)),)


_stacked.defvjp(_stacked_forward, _stacked_backward)
