"""Arrays cut into tiles: what Triton holds in registers has sizes of powers of two."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np


class Turn:
    """The counter of a loop over the pieces of an axis, as an index."""

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
    valid: int | jax.Array

    @property
    def may_be_padded(self) -> bool:
        return not isinstance(self.valid, int) or self.valid < self.size


LEAST = 16
"""The least extent of an operand that a matrix unit takes."""


def pieces(length: int, limit: int) -> tuple[Piece, ...]:
    """An axis in equal pieces, as large as fit into it, the last padded.

    At limit 64, 79 is two of 64 and 40 two of 32; one below 16 is one of 16.
    """
    if length == 1:
        return (Piece(0, 1, 1),)
    size = min(limit, max(LEAST, 1 << (length.bit_length() - 1)))
    starts = range(0, length, size)
    return tuple(Piece(i, size, min(size, length - i)) for i in starts)


def axes(shape: Sequence[int], limit: int) -> tuple[tuple[Piece, ...], ...]:
    """The pieces of every axis; those before the last two are taken one by one."""
    leading = max(0, len(shape) - 2)
    single = [tuple(Piece(i, 1, 1) for i in range(n)) for n in shape[:leading]]
    return (*single, *(pieces(n, limit) for n in shape[leading:]))


def padded(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """The shape with what fills the last tiles; no smaller limit needs more."""
    return tuple(sum(p.size for p in axis) for axis in axes(shape, limit))


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
JOINS = frozenset(("concatenate", "split"))
MOVES = frozenset(("broadcast_in_dim", "reshape", "squeeze", "transpose", "iota"))
REDUCTIONS = {
    "reduce_sum": (jnp.sum, jnp.add, 0.0),
    "reduce_max": (jnp.max, jnp.maximum, -jnp.inf),
    "reduce_min": (jnp.min, jnp.minimum, jnp.inf),
}


def is_precise(eqn) -> bool:
    """Whether an equation is a product at full precision."""
    return (
        eqn.primitive.name == "dot_general"
        and eqn.params["precision"] is not None
        and all(atom.aval.dtype == jnp.float32 for atom in eqn.invars)
    )


def piece(axis: Sequence[Piece], i: int | Turn) -> Piece:
    """The piece with a number, or in a turn of a loop over all of them."""
    if not isinstance(i, Turn):
        return axis[i]
    size, last = axis[0].size, axis[-1]
    start = i.value * jnp.asarray(size, i.value.dtype)
    if not last.may_be_padded:
        return Piece(start, size, size)
    end = jnp.asarray(last.start + last.valid, start.dtype)
    return Piece(start, size, jnp.minimum(end - start, size))


def each(grid: Sequence[Sequence[Piece]], body: Callable, total: Any = None) -> Any:
    """Fold `body(index, total)` over all tiles, in a loop along every axis."""
    if not grid:
        return body((), total)
    first, *rest = grid

    def inner(i, total):
        return each(rest, lambda index, total: body((i, *index), total), total)

    if len(first) == 1:
        return inner(0, total)
    count = np.int32(len(first))
    return jax.lax.fori_loop(0, count, lambda i, x: inner(Turn(i), x), total)


def misaligned(eqn) -> Refused:
    """What refuses an equation that moves more than the last two axes."""
    shapes = " to ".join(str(v.aval) for v in (*eqn.invars, *eqn.outvars))
    return Refused(
        f"cannot take {eqn.primitive.name} from {shapes} by tiles, "
        "which hold the last two axes of an array"
    )
