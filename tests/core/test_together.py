"""Duals of several tokens from one product, as TPUs and GPUs make them."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import algorithm, memory, retention, variants
from miras_jax.core import exact, together
from miras_jax.core.product import Dot
from miras_jax.core.steps import Carried, TokenSteps
from pallas_kernels.fused_scan import target
from tests import core

MONETA = replace(variants.moneta(), readout="exact", chunk_size=6)
RULE = replace(MONETA, memory=memory.Linear())
RULES = {
    "moneta": MONETA,
    "lq of an odd power": replace(RULE, retention=retention.Lq(3.5)),
    "lq of a high power": replace(RULE, retention=retention.Lq(6.0)),
    "lq, mirror": replace(RULE, retention=retention.Lq(4.0, "mirror")),
    "kl": replace(MONETA, retention=retention.KL(mass=4.0)),
    "settling": replace(MONETA, retention=retention.FDivergence("kl")),
    "momentum": replace(RULE, algorithm=algorithm.Momentum()),
    "window": replace(RULE, algorithm=algorithm.Omega(window=5)),
}


def results(rule, length):
    """Outputs, the duals they leave, and all gradients."""
    params, tokens = core.inputs(core.Case("", rule), length)
    weights = np.random.default_rng(1).normal(size=tokens.values.shape)

    def read(params, tokens):
        state = rule.start(params)
        outputs, state = miras.run(rule, params, state, tokens, implementation="xla")
        return jnp.sum(weights * outputs), (outputs, state.dual)

    with jax.enable_x64(True):
        gradients = core.jit(jax.value_and_grad(read, (0, 1), has_aux=True))
        return jax.tree.leaves(gradients(params, tokens))


@pytest.fixture(autouse=True)
def groups_of_three(monkeypatch):
    monkeypatch.setattr(exact, "GROUP", 3)


@pytest.fixture
def made(monkeypatch):
    """How often duals were made together."""
    calls = []
    of = together.TokenMatrices.of
    monkeypatch.setattr(
        together.TokenMatrices,
        "of",
        lambda *args, **how: calls.append(1) or of(*args, **how),
    )
    return calls


@pytest.mark.parametrize("name", RULES)
def test_they_are_those_that_are_made_one_by_one(name, made):
    rule = RULES[name]
    length = 2 * rule.chunk_size
    expected = results(rule, length)
    assert not made
    with target("gpu" if name == "kl" else "tpu", interpret=True):
        actual = results(rule, length)
    assert made
    errors = [core.error(*pair) for pair in zip(actual, expected, strict=True)]
    assert max(errors) < 1e-10


def test_logits_of_a_softmax_are_not_rounded():
    """Those of bfloat16 tokens: as near to float32 as when made one by one."""
    rule = replace(variants.memora(), readout="exact", chunk_size=8)
    params, tokens = core.inputs(core.Case("", rule), 16)
    params, tokens = jax.tree.map(lambda x: jnp.asarray(x, "f4"), (params, tokens))
    params = params._replace(weights=tuple(8 * w for w in params.weights))
    slow = tokens.rates._replace(keep=jnp.ones(16), learn=0.01 * tokens.rates.learn)
    rounded = miras.Tokens(*(x.astype(jnp.bfloat16) for x in tokens[:3]), slow)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), rounded)

    def read(tokens):
        start = rule.start(params)
        return miras.run(rule, params, start, tokens, implementation="xla")[0]

    expected, alone = jax.jit(read)(wide), jax.jit(read)(rounded)
    with target("tpu", interpret=True):
        found = jax.jit(lambda tokens: read(tokens))(rounded)
    assert core.error(found, alone) < 0.1 * core.error(alone, expected)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-12, 1.0, 1e8])
def test_scales_of_duals_of_any_size(size):
    gate, matrix = retention.Lq(4.0), np.random.default_rng(0).normal(size=(4, 6))
    dual = jnp.asarray(size * matrix / np.linalg.norm(matrix), jnp.float32)
    ones, none = jnp.ones((2, 1)), jnp.zeros((2, 2))
    flow = SimpleNamespace(
        start=Carried(ones, ones[:1], None),
        momentum_in_dual=None,
        steps=TokenSteps(none, none[:, :1]),
    )
    a, d = jnp.zeros((2, 4)), jnp.zeros((2, 6))
    matrices = together.TokenMatrices.of(flow, dual, (), a, d, only_scales=True)
    scales = matrices.scales(Dot(dual.dtype, dual.dtype), gate, 2)
    expected = gate.scale(dual).item()
    np.testing.assert_allclose(scales, np.full((2, 1), expected), rtol=1e-5)


@pytest.mark.parametrize(
    "rule, channels",
    [(RULE, True), (replace(variants.lact(), readout="exact"), False)],
    ids=["channels", "muon"],
)
def test_what_is_not_one_number_per_token_is_made_one_by_one(rule, channels, made):
    rule = replace(rule, chunk_size=4)
    params, tokens = core.inputs(core.Case("", rule, channels), 8)
    with target("tpu", interpret=True):
        jax.eval_shape(core.run_whole(rule, "xla"), params, tokens)
    assert not made
