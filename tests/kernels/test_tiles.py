"""How the GPU's kernels are laid out: into which tiles, and what is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused_scan import fused_scan, gpu, target
from pallas_kernels.fused_scan.layout import Layout, Tuning
from pallas_kernels.fused_scan.program import Function
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


def looped(x, y):
    x = jnp.matmul(x, y, precision=PRECISE)
    return jax.lax.fori_loop(0, 3, lambda _, x: products(1, PRECISE)(x, y), x)


@pytest.mark.parametrize(
    "run, dtype, size, expected",
    [
        (products(2, None), np.float32, 64, gpu.TUNING),
        (products(2, PRECISE), jnp.bfloat16, 64, gpu.TUNING),
        (products(2, PRECISE), np.float32, 32, gpu.TUNING),
        (products(1, PRECISE), np.float32, 64, gpu.TUNING),
        (products(2, PRECISE), np.float32, 64, gpu.PRECISE),
        (looped, np.float32, 64, gpu.PRECISE),
    ],
    ids=("plain", "narrow", "small", "one-precise", "precise", "precise-in-a-loop"),
)
def test_products_at_full_precision_have_smaller_tiles(run, dtype, size, expected):
    square = jnp.zeros((size, size), dtype)
    assert gpu.tuning(function(run, square, square)) == expected
    assert gpu.PRECISE.tile < gpu.TUNING.tile


def test_each_kernel_has_its_own_tiles(monkeypatch):
    """One product at full precision forward, and two more backward."""
    seen = []

    class Seen(Layout):
        def __init__(self, jaxpr, tuning):
            seen.append(tuning)
            super().__init__(jaxpr, tuning)

    monkeypatch.setattr(gpu, "Layout", Seen)

    def step(carry, x, _):
        return carry, jnp.matmul(x, carry, precision=PRECISE)

    def run(carry, xs):
        return fused_scan(step, carry, xs, (), implementation="gpu")[1]

    operands = jnp.zeros((64, 64)), jnp.zeros((2, 64, 64))
    with target("gpu"):
        jax.eval_shape(lambda *o: jax.vjp(run, *o)[1](o[1]), *operands)
    assert seen == [gpu.TUNING, gpu.PRECISE, gpu.PRECISE]


def test_only_single_numbers_stay_in_registers():
    def run(x):
        rows = jnp.sum(x, axis=1, keepdims=True)
        total = jnp.sum(x)
        return x * rows + total

    layout = Layout(function(run, jnp.zeros((32, 32))).jaxpr, Tuning(tile=32))
    held = [v.aval.shape for v in layout.kept if v not in layout.slots]
    assert held == [()]
    assert set(layout.scratch) == {((32,), jnp.dtype(np.float32))}


@pytest.mark.parametrize(
    "between, stored", [(jnp.sin, 1), (lambda x: x.T, 0), (lambda x: x, 0)]
)
def test_what_is_read_twice_is_stored_unless_it_is_only_moved(between, stored):
    """What two sums read."""

    def run(x):
        y = between(x)
        return jnp.sum(y, axis=0), jnp.sum(y, axis=1)

    layout = Layout(function(run, jnp.zeros((32, 32))).jaxpr, Tuning(tile=32))
    assert layout.scratch.get(((32, 32), jnp.dtype(np.float32)), 0) == stored


@pytest.mark.parametrize("tile", [16, 32])
def test_tiles_change_no_result(tile, monkeypatch):
    """Of 40 by 24: whole tiles, one that is cut short, and loops over equal ones."""
    monkeypatch.setattr(gpu, "TUNING", Tuning(tile=tile))
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
        assert len(Layout(jaxpr, Tuning(tile=16)).kept) == count - 1
