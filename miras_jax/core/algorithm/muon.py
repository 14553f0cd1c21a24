"""Muon: momentum whose singular values are made equal before it becomes a step."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.core import causal
from miras_jax.core.algorithm.descent import At, Momentum
from miras_jax.core.product import Dot
from miras_jax.core.sums import sums
from miras_jax.errors import UserError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic iteration (K. Jordan, 2024), as in LaCT and Atlas."""

GRAM_ITERATIONS = 3
"""Iterations in a row on the square alone; the fourth would be seen in float32."""

TINY_SQUARE = 1e-12
"""Added to the square of a norm that divides: keeps the derivative at zero finite."""


def normalised(matrix: jax.Array) -> jax.Array:
    """M / sqrt(|M|^2 + 1e-12), the Frobenius norm."""
    return matrix * jax.lax.rsqrt(jnp.sum(matrix * matrix) + TINY_SQUARE)


def orthogonalised(matrix: jax.Array, iterations: int, dot: Dot) -> jax.Array:
    """U V^T of M = U S V^T, nearly: Newton-Schulz brings singular values close to 1.

    X <- P X, P = a + b G + c G^2, G = X X^T, from X = M / |M|; X <- X P with G = X^T X
    where that is the smaller one. As G <- P G P all the while, some iterations run on
    the square G alone, with a product of their P for X at the end: for `[64, 256]` five
    of them take 0.67 times the multiplications of those on X. Small singular values are
    small against the rounding of G, so that G is taken from X anew after
    GRAM_ITERATIONS: in float32 all five on one G cost a rounding 50 times as large. If
    operands are bfloat16, as in the published code of Muon, G is always that of X.
    """
    is_tall = len(matrix) > matrix.shape[1]
    r, c = sorted(matrix.shape)
    x = normalised(matrix)
    # Multiplications / r^2: (4 n - 3) r + 2 c with n in a row, one by one n (r + 2 c).
    pays = 3 * r < 2 * c and dot.operands == dot.accumulator
    together = GRAM_ITERATIONS if pays else 1
    for done in range(0, iterations, together):
        gram = dot.columns(x, x) if is_tall else dot.rows(x, x)
        product = _polynomial(dot, gram, min(together, iterations - done))
        x = dot(x, product) if is_tall else dot(product, x)
    return x


def _polynomial(dot: Dot, gram: jax.Array, iterations: int) -> jax.Array:
    """The product of P over the iterations, as a polynomial in G: `[r, r]`."""
    a, b, c = NEWTON_SCHULZ
    own = jnp.asarray(np.eye(len(gram)), gram.dtype)

    def polynomial(gram):
        return a * own + b * gram + c * dot(gram, gram)

    product = last = polynomial(gram)
    for _ in range(iterations - 1):
        gram = dot(dot(last, gram), last)
        last = polynomial(gram)
        product = dot(last, product)
    return product


@dataclass(frozen=True, repr=False)
class Muon(Momentum):
    """W = K W_c + stride O(m) where a chunk ends, O the Newton-Schulz of `iterations`.

    m_s = momentum_s m_{s-1} + u_s runs over the tokens of all chunks; K is what the
    chunk kept. Two published places for the step size:

    learn="inside"   u_s = -learn_s g_s and stride 1, whatever the size of m (LaCT,
                     arXiv 2505.23884, section 3.1)
    learn="outside"  u_s = -g_s and stride_s = keep_s stride_{s-1} + learn_s from 0 at
                     the chunk's start: its tokens' step sizes, all along the direction
                     that they found together. With chunks of one token it is W_s =
                     keep_s W_{s-1} + learn_s O(m_s) (Atlas, arXiv 2505.23735, eq. 32
                     and 33). learn is one number per token.

    The iteration's products have operands in the tokens' dtype, bfloat16 in Muon's own
    code. No factor depends on a matrix's shape: every singular value of O(m) is near
    one, as both papers print it.

    Inside a chunk the readout "exact" reads token s as if the chunk ended there, which
    costs the iteration for every token; "linear" leaves the iteration out, m / |m| in
    place of O(m), so that it never steps further than the chunk's end along any
    direction; "start" sees no step before the chunk ends.
    """

    at: At = "previous"
    iterations: int = 5
    learn: Literal["inside", "outside"] = "inside"

    def __post_init__(self):
        super().__post_init__()
        if self.iterations < 1:
            raise UserError(
                f"algorithm.Muon needs iterations >= 1; got {self.iterations}. "
                "Without any it is algorithm.Momentum()."
            )
        if self.learn not in ("inside", "outside"):
            raise UserError(
                "algorithm.Muon(learn=...) multiplies the gradients, 'inside' the "
                f"momentum, or the step, 'outside'; got {self.learn!r}."
            )

    @property
    def strides(self):
        return self.learn == "outside"

    def step(self, carried, update, momentum):
        return 0.0, momentum * carried + update

    def flow(self, decay, momentum, side, when, written):
        flow = causal.decay_flow(decay, side, when)
        own = causal.decay_flow(sums(momentum), None)
        return flow._replace(momentum=(own.start, own.steps))

    def settle(self, dual, momentum, stride, dot):
        stride = stride or (1.0,) * len(dual)
        return tuple(
            a + size * orthogonalised(m, self.iterations, dot)
            for a, m, size in zip(dual, momentum, stride, strict=True)
        )

    def provisional(self, momentum, stride):
        return stride * normalised(momentum)
