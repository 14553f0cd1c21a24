"""Newton's method with accumulated curvature: recursive least squares, Mesa."""

from dataclasses import astuple, dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core import causal
from miras_jax.core.algorithm.descent import Descent
from miras_jax.core.product import Dot, NarrowDot
from miras_jax.core.types import Weights
from miras_jax.errors import UserError
from pallas_kernels.fused_scan import platform

LEAST_RIDGE = 0.25
"""Lower bound of Lambda, which bounds the condition of what is solved."""

CONVERGED = 8
"""Residual at which rounds end, in roundings of the right side (not in kernels)."""


@dataclass(frozen=True, repr=False)
class Newton(Descent):
    """W_s = (H_s + Lambda)^{-1} G_s, the exact minimum of the L2 loss on all pairs.

        G_s = keep_s G_{s-1} + learn_s k_s v_s^T,    G_0 = Lambda W_0
        H_s = keep_s H_{s-1} + learn_s k_s k_s^T,    H_0 = 0

    (MesaNet, arXiv 2506.05233, eq. 6 to 9, which starts from G_0 = 0): W_s minimises
    sum_i D_si learn_i |W^T k_i - v_i|^2 + tr (W - K_s W_0)^T Lambda (W - K_s W_0). One
    Newton step from any weights, as the loss is quadratic: G and -H are what its
    gradient and Hessian sum up to at W = 0.

    The dual is G. A block never forms H_s of its tokens: conjugate gradients solve
    (H_s + Lambda) x_s = q_s for all of them at once, in at most `iterations` rounds
    from q / diag, each in products like those of the readout; then y_s = G_s^T x_s.
    Decoding solves directly, so that the two agree as far as the rounds have converged:
    in 30, keys of 64 channels reach the rounding of float32. MesaNet trains with 30
    and also times 15. Except in kernels, rounds end where the residuals of a block are
    at that rounding: after about 15 at the rates that MesaNet's layer starts from. A
    round takes K^2 + 2 C K multiplications per token (8,192 for keys of 64 channels in
    blocks of 32 tokens, half of Gated DeltaNet's whole forward pass), and the backward
    pass solves once more.

    Lambda, one number per key channel, is 0.25 + softplus(params.ridge), learned by the
    outer loop from `ridge` on, with MesaNet's lower bound. It is a parameter as W_0 is,
    fixed over a text and part of its state; rates are what varies by token.
    """

    iterations: int = 30
    ridge: float = 1.0

    at = "zero"
    curves = True

    def __post_init__(self):
        if self.iterations < 1:
            raise UserError(
                f"algorithm.Newton needs iterations >= 1; got {self.iterations}."
            )
        if self.ridge <= LEAST_RIDGE:
            raise UserError(
                f"algorithm.Newton needs ridge > {LEAST_RIDGE}, below which Lambda "
                f"does not go; got {self.ridge}."
            )

    def initial(self, key_dim: int) -> jax.Array:
        """params.ridge at which Lambda is `ridge`."""
        return jnp.full(key_dim, np.log(np.expm1(self.ridge - LEAST_RIDGE)))

    def opening(self, dual: Weights, ridge: jax.Array) -> tuple[Weights, Weights]:
        """G_0, and the curvature (H_0 `[K, K]`, Lambda `[K, 1]`)."""
        (weights,) = dual
        ridge = LEAST_RIDGE + jax.nn.softplus(ridge.astype(weights.dtype))[:, None]
        nothing = jnp.zeros((len(weights), len(weights)), weights.dtype)
        return (ridge * weights,), (nothing, ridge)

    def weights(self, dual: Weights, curvature: Weights) -> Weights:
        """W_s, solved directly."""
        (g,), (h, ridge) = dual, curvature
        return (jnp.linalg.solve(h + ridge * jnp.eye(len(h), dtype=h.dtype), g),)

    def turned(self, dot: Dot, flow: causal.Flow, curvature: Weights, keys, queries):
        """x_s of every token of a block, which G_s reads in place of q_s: `[C, K]`."""
        h, ridge = curvature
        system = System(flow.start.kept, flow.steps.mix, h, ridge, keys)
        with_keys = full = Dot(queries.dtype, queries.dtype)
        if platform() and dot.operands == jnp.bfloat16:
            with_keys = NarrowDot(*astuple(full))
        return solve(self.iterations, with_keys, system, queries)


class System(NamedTuple):
    """H_s + Lambda of every token: kept_s H + sum_i mix_si k_i k_i^T + Lambda."""

    kept: jax.Array  # [C, 1]
    mix: jax.Array  # [C, C]
    start: jax.Array  # H [K, K]
    ridge: jax.Array  # [K, 1]
    keys: jax.Array  # [C, K]

    def times(self, x: jax.Array, with_keys: Dot | None = None) -> jax.Array:
        """Row by row, (H_s + Lambda) x_s: `[C, K]`."""
        dot = Dot(x.dtype, x.dtype)
        with_keys = with_keys or dot
        own = with_keys(with_keys.rows(x, self.keys) * self.mix, self.keys)
        return dot(x, self.start) * self.kept + own + x * self.ridge.T

    def diagonal(self) -> jax.Array:
        """`[C, K]`."""
        eye = jnp.asarray(np.eye(len(self.start)), self.start.dtype)
        start = jnp.sum(self.start * eye, axis=0, keepdims=True)
        dot = Dot(self.mix.dtype, self.mix.dtype)
        return self.kept * start + dot(self.mix, self.keys**2) + self.ridge.T


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def solve(iterations: int, dot: Dot, system: System, b: jax.Array) -> jax.Array:
    """x of system.times(x) = b by conjugate gradients, each token on its own.

    dot: products with keys. The derivative is that of the solution: one more solve,
    with the same matrices.
    """
    x = b / system.diagonal()
    residual = b - system.times(x, dot)
    enough = (CONVERGED * jnp.finfo(b.dtype).eps) ** 2 * _square(b)

    def improve(carry):
        x, residual, direction, square = carry
        image = system.times(direction, dot)
        step = _ratio(square, jnp.sum(direction * image, axis=1, keepdims=True))
        residual = residual - step * image
        after = _square(residual)
        ahead = residual + _ratio(after, square) * direction
        return x + step * direction, residual, ahead, after

    def is_unfinished(carry):
        done, (*_, square) = carry
        return (done < iterations) & (jnp.max(square - enough) > 0)

    start = (x, residual, residual, _square(residual))
    if platform() is not None:  # kernels know no loop whose end is data
        return jax.lax.fori_loop(0, iterations, lambda _, c: improve(c), start)[0]
    rounds = jax.lax.while_loop(
        is_unfinished, lambda carry: (carry[0] + 1, improve(carry[1])), (0, start)
    )
    return rounds[1][0]


def _forward(iterations, dot, system, b):
    x = solve(iterations, dot, system, b)
    return x, (system, x)


def _backward(iterations, dot, kept, cotangent):
    system, x = kept
    adjoint = solve(iterations, dot, system, cotangent)
    _, pull_back = jax.vjp(lambda system: system.times(x), system)
    return *pull_back(-adjoint), adjoint


solve.defvjp(_forward, _backward)


def _square(x: jax.Array) -> jax.Array:
    return jnp.sum(x * x, axis=1, keepdims=True)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y; 0 where y is, as a solved system has it."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)
