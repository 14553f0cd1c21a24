"""Memory architectures: what is learned while reading.

A memory is a function of its matrix products, `read(product, params, x)`, where
`product(i, x)` stands for `x @ W[i]`. The engine passes a plain product to read, one
with an added zero to obtain the per-token factors of the gradient, and one that also
sums the chunk's own writes to read every token at its own weights.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import jax
import jax.numpy as jnp

from miras_jax.core.types import Choice, Params, Weights
from miras_jax.errors import UserError

Product = Callable[[int, jax.Array], jax.Array]


class Memory(Protocol):
    """What a rule needs of a memory; any frozen dataclass with these will do."""

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        """`[in, out]` of each matrix, first applied first; UserError if impossible."""

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params: ...

    def read(self, product: Product, params: Params, x: jax.Array) -> jax.Array:
        """M(x): `[..., K] -> [..., V]`."""

    @property
    def is_linear(self) -> bool:
        """Whether M(x) = x W with a single matrix and nothing else."""

    @property
    def is_affine(self) -> bool:
        """Whether M(x) is affine in its weights, so that dM/dW does not need them."""

    entries: int
    """How many of the first matrices take x itself; the last one gives the value."""


_SLOPE = (2 / math.pi) ** 0.5
_CUBIC = 0.044715


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """The tanh form of GELU (Hendrycks and Gimpel, 2016).

    x s(x), s = (1 + tanh u) / 2, u = x (2 / pi)^(1/2) (1 + 0.044715 x^2). The
    derivative s + x s (1 - s) 2 u' shares the tanh and most products.
    """
    return _gelu(x)[0]


def _gelu(x):
    square = x * x
    s = 0.5 + 0.5 * jnp.tanh(x * (_SLOPE + _SLOPE * _CUBIC * square))
    return x * s, s, square


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y, s, square = _gelu(x)
    slope = s + y * (1 - s) * (2 * _SLOPE + 6 * _SLOPE * _CUBIC * square)
    return y, slope * dx


def layer_norm(x: jax.Array, params: Params) -> jax.Array:
    """LayerNorm over the last axis, eps 1e-6, with outer-learned scale and bias."""
    scale, bias = (jnp.expand_dims(p, range(x.ndim - 1)) for p in params[1:3])
    return standardised(x)[0] * scale + bias


@jax.custom_jvp
def standardised(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """y = (x - mean) r and r = (variance + 1e-6)^(-1/2), over the last axis.

    Derivatives dy = r (c - y mean(y c)) and dr = -r^2 mean(y c), c = dx - mean(dx), are
    again in y and r: those of the variance's powers would be rounded to zero where
    weights that nothing bounds have made x large.
    """
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    r = jax.lax.rsqrt(variance + 1e-6)
    return centred * r, r


@standardised.defjvp
def _standardised_jvp(primals, tangents):
    (x,), (dx,) = primals, tangents
    y, r = standardised(x)
    # Centred first: y's own mean is zero but for rounding, and that of dx may be large.
    centred = dx - jnp.mean(dx, axis=-1, keepdims=True)
    along = jnp.mean(y * centred, axis=-1, keepdims=True)
    return (y, r), (r * (centred - y * along), -r * r * along)


def _with_norm(weights: tuple[jax.Array, ...], value_dim: int) -> Params:
    # Scale 1 / sqrt(V): the normalised part then has norm one, like the key that is
    # added to it, and like values of variance 1 / V.
    return Params(weights, jnp.full(value_dim, value_dim**-0.5), jnp.zeros(value_dim))


def _normal(key: jax.Array, shapes, fan_ins) -> Weights:
    """Matrices of variance 1 / fan-in."""
    keys = jax.random.split(key, len(shapes))
    return tuple(
        jax.random.normal(k, shape) / fan_in**0.5
        for k, shape, fan_in in zip(keys, shapes, fan_ins, strict=True)
    )


def _same_width(name: str, verb: str, key_dim: int, value_dim: int) -> None:
    if key_dim != value_dim:
        raise UserError(
            f"{name} {verb} its input, so it needs key_dim == value_dim; got {key_dim} "
            f"and {value_dim}. Use equal dimensions or memory.Linear()."
        )


@dataclass(frozen=True, repr=False)
class Vector(Choice):
    """One weight per channel: M(x) = w * x, w `[1, V]`, from zero.

    The smallest memory of Miras' section 3: its gradient is x * dl/dM. Its one axis is
    that of the values, on which channel-wise rates act.
    """

    is_linear = False
    is_affine = True
    entries = 0

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        _same_width("memory.Vector", "multiplies", key_dim, value_dim)
        return ((1, value_dim),)

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params:
        (shape,) = self.shapes(key_dim, value_dim)
        return Params((jnp.zeros(shape),))

    def read(self, product: Product, params: Params, x: jax.Array) -> jax.Array:
        return x * product(0, jnp.ones((*x.shape[:-1], 1), x.dtype))


@dataclass(frozen=True, repr=False)
class Linear(Choice):
    """A matrix: M(x) = x W, or M(x) = x + LN(x W) with `residual` and `norm`.

    Both switches on is TTT-Linear's memory (arXiv 2407.04620, section 2.7). W_0 is zero
    for the plain matrix, as in linear attention and the delta rule, and normal with
    standard deviation 0.02 under a norm (TTT), which has no gradient at zero.
    """

    residual: bool = False
    norm: bool = False

    entries = 1

    @property
    def is_linear(self) -> bool:
        return not (self.residual or self.norm)

    @property
    def is_affine(self) -> bool:
        return not self.norm

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        if self.residual:
            _same_width("memory.Linear(residual=True)", "adds", key_dim, value_dim)
        return ((key_dim, value_dim),)

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params:
        (shape,) = self.shapes(key_dim, value_dim)
        if not self.norm:
            return Params((jnp.zeros(shape),))
        return _with_norm((0.02 * jax.random.normal(key, shape),), value_dim)

    def read(self, product: Product, params: Params, x: jax.Array) -> jax.Array:
        y = product(0, x)
        y = layer_norm(y, params) if self.norm else y
        return x + y if self.residual else y


@dataclass(frozen=True, repr=False)
class MLP(Choice):
    """M(x) = x + LN(W_n ... f(x W_1)) (Miras, section 5.3), f = GELU, F = expansion K.

    W_1 starts with unit variance and the others with variance 1 / inputs: keys and
    queries have norm one, so this gives every pre-activation unit variance. A fan-in
    scaled W_1 would leave f in its linear part at the origin.
    """

    depth: int = 2
    expansion: int = 4
    activation: Callable[[jax.Array], jax.Array] = gelu

    is_linear = False
    is_affine = False
    entries = 1

    def __post_init__(self):
        if self.depth < 1 or self.expansion < 1:
            raise UserError(
                "memory.MLP needs depth >= 1 and expansion >= 1; "
                f"got depth={self.depth}, expansion={self.expansion}."
            )

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        _same_width("memory.MLP", "adds", key_dim, value_dim)
        hidden = [self.expansion * key_dim] * (self.depth - 1)
        return tuple(pairwise([key_dim, *hidden, value_dim]))

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params:
        shapes = self.shapes(key_dim, value_dim)
        fan_ins = [1, *(fan_in for fan_in, _ in shapes[1:])]
        return _with_norm(_normal(key, shapes, fan_ins), value_dim)

    def read(self, product: Product, params: Params, x: jax.Array) -> jax.Array:
        y = product(0, x)
        for i in range(1, self.depth):
            y = product(i, self.activation(y))
        return x + layer_norm(y, params)


@dataclass(frozen=True, repr=False)
class GatedMLP(Choice):
    """M(x) = (f(x W_1) * (x W_2)) W_3, f = SiLU, F = expansion K (LaCT, 2505.23884).

    With `residual` x is added, the memory of Atlas++ (arXiv 2505.23735); with `norm`
    the product is normalised first, as in `MLP`. Initial weights as there: variance one
    for W_1 and W_2, which read inputs of norm one, and 1 / F for W_3.
    """

    expansion: int = 4
    residual: bool = False
    norm: bool = False
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu

    is_linear = False
    is_affine = False
    entries = 2

    def __post_init__(self):
        if self.expansion < 1:
            raise UserError(
                f"memory.GatedMLP needs expansion >= 1; got {self.expansion}."
            )

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        if self.residual:
            _same_width("memory.GatedMLP(residual=True)", "adds", key_dim, value_dim)
        hidden = self.expansion * key_dim
        return ((key_dim, hidden), (key_dim, hidden), (hidden, value_dim))

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params:
        shapes = self.shapes(key_dim, value_dim)
        weights = _normal(key, shapes, (1, 1, shapes[2][0]))
        return _with_norm(weights, value_dim) if self.norm else Params(weights)

    def read(self, product: Product, params: Params, x: jax.Array) -> jax.Array:
        y = product(2, self.activation(product(0, x)) * product(1, x))
        y = layer_norm(y, params) if self.norm else y
        return x + y if self.residual else y


@dataclass(frozen=True, repr=False)
class Cache(Choice):
    """The keys and values themselves, read by softmax attention (core/attention.py).

    On TPU and GPU by the kernels that JAX ships (pallas_kernels/attention). With a
    `window`, those of the last so many tokens. It has no weights: `rule.weights(state)`
    are the keys `[S, K]` and values `[S, V]` that are kept. Made for bias.L2(),
    retention.Keep() and algorithm.NonParametric().
    """

    window: int | None = None

    is_linear = False
    is_affine = False
    entries = 0

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise UserError(f"memory.Cache needs window >= 1; got {self.window}.")

    def shapes(self, key_dim: int, value_dim: int) -> tuple[tuple[int, int], ...]:
        return ((0, key_dim), (0, value_dim))

    def init(self, key: jax.Array, key_dim: int, value_dim: int) -> Params:
        shapes = self.shapes(key_dim, value_dim)
        return Params(tuple(jnp.zeros(shape) for shape in shapes))
