"""Every rule, in every implementation, against NumPy in float64."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import algorithm, bias, memory, retention
from tests import core
from tests.core import Case, error, oracle, recurrences

pytestmark = pytest.mark.usefixtures("float64")

CASES = core.all_cases()


def configurations():
    """(case, chunk size, readout), each function of the tokens once.

    The readouts differ only inside a chunk and where weights are not the dual.
    """
    for case in CASES:
        readout = case.rule.readout
        if readout == "exact":
            continue  # a row of the contract; here every row is read both ways
        yield case, 1, readout
        learner = case.rule.algorithm
        alone = learner.erases or learner.curves or case.rule.keeps_tokens
        if case.rule.algorithm.at == "previous" and not alone:
            yield case, 4, readout
            nonlinear = not case.rule.retention.is_identity
            nonlinear |= isinstance(case.rule.algorithm, algorithm.Muon)
            if nonlinear and readout == "linear":
                yield case, 4, "exact"


def name(value):
    return value.name if isinstance(value, Case) else str(value)


def named(row):
    return next(case for case in CASES if case.name == row)


@pytest.mark.parametrize("case, chunk_size, readout", list(configurations()), ids=name)
def test_every_rule_matches_the_oracle(case, chunk_size, readout):
    rule = replace(case.rule, chunk_size=chunk_size, readout=readout)
    params, tokens = core.inputs(case)
    expected, _ = oracle.run(rule, params, tokens)

    for implementation in ("definition", "xla"):
        outputs, _ = core.run_whole(rule, implementation)(params, tokens)
        assert outputs.dtype == np.float64
        assert error(outputs, expected) < 1e-10, implementation
    outputs, states = core.run_steps(rule, params, tokens)
    assert error(outputs, expected) < 1e-10, "step"

    first_two_chunks = jax.tree.map(lambda x: x[:8], tokens)
    _, weights = oracle.run(rule, params, first_two_chunks)
    for actual, matrix in zip(rule.weights(states[7]), weights, strict=True):
        assert error(actual, matrix) < 1e-10


@pytest.mark.parametrize("case", core.variant_cases(), ids=name)
def test_float32_agrees_in_all_implementations(case):
    params, tokens = core.inputs(case)
    expected, _ = oracle.run(case.rule, params, tokens)
    with jax.enable_x64(False):
        params, tokens = jax.tree.map(lambda x: x.astype(np.float32), (params, tokens))
        results = [
            core.run_whole(case.rule, "definition")(params, tokens)[0],
            core.run_whole(case.rule, "xla")(params, tokens)[0],
            core.run_steps(case.rule, params, tokens)[0],
        ]
    for outputs in results:
        assert outputs.dtype == np.float32
        assert error(outputs, expected) < 1e-4


@pytest.mark.parametrize("chunk_size", [11, 32])
@pytest.mark.parametrize(
    "row, readout",
    [
        ("yaad", "linear"),
        ("momentum-channels", "linear"),
        ("mlp-3-channels", "linear"),
        ("lq-paper-channels", "exact"),
        ("momentum-lq", "exact"),
    ],
)
def test_long_chunks(row, readout, chunk_size):
    """Chunks that are no power of two, or longer than the sequence."""
    case = named(row)
    rule = replace(case.rule, chunk_size=chunk_size, readout=readout)
    params, tokens = core.inputs(case, length=25)
    expected, _ = oracle.run(rule, params, tokens)
    outputs, _ = core.run_whole(rule, "xla")(params, tokens)
    assert error(outputs, expected) < 1e-10


@pytest.mark.parametrize("loss", [bias.DotProduct(), bias.L2()])
@pytest.mark.parametrize(
    "step",
    [
        algorithm.GradientDescent(),
        algorithm.GradientDescent(at="retained"),
        algorithm.Momentum(),
        algorithm.Momentum(at="retained"),
    ],
)
@pytest.mark.parametrize("axis", ["scalar", "key", "value"])
def test_linear_rules_run_in_blocks(loss, step, axis):
    """Longer than any block, cut in the middle, with rates near and at total loss."""
    gate = retention.Decay(axis="value" if axis == "value" else "key")
    rule = miras.Rule(memory.Linear(), loss, gate, step, chunk_size=1)
    params, tokens = core.inputs(Case("blocks", rule, axis != "scalar"), length=80)
    learn = tokens.rates.learn
    keep = 1 - (1 - tokens.rates.keep) ** 4  # mostly close to 1
    keep[20:30] /= 1e3
    keep[33] = 0
    rates = tokens.rates._replace(
        learn=learn if learn.ndim == 1 else learn[:, 0], keep=keep
    )
    tokens = tokens._replace(rates=rates)
    expected, _ = oracle.run(rule, params, tokens)
    go = core.run(rule, "xla")
    first, state = go(
        params, core.start(rule)(params), jax.tree.map(lambda x: x[:40], tokens)
    )
    second, _ = go(params, state, jax.tree.map(lambda x: x[40:], tokens))
    assert error(np.concatenate([first, second]), expected) < 1e-10


@pytest.mark.parametrize(
    "variant",
    [
        "linear_attention",
        "retnet",
        "delta_net",
        "gated_delta_net",
        "gated_delta_net_miras",
        "longhorn",
        "delta_product",
        "titans",
    ],
)
@pytest.mark.parametrize("implementation", ["definition", "xla"])
def test_published_recurrences(variant, implementation):
    """A sequence longer than any block, against the recurrence of each paper."""
    rule = named(variant).rule
    if variant == "titans":
        rule = replace(rule, memory=memory.Linear(), chunk_size=1)
    params, tokens = core.inputs(Case(variant, rule), length=150)
    # Unit keys, as those papers have them, keep the delta rule stable.
    keys = tokens.keys / np.linalg.norm(tokens.keys, axis=-1, keepdims=True)
    hebbian = variant in ("linear_attention", "retnet")
    learn = None if hebbian else tokens.rates.learn
    rates = tokens.rates._replace(learn=learn)
    tokens = tokens._replace(keys=keys, rates=rates)

    state = params.weights[0].T
    sequences = (tokens.queries, keys, tokens.values)
    recurrence = getattr(recurrences, variant)
    match variant:
        case "linear_attention":
            expected = recurrence(state, *sequences)
        case "retnet":
            expected = recurrence(state, *sequences, rates.keep)
        case "delta_net" | "longhorn":
            expected = recurrence(state, *sequences, learn)
        case "gated_delta_net" | "gated_delta_net_miras" | "delta_product":
            expected = recurrence(state, *sequences, learn, rates.keep)
        case "titans":
            gates = (learn / 2, 1 - rates.keep, rates.momentum)
            expected = recurrence(state, *sequences, *gates)

    outputs, _ = core.run_whole(rule, implementation)(params, tokens)
    assert error(outputs, expected) < 1e-10
    assert error(oracle.run(rule, params, tokens)[0], expected) < 1e-10


@pytest.mark.parametrize("kind", [memory.MLP(depth=3), memory.Linear(norm=True)])
def test_gradients_of_the_oracle_by_finite_differences(kind):
    """The derivative by hand through GELU and LayerNorm, on the L2 loss."""
    rng = np.random.default_rng(0)
    shapes = [(4, 7), (7, 5), (5, 4)] if isinstance(kind, memory.MLP) else [(4, 4)]
    weights = [rng.normal(size=shape) for shape in shapes]
    params = miras.Params(weights, rng.normal(size=4), rng.normal(size=4))
    key, value = rng.normal(size=(2, 4))
    model = oracle.Memory(kind, params)

    def loss(weights):
        return 0.5 * np.sum((model.forward(weights, key)[0] - value) ** 2)

    gradients = model.gradient(weights, key, lambda y: y - value)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        moved = [
            loss([w + h * direction if j == i else w for j, w in enumerate(weights)])
            for h in (1e-5, -1e-5)
        ]
        slope = (moved[0] - moved[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-7)


@pytest.mark.parametrize("form", ["paper", "mirror"])
def test_the_dual_of_the_oracle_is_the_inverse_of_its_map(form):
    gate = retention.Lq(4.0, form=form)
    matrix = np.random.default_rng(0).normal(size=(3, 5))
    restored = oracle.weights_of(gate, oracle.dual_of(gate, matrix))
    assert error(restored, matrix) < 1e-14


@pytest.mark.parametrize("form", ["coordinate", "norm", "switch"])
def test_the_inputs_reach_both_sides_of_the_threshold(form):
    """Otherwise a wrong branch of Huber could pass every comparison above."""
    rule = replace(named("yaad").rule, bias=bias.Huber(form=form))
    params, tokens = core.inputs(Case(form, rule))
    with_threshold = oracle.run(rule, params, tokens)[0]
    for threshold in (1e-3, 1e3):
        fixed = tokens.rates._replace(threshold=np.full(core.LENGTH, threshold))
        outputs, _ = oracle.run(rule, params, tokens._replace(rates=fixed))
        assert error(outputs, with_threshold) > 1e-3


def test_a_threshold_of_the_bias_stands_in_for_the_rate():
    rule = replace(named("yaad").rule, bias=bias.Huber("switch", threshold=1.5))
    params, tokens = core.inputs(Case("yaad", rule))
    rates = tokens.rates._replace(threshold=None)
    tokens = tokens._replace(rates=rates)
    expected, _ = oracle.run(rule, params, tokens)
    outputs, _ = core.run_whole(rule, "xla")(params, tokens)
    assert error(outputs, expected) < 1e-10


@pytest.mark.parametrize("at", ["previous", "retained"])
def test_a_missing_rate_is_one(at):
    rule = replace(named("delta_net").rule, retention=retention.Decay())
    rule = replace(rule, algorithm=algorithm.GradientDescent(at=at))
    params, tokens = core.inputs(Case("ones", rule))
    tokens = tokens._replace(keys=tokens.keys / 2)
    ones = np.ones(core.LENGTH)
    none = tokens.rates._replace(learn=None, keep=None)
    given = tokens.rates._replace(learn=ones, keep=ones)
    expected, _ = oracle.run(rule, params, tokens._replace(rates=given))
    for implementation in ("definition", "xla"):
        run = core.run_whole(rule, implementation)
        outputs, _ = run(params, tokens._replace(rates=none))
        assert error(outputs, expected) < 1e-10
