"""How the GPU's kernels are laid out: into which tiles, and what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_scan import fused_scan, gpu, layout, target, triton
from pallas_kernels.fused_scan.layout import Layout, Tuning
from pallas_kernels.fused_scan.program import Function
from pallas_kernels.fused_scan.tiles import pieces
from tests.kernels import CASES, errors, inputs, over_batch, results

PRECISE = jax.lax.Precision.HIGHEST


def function(run, *operands):
    return Function(jax.make_jaxpr(run)(*operands).jaxpr, ())


def products(count, precision):
    def run(x, y):
        for _ in range(count):
            x = jnp.matmul(x, y, precision=precision)
        return x

    return run


def extents(run, *operands):
    """Of the tiles that a function's products multiply."""
    found, tuning = set(), gpu.TUNING

    class Recorder(triton.Element):
        def multiply(self, left, right, precision, dtype):
            found.update(left.shape, right.shape)
            return super().multiply(left, right, precision, dtype)

    jaxpr = function(run, *operands).jaxpr
    assert layout.objection(jaxpr, tuning, Recorder(None, True, tuning)) is None
    return found


def rows(length):
    return jnp.zeros((length, 16))


def looped(x, y):
    return jax.lax.fori_loop(0, 3, lambda _, x: products(1, PRECISE)(x, y), x)


@pytest.mark.parametrize(
    "run, dtype, expected",
    [
        (products(2, None), np.float32, 64),
        (products(2, PRECISE), jnp.bfloat16, 64),
        (products(1, PRECISE), np.float32, 32),
        (products(2, PRECISE), np.float32, 32),
        (looped, np.float32, 32),
    ],
    ids=("plain", "narrow", "output", "precise", "loop"),
)
def test_products_at_full_precision_have_smaller_tiles(run, dtype, expected):
    square = jnp.zeros((64, 64), dtype)
    assert extents(run, square, square) == {expected}


def test_other_products_of_the_same_kernel_do_not():
    def run(x, y):
        return jnp.matmul(products(1, PRECISE)(x, y), y)

    square = jnp.zeros((64, 64))
    assert extents(run, square, square) == {32, 64}


@pytest.mark.parametrize(
    "length, size", [(9, 16), (31, 16), (40, 32), (64, 64), (79, 64)]
)
def test_all_pieces_of_an_axis_are_alike(length, size):
    found = pieces(length, 64)
    assert {piece.size for piece in found} == {size}
    assert [piece.start for piece in found] == list(range(0, length, size))
    assert sum(piece.valid for piece in found) == length


def test_only_single_numbers_stay_in_registers():
    def run(x):
        rows = jnp.sum(x, axis=1, keepdims=True)
        total = jnp.sum(x)
        return x * rows + total

    planned = Layout(
        function(run, jnp.zeros((32, 32))).jaxpr, Tuning(tile=32, precise=32)
    )
    held = [v.aval.shape for v in planned.kept if v not in planned.slots]
    assert held == [()]
    assert set(planned.scratch) == {((32,), jnp.dtype(np.float32))}


@pytest.mark.parametrize(
    "between, stored", [(jnp.sin, 1), (lambda x: x.T, 0), (lambda x: x, 0)]
)
def test_what_is_read_twice_is_stored_unless_it_is_only_moved(between, stored):
    """What two sums read."""

    def run(x):
        y = between(x)
        return jnp.sum(y, axis=0), jnp.sum(y, axis=1)

    planned = Layout(
        function(run, jnp.zeros((32, 32))).jaxpr, Tuning(tile=32, precise=32)
    )
    assert planned.scratch.get(((32, 32), jnp.dtype(np.float32)), 0) == stored


@pytest.mark.parametrize("tile", [16, 32])
def test_tiles_change_no_result(tile, monkeypatch):
    """Of 40 by 24: whole tiles, and one that is cut short."""
    monkeypatch.setattr(gpu, "TUNING", Tuning(tile=tile, precise=16))
    case = CASES[0]._replace(
        carry={"w": (40, 24)},
        x=CASES[0].x | {"keys": (8, 40)},
    )
    operands = inputs(case, 2)

    def scan(implementation):
        def run(carry, xs, consts):
            step = case.step
            return fused_scan(step, carry, xs, consts, implementation=implementation)

        return over_batch(run, case.axes)

    with target("gpu", interpret=True):
        actual = results(scan("gpu"), operands)
    found = errors(actual, results(scan("reference"), operands))
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("count", [1, 2, 6])
def test_all_but_one_of_the_products_behind_an_output_are_stored(count):
    """Else each tile would compute what is behind it again, or all at once."""
    square = jnp.zeros((64, 64))

    def beside(x, y):
        return sum((jnp.matmul(x, y + i) for i in range(1, count)), jnp.matmul(x, y))

    for run in (products(count, None), beside):
        jaxpr = function(run, square, square).jaxpr
        assert len(Layout(jaxpr, Tuning(tile=16, precise=16)).kept) == count - 1


@pytest.mark.parametrize("lengths, room", [((16, 15), 31), ((1, 15), 17), ((4, 2), 20)])
def test_a_joined_array_has_room_for_the_last_tile_of_every_part(lengths, room):
    """Which would be written over another array."""
    joined = function(lambda *x: 2 * jnp.concatenate(x), *map(rows, lengths)).jaxpr
    (key,) = Layout(joined, gpu.TUNING).scratch
    assert key == ((room, 16), jnp.dtype(np.float32))


def test_parts_of_what_comes_in_are_refused_where_their_tiles_end_behind_it():
    def objection(*lengths):
        jaxpr = function(lambda x: jax.lax.split(x, lengths), rows(sum(lengths))).jaxpr
        machine = triton.Element(None, True, gpu.TUNING)
        return layout.objection(jaxpr, gpu.TUNING, machine)

    assert objection(16, 15) is None
    assert "tiles end before its own" in objection(1, 15)


def test_an_array_stays_where_it_is_until_its_parts_are_read():
    def run(x):
        first, second = jax.lax.split(jnp.matmul(x, x), (16, 16))
        other = jnp.matmul(x, 2 * x)
        return jnp.matmul(first, other), jnp.matmul(second, other)

    planned = Layout(function(run, jnp.zeros((32, 32))).jaxpr, gpu.TUNING)
    assert planned.scratch == {((32, 32), jnp.dtype(np.float32)): 2}


def test_what_is_stored_on_the_way_is_one_array_of_each_dtype(monkeypatch):
    """Addresses of many would not fit into registers."""
    taken, call = [], gpu._call

    def counted(kernel, size, *arrays):
        taken.append(len(jax.tree.leaves(arrays)))
        return call(kernel, size, *arrays)

    monkeypatch.setattr(gpu, "_call", counted)
    for widths in ((8,), (8, 20, 40)):

        def step(carry, x, _, widths=widths):
            for width in widths:
                weights = np.random.default_rng(0).normal(size=(8, width))
                weights = jnp.asarray(weights, x.dtype)
                y = jnp.matmul(jnp.tanh(jnp.matmul(x, weights)), weights.T)
                x = x + y * jnp.sum(y * y)
            return carry + x, carry

        def run(carry, xs, step=step):
            return fused_scan(step, carry, xs, (), implementation="gpu")

        with target("gpu", interpret=True):
            jax.eval_shape(run, jnp.ones((8, 8)), jnp.ones((3, 8, 8)))
    few, many = taken
    assert few == many
