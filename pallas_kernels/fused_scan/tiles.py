"""Arrays cut into tiles: what Triton holds in registers has sizes of powers of two."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Turn:
    """The counter of a loop over equal pieces of an axis, as an index."""

    def __init__(self, value: jax.Array):
        self.value = value


class Refused(Exception):
    """A step that cannot be evaluated by tiles; the message says why."""


Index = tuple[int | Turn, ...]
"""Of a tile: its place along every axis."""


class Piece(NamedTuple):
    """`size` entries of an axis, of which the first `valid` mean something."""

    start: int | jax.Array
    size: int
    valid: int


LEAST = 16
"""The least extent of an operand that a matrix unit takes."""


def pieces(length: int, limit: int) -> tuple[Piece, ...]:
    """An axis as powers of two from `LEAST` to `limit`.

    96 at limit 64 is 64 + 32; what is left below 16 is padded to 16.
    """
    if length == 1:
        return (Piece(0, 1, 1),)
    found, start = [], 0
    while start < length:
        left = length - start
        size = min(limit, max(LEAST, 1 << (left.bit_length() - 1)))
        found.append(Piece(start, size, min(size, left)))
        start += size
    return tuple(found)


def axes(shape: Sequence[int], limit: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of every axis; those before the last two are taken one by one."""
    leading = max(0, len(shape) - 2)
    single = [tuple(Piece(i, 1, 1) for i in range(n)) for n in shape[:leading]]
    return (*single, *(pieces(n, limit) for n in shape[leading:]))


class Memory(Protocol):
    """An array outside the registers, read and written by tiles."""

    def load(self, place: tuple[Piece, ...]) -> jax.Array: ...

    def store(self, place: tuple[Piece, ...], tile: jax.Array) -> None: ...


class Machine(Protocol):
    """What a chip adds to functions of tiles."""

    def multiply(self, left, right, precision, dtype) -> jax.Array:
        """The product of two matrices, no side below 16, summed in `dtype`."""

    def barrier(self) -> None:
        """What was stored before it is seen by loads after it."""

    def loop(self, first, last, body: Callable[[jax.Array], None]) -> None:
        """`body(i)` for i from first to last, with a barrier around every round."""


ELEMENTWISE = frozenset(
    "abs add add_any and cbrt ceil clamp convert_element_type copy cos div eq erf "
    "erf_inv exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt "
    "max min mul ne neg not or pow rem round rsqrt select_n sign sin sqrt square "
    "stop_gradient sub tan tanh xor".split()
)
MOVES = frozenset(("broadcast_in_dim", "reshape", "squeeze", "transpose", "iota"))
REDUCTIONS = {
    "reduce_sum": (jnp.sum, jnp.add, 0.0),
    "reduce_max": (jnp.max, jnp.maximum, -jnp.inf),
    "reduce_min": (jnp.min, jnp.minimum, jnp.inf),
}


def piece(axis: Sequence[Piece], i: int | Turn) -> Piece:
    """The piece with a number, or in a turn of a loop over equal pieces."""
    if isinstance(i, Turn):
        size = axis[0].size
        return Piece(i.value * jnp.asarray(size, i.value.dtype), size, size)
    return axis[i]


def each(grid: Sequence[Sequence[Piece]], body: Callable, total: Any = None) -> Any:
    """Fold `body(index, total)` over all tiles, in loops where they are alike."""
    if not grid:
        return body((), total)
    first, *rest = grid

    def inner(i, total):
        return each(rest, lambda index, total: body((i, *index), total), total)

    size = first[0].size
    equal = all(p.size == p.valid == size for p in first)
    if not equal or len(first) == 1:
        for i in range(len(first)):
            total = inner(i, total)
        return total
    count = np.int32(len(first))
    return jax.lax.fori_loop(0, count, lambda i, x: inner(Turn(i), x), total)
