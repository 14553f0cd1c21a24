"""Every kernel of fused_scan against its definition, without the chip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import fused_scan as package
from pallas_kernels.fused_scan import autodiff, fused_scan, target
from tests import kernels
from tests.kernels import CASES, errors, inputs, over_batch, results

KERNELS = ("tpu", "gpu")
TOLERANCE = {np.float32: 2e-6, jnp.bfloat16: 2e-2}
# Outputs and cotangents of bfloat16 are rounded after sums in a different order.


def scan(case, implementation):
    def run(carry, xs, consts):
        return fused_scan(case.step, carry, xs, consts, implementation=implementation)

    return over_batch(run, case.axes)


def compare(case, kernel, chunks, interpret=True):
    operands = inputs(case, chunks)
    expected = results(scan(case, "reference"), operands)
    with target(kernel, interpret=interpret):
        actual = results(scan(case, kernel), operands)
    return errors(actual, expected)


def by_name(case):
    return case.name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=by_name)
def test_outputs_and_every_gradient(case, kernel):
    found = compare(case, kernel, chunks=3)
    assert max(found.values()) < TOLERANCE[case.dtype], found


STRETCHES = [(1, 1, "tpu"), (5, 2, "tpu"), (6, 3, "tpu"), (3, 8, "tpu"), (5, 2, "gpu")]


@pytest.mark.parametrize("chunks, every, kernel", STRETCHES)
def test_recomputing_from_every_mth_carry(chunks, every, kernel, monkeypatch):
    monkeypatch.setattr(autodiff, "stretch", lambda *_: min(every, chunks))
    found = compare(CASES[0], kernel, chunks)
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_vmap_and_with_one_axis(kernel):
    case = CASES[0]
    carry, xs, consts = inputs(case._replace(axes=(kernels.NEITHER,) * 3), 2)

    def run(carry, xs, consts, implementation):
        return fused_scan(case.step, carry, xs, consts, implementation=implementation)

    expected = run(carry, xs, consts, "reference")
    three = jax.tree.map(lambda x: jnp.stack([x] * 3), xs)
    with target(kernel, interpret=True):
        single = run(carry, xs, consts, kernel)
        shared = jax.vmap(lambda x: run(carry, x, consts, kernel))(three)
    for actual in (single, jax.tree.map(lambda x: x[2], shared)):
        for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_value_that_the_step_captured_has_its_gradient(kernel):
    case = CASES[0]._replace(axes=(kernels.NEITHER,) * 3)
    operands = inputs(case, 2)

    def capturing(implementation):
        def run(carry, xs, consts):
            def step(carry, x, _):
                return case.step(carry, x, consts)

            return fused_scan(step, carry, xs, (), implementation=implementation)

        return run

    expected = results(capturing("reference"), operands)
    with target(kernel, interpret=True):
        actual = results(capturing(kernel), operands)
    found = errors(actual, expected)
    assert max(found.values()) < 2e-6, found


# One adds in the order of the reference, the other by tiles. The reference itself is
# 3e-6 away from the same in float64, so another order may be as far from it.
TWICE = {"tpu": 5e-7, "gpu": 4e-6}


@pytest.mark.parametrize("kernel", KERNELS)
def test_under_checkpoint_and_as_part_of_a_scan(kernel):
    case = CASES[0]
    carry, xs, consts = inputs(case, 2)

    def twice(implementation):
        one = jax.checkpoint(scan(case, implementation))

        def run(carry, xs, consts):
            return jax.lax.scan(lambda c, _: one(c, xs, consts), carry, length=2)

        return run

    expected = results(twice("reference"), (carry, xs, consts))
    with target(kernel, interpret=True):
        actual = results(twice(kernel), (carry, xs, consts))
    found = errors(actual, expected)
    assert max(found.values()) < TWICE[kernel], found


@pytest.mark.parametrize("kernel", KERNELS)
def test_loops_inside_a_step(kernel):
    """One that goes back through what another stacked, and one inside of it."""

    def step(carry, x, consts):
        def double(_, w):
            return w * 0.5 + jnp.tanh(w)

        def forward(carry, row):
            w, count, odd = carry
            w = jax.lax.fori_loop(0, 3, double, w) + row
            w = jnp.where(odd, w, w * consts["scale"][None])
            return (w, count + 1, ~odd), w * count

        rows = x["values"]
        start = (carry["w"], 0, jnp.zeros((1, 24), bool))
        (w, count, _), seen = jax.lax.scan(forward, start, rows)
        total, back = jax.lax.scan(
            lambda c, row: (c + row, c * row), w, seen, reverse=True
        )
        return {"w": w / 8 + count}, back + total[None]

    case = kernels.Case(
        "loops", step, {"w": (1, 24)}, {"values": (4, 1, 24)}, {"scale": (24,)}
    )
    found = compare(case, kernel, chunks=2)
    assert max(found.values()) < 2e-6, found


def test_on_a_simulated_tpu_no_race_and_no_read_before_a_write():
    """Its memory starts as NaN, and clocks order what DMAs and kernel touch."""
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    case = CASES[0]._replace(axes=(kernels.BOTH,) * 3)
    found = compare(case, "tpu", chunks=3, interpret=simulated)
    assert max(found.values()) < 2e-6, found


# The comparison can fail.


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_wrong_step_is_noticed_in_every_tensor(kernel):
    case = CASES[0]
    operands = inputs(case, 2)

    def wrong(carry, x, consts):
        return case.step(carry, {**x, "rate": x["rate"] * 1.001}, consts)

    expected = results(scan(case, "reference"), operands)
    with target(kernel, interpret=True):
        actual = results(scan(case._replace(step=wrong), kernel), operands)
    found = errors(actual, expected)
    assert min(found.values()) > 2e-5, found


# Choosing.


def test_the_reference_is_taken_where_no_kernel_fits():
    def cumulative(carry, x, consts):
        return carry, jnp.cumsum(x + consts)

    operands = (jnp.zeros(()), jnp.ones((2, 4)), jnp.ones(()))
    with target("tpu", interpret=True):
        _, ys = fused_scan(cumulative, *operands)
        with pytest.raises(package.Unsupported, match="cumsum"):
            fused_scan(cumulative, *operands, implementation="tpu")
    np.testing.assert_allclose(ys, [[2, 4, 6, 8]] * 2)


@pytest.mark.parametrize("name, word", [("tpu", "needs a TPU"), ("npu", "reference")])
def test_a_kernel_that_cannot_run_here_says_why(name, word):
    operands = (jnp.zeros(()), jnp.ones((2, 4)), ())
    with pytest.raises(ValueError, match=word):
        fused_scan(lambda c, x, _: (c, x), *operands, implementation=name)
