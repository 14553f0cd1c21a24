"""Several documents in a sequence, and rates by channel, through the TPU's kernel."""

import jax
import numpy as np
import pytest

import miras_jax as miras
from miras_jax.core import engine
from pallas_kernels.fused_scan import target, tpu
from tests import core, kernels

LENGTH = 14
CASES = [
    case
    for case in core.variant_cases()
    if case.name in ("yaad", "gla", "kimi_delta_attention")
]


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """Exact linear rules run in tiles of four tokens, as the others in chunks."""
    monkeypatch.setattr(engine, "LINEAR_TILE", 4)
    monkeypatch.setattr(tpu, "GROUP", 1)


def documents():
    """One that fills a chunk, padding, and one that ends inside a chunk, in two rows.

    In the other row the second begins a chunk later.
    """
    starts, real = np.zeros((2, LENGTH), bool), np.zeros((2, LENGTH), bool)
    for row, second in enumerate((8, 12)):
        starts[row, [0, second]] = True
        real[row, :5] = real[row, second:] = True
    return miras.Documents(starts, real)


def read(rule, implementation):
    def one(params, tokens, marks):
        state = rule.start(params)
        outputs, state = miras.run(
            rule, params, state, tokens, documents=marks, implementation=implementation
        )
        return {"outputs": outputs, "weights": rule.weights(state)}

    return jax.vmap(one, (None, 0, 0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_documents_through_the_kernel(case):
    """Outputs, the state and every gradient are those of XLA."""
    (params, first), (_, second) = (core.inputs(case, LENGTH, seed) for seed in (0, 1))
    tokens = jax.tree.map(lambda *x: np.stack(x), first, second)
    params, tokens = jax.tree.map(lambda x: x.astype(np.float32), (params, tokens))
    operands = params, tokens, documents()
    expected = kernels.results(read(case.rule, "xla"), operands)
    with target("tpu", interpret=True):
        actual = kernels.results(read(case.rule, "pallas"), operands)
    found = kernels.errors(actual, expected)
    assert max(found.values()) < 1e-4, found
