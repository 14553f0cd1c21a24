"""Kernels with batch and heads split over a mesh of eight simulated devices."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.fused_scan import fused_scan, split_over, target
from tests.kernels import CASES, errors, inputs, over_batch, results

CASE = CASES[0]
SPLIT = (P("data", "model"), P("data", "model"), P("model"))  # carry, xs, consts


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def scan(implementation):
    def run(carry, xs, consts):
        return fused_scan(CASE.step, carry, xs, consts, implementation=implementation)

    return over_batch(run, CASE.axes)


@pytest.fixture(scope="module")
def operands(mesh):
    shardings = tuple(NamedSharding(mesh, spec) for spec in SPLIT)
    return jax.device_put(inputs(CASE, 2), shardings)


@pytest.fixture(scope="module")
def expected():
    return results(scan("reference"), inputs(CASE, 2))


def test_split_over_batch_and_heads(mesh, operands, expected):
    with target("tpu", interpret=True), split_over(mesh, "data", "model"):
        actual = results(scan("tpu"), operands)
        compiled = jax.jit(scan("tpu")).lower(*operands).compile()
    found = errors(actual, expected)
    assert max(found.values()) < 2e-6, found
    assert actual["[1]"].sharding.spec == P("data", "model")
    # Of the forward pass nothing is sent.
    assert not re.search(r"(all|collective)-\w+\(", compiled.as_text())


def test_an_axis_that_does_not_divide_stays_whole(mesh, operands, expected):
    with target("tpu", interpret=True), split_over(mesh, ("data", "model"), None):
        actual = results(scan("tpu"), operands)
    found = errors(actual, expected)
    assert max(found.values()) < 2e-6, found


def test_inside_a_shard_map(mesh, operands, expected):
    mapped = jax.shard_map(
        scan("tpu"),
        mesh=mesh,
        in_specs=SPLIT,
        out_specs=P("data", "model"),
        check_vma=False,
    )
    with target("tpu", interpret=True):
        actual = results(mapped, operands)
    found = errors(actual, expected)
    assert max(found.values()) < 2e-6, found


def test_axes_in_between_of_which_there_is_one(mesh):
    """Rows, memories of a key, heads of a memory: the first that four divides."""

    def one(start, xs):
        return fused_scan(lambda c, x, _: (c + x, c * x), start, xs, ())

    function = one
    for _ in range(4):
        function = jax.vmap(function)
    start, xs = np.ones((2, 1, 8, 3, 8, 8)), np.ones((2, 1, 8, 3, 2, 8, 8))
    with target("tpu", interpret=True), split_over(mesh, "data", "model"):
        end, _ = jax.jit(function)(np.float32(start), np.float32(xs))
    assert end.sharding.spec == P("data", None, "model")
    assert np.all(np.asarray(end) == 3)
