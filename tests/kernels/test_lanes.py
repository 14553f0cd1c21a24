"""Elements side by side compute what each of them does alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_scan import autodiff, program
from pallas_kernels.fused_scan.side_by_side import SideBySide

SIZE, COUNT = 8, 4
STRUCT = jax.ShapeDtypeStruct


def rows_with_rows(x, y):
    """x y^T, as one product."""
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())))


def step(carry, square, column, flag, number, shared, vector, tall):
    """Operations of every kind, on what fits into the lanes and what does not."""
    turned = square.T @ tall - (tall.T @ square).T  # [16, 40]
    products = square @ shared.T + shared @ square.T - square.T @ shared
    products = products + rows_with_rows(square, square * vector[None])
    masked = jnp.where(flag & (products > column), products, column * vector[None])
    largest = jnp.max(masked - 9, axis=1, keepdims=True)
    largest = largest - jnp.min(masked + 9, axis=1, keepdims=True)
    largest = 0.1 * largest + jnp.max(masked, axis=0)[None]
    long = jnp.concatenate([square, masked, square], axis=0)
    wide = jnp.concatenate([tall, rows_with_rows(square, long)], axis=1)
    high = jnp.concatenate([square, masked], axis=0)

    def round_(carried, row):
        total, count = carried
        total = jnp.tanh(total + row[None] * number)
        return (total, count + 1), jnp.sum(total @ tall, axis=1)

    (total, count), rows = jax.lax.scan(round_, (largest * square, 0), square)
    after = carry * number + jnp.exp(-jnp.abs(turned))
    read = jnp.sum(high, axis=0) + jnp.sum(count.astype(jnp.float32) * rows, axis=0)
    return after, read[None] + total, jnp.sum(wide, axis=1), jnp.sum(products)


CARRY = [STRUCT((16, 40), np.float32)]
XS = [
    STRUCT((16, 16), np.float32),
    STRUCT((16, 1), np.float32),
    STRUCT((), np.bool_),
    STRUCT((), np.float32),
]
CONSTS = [STRUCT(shape, np.float32) for shape in ((16, 16), (16,), (16, 40))]


def random(rng, leaf, lead):
    if leaf.dtype == np.bool_:
        return rng.integers(0, 2, (*lead, *leaf.shape)).astype(bool)
    return (0.3 * rng.normal(size=(*lead, *leaf.shape))).astype(leaf.dtype)


@pytest.fixture(scope="module")
def sides():
    """The program of single elements, and of four at once."""
    one = program.trace(step, CARRY, XS, CONSTS)
    rng = np.random.default_rng(0)
    xs = [autodiff.Operand(random(rng, leaf, (SIZE, 1)), 1) for leaf in XS]
    shared = autodiff.Operand(random(rng, CONSTS[0], (SIZE // COUNT,)), COUNT)
    own = [autodiff.Operand(random(rng, leaf, (SIZE,)), 1) for leaf in CONSTS[1:]]
    consts = [shared, *own]
    return one, SideBySide(one, SIZE, xs, consts), xs, consts


def beside(side, one, xs, consts, carry, cotangents):
    """The results of every function, for the first four elements, from four at once."""
    first = [o.array[0] for o in side.carry([autodiff.Operand(carry, 1)], one.carry)]
    first += [o.array[0, 0] for o in side.operands(xs, one.x)]
    first += [o.array[0] for o in side.operands(consts, one.consts)]
    like = (*program.floats(one.carry), *program.floats(one.y))
    back = [a[0] for a in side.arrays(cotangents, like)]
    leaves = {
        "step": (*one.carry, *one.y),
        "advance": one.carry,
        "pull_back": [leaf for part in one.cotangents for leaf in part],
    }
    for name, results in leaves.items():
        function = side.function(name)
        operands = [*first, *(back if name == "pull_back" else [])]
        found = function(function.constants, *map(jnp.asarray, operands))
        yield name, side.elements([array[None] for array in found], results)


def test_four_elements_at_once(sides):
    one, side, xs, consts = sides
    assert side.count == COUNT
    rng = np.random.default_rng(1)
    carry = random(rng, CARRY[0], (SIZE,))
    cotangents = [random(rng, leaf, (SIZE,)) for leaf in (*one.carry, *one.y)]
    for name, found in beside(side, one, xs, consts, carry, cotangents):
        function = getattr(one, name)
        for i in range(COUNT):
            operands = [carry[i], *(o.array[i, 0] for o in xs)]
            operands += [consts[0].array[0], *(o.array[i] for o in consts[1:])]
            operands += [d[i] for d in cotangents] if name == "pull_back" else []
            expected = function(function.constants, *map(jnp.asarray, operands))
            for actual, of_one in zip(found, expected, strict=True):
                size = np.sqrt(np.mean(np.square(of_one)))
                error = np.sqrt(np.mean(np.square(actual[i] - of_one)))
                assert error <= 2e-6 * size, (name, i, of_one.shape)


def test_elements_that_start_from_the_same_carry(sides):
    one, side, *_ = sides
    rows = random(np.random.default_rng(2), CARRY[0], (SIZE // COUNT,))
    (shared,) = side.carry([autodiff.Operand(rows, COUNT)], one.carry)
    of_each = jnp.repeat(rows, COUNT, axis=0)
    assert shared.repeat == 1
    np.testing.assert_array_equal(shared.array, *side.arrays([of_each], one.carry))
    np.testing.assert_array_equal(of_each, *side.elements([shared.array], one.carry))


def test_three_rows_that_pairs_take_turns_with():
    one = program.trace(
        lambda carry, x, scale: (carry + x, x * scale),
        [STRUCT((8, 64), np.float32)],
        [STRUCT((8, 64), np.float32)],
        [STRUCT((), np.float32)],
    )
    xs = [autodiff.Operand(np.zeros((6, 1, 8, 64), np.float32), 1)]
    heads = autodiff.Operand(np.arange(3, dtype=np.float32), 1)
    side = SideBySide(one, 6, xs, [heads])
    (scale,) = side.operands([heads], one.consts)
    assert side.count == 2
    np.testing.assert_array_equal(scale.array[:, :, 0, 0], [[0, 1], [2, 0], [1, 2]])


def test_what_fits_is_in_the_lanes_and_what_is_shared_is_one(sides):
    _, side, *_ = sides
    parts = (side.leaves.x, side.leaves.consts)
    x, consts = ([leaf.shape for leaf in part] for part in parts)
    assert x == [(16, 64), (4, 16, 1), (4, 1, 1), (4, 1, 1)]
    assert consts == [(16, 16), (64,), (4, 16, 40)]


@pytest.mark.parametrize(
    "columns, size, count",
    [(64, 8, 2), (48, 8, 2), (32, 8, 4), (128, 8, 1), (64, 3, 1)],
)
def test_as_many_as_there_is_room_for(columns, size, count):
    one = program.trace(
        lambda carry, x: (carry + x, x),
        [STRUCT((8, columns), np.float32)],
        [STRUCT((8, columns), np.float32)],
        [],
    )
    xs = [autodiff.Operand(np.zeros((size, 2, 8, columns), np.float32), 1)]
    assert SideBySide(one, size, xs, []).count == count
