"""The real TPU compiler takes the kernels, on a machine without a TPU."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.kernels import cases, layers
from pallas_kernels import fused_scan
from pallas_kernels.aot import hlo, tpu, work
from tests import kernels

pytest.importorskip("libtpu", reason="libtpu, the TPU compiler, is not installed")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(cases, "ELEMENTS", 2)
    monkeypatch.setattr(cases, "CHUNKS", 2)


@pytest.mark.parametrize("name", ["yaad", "memora", "gated_delta_net"])
def test_forward_and_backward_compile_for_v5e(name):
    forward, both = cases.cases([name], d=64, chunk=64)
    for case, kernels_in_it in ((forward, 1), (both, 2)):
        program = tpu.compile_for("v5e", case.kernel, *case.operands)
        assert program.as_text().count('"tpu_custom_call"') == kernels_in_it


def test_a_rule_that_keeps_everything_compiles_for_v6e():
    """Unless some of its products are turned the compiler ends in internal errors."""
    (case,) = [
        case
        for case in cases.cases(["ttt_linear"], d=64, chunk=64)
        if case.name.endswith("both")
    ]
    tpu.compile_for("v6e", case.kernel, *case.operands)


def test_what_is_around_the_kernels_of_a_layer(monkeypatch):
    """More than its products need, which of each head are twice in twice the width."""
    monkeypatch.setattr(layers, "LENGTH", 4096)
    monkeypatch.setattr(layers, "ROWS", 1)
    found = {}
    for heads in (2, 4):
        monkeypatch.setattr(layers, "HEADS", heads)
        found[heads] = layers.measure("linear_attention", "v5e")
    (around, products, _), (_, of_wider, _) = found[2], found[4]
    assert around > products > 0
    assert 1.8 < of_wider / products < 2.1


def test_split_over_the_devices_of_a_host():
    """Kernels for several devices are refused unless they are told how to split."""
    tpu.prepare()
    devices = np.array(tpu.topology("v5e").devices).reshape(2, 2)
    mesh = Mesh(devices, ("data", "model"))
    case = kernels.CASES[0]
    specs = (P("data", "model"), P("data", "model"), P("model"))
    operands = tuple(
        jax.tree.map(
            lambda x, spec=spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec)
            ),
            part,
        )
        for part, spec in zip(kernels.inputs(case, 2), specs, strict=True)
    )

    def run(*operands):
        scan = fused_scan.fused_scan
        return kernels.over_batch(lambda *o: scan(case.step, *o), case.axes)(*operands)

    with fused_scan.target("tpu"):
        with fused_scan.split_over(mesh, "data", "model"):
            jax.jit(run).lower(*operands).compile()
        with pytest.raises(NotImplementedError, match="partition"):
            jax.jit(lambda *o: run(*o)).lower(*operands).compile()


def test_work_is_counted():
    """One matrix product of [4, 8] and [8, 16] in each of 3 chunks of 2 elements."""

    def one(start, xs):
        def step(carry, x, _):
            return carry, x @ carry

        return fused_scan.fused_scan(step, start, xs, ())[1]

    struct = jax.ShapeDtypeStruct
    with fused_scan.target("tpu"):
        counted = work(
            jax.vmap(one),
            struct((2, 8, 16), np.float32),
            struct((2, 3, 4, 8), np.float32),
        )
    assert counted.multiply_adds == 2 * 3 * 4 * 8 * 16
    carried, read, written = 2 * 8 * 16, 2 * 3 * 4 * 8, 2 * 3 * 4 * 16
    assert counted.bytes == 4 * (2 * carried + read + written)


def test_the_estimate_multiplies_loops_by_their_rounds():
    """Ten times the rounds of a scan take about ten times as long."""

    def cycles(rounds):
        def run(x):
            return jax.lax.scan(lambda c, _: (c @ c, None), x, length=rounds)[0]

        operand = jax.ShapeDtypeStruct((256, 256), np.float32)
        return hlo.estimated_cycles(tpu.compile_for("v5e", run, operand).as_text())

    assert 8 < cycles(300) / cycles(30) < 12


BUNDLES = """
     0   :  { %s1 = inlined }
   0x1 LB: > { %v1 = vld }
   0x2   : > { %v2 = vadd }
   0x3 LB: >> { %v3 = vld }
   0x4 LB: >>> { %v4 = vmul }
   0x5   : >>> { %5 = sbr.rel (!%p1) target = $region4 }
   0x6   : >> { %6 = sbr.rel (!%p2) target = $region3 }
   0x7   : > { %7 = sbr.rel (!%p0) target = $region2 }
   0x8   :  { %v8 = vst }
"""


def test_bundles_of_loops_count_as_often_as_they_run():
    assert tpu._times(BUNDLES, [3, 5]) == [1, 1, 1, 3, 15, 15, 3, 1, 1]
    with pytest.raises(ValueError, match="loops"):
        tpu._times(BUNDLES, [3, 5, 7])
