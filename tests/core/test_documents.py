"""Several documents in one sequence: each is read as if it were alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax.core import engine
from tests import core
from tests.core import error

pytestmark = pytest.mark.usefixtures("float64")

# Padding before, between and after; the first document fills whole chunks of four.
PLACES = (slice(4, 12), slice(12, 17), slice(20, 25))
LENGTH = 27
CASES = {case.name: case for case in core.all_cases()}
NAMES = (
    "yaad",
    "titans",
    "gated_delta_net",
    "delta_product",
    "linear-channels",
    "elastic-hard",
    "omega-dot-product",
    "mesa_net",
)


@pytest.fixture(autouse=True)
def short_tiles(monkeypatch):
    """Exact linear rules run in tiles of four tokens, as the others in chunks."""
    monkeypatch.setattr(engine, "LINEAR_TILE", 4)


def documents(places=PLACES, length=LENGTH):
    starts, real = np.zeros(length, bool), np.zeros(length, bool)
    for place in places:
        starts[place.start] = True
        real[place] = True
    return miras.Documents(starts, real)


def loss_and_gradients(rule, read):
    """Outputs of `read`, and the gradients of their sum with the given weights."""

    def loss(params, tokens, weights):
        outputs, state = read(rule, params, tokens)
        return jnp.sum(outputs * weights), (outputs, state)

    return core.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def from_start(implementation, marks=None):
    def read(rule, params, tokens):
        state = rule.start(params)
        if marks is not None:
            return miras.run(
                rule,
                params,
                state,
                tokens,
                documents=marks,
                implementation=implementation,
            )
        return miras.run(rule, params, state, tokens, implementation=implementation)

    return read


def flat_error(actual, expected):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(error(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_equal_separate_runs(name):
    """Outputs, gradients of parameters and tokens, and the last document's state."""
    case = CASES[name]
    params, tokens = core.inputs(case, length=LENGTH)
    shape = (LENGTH, core.dims(case.rule)[1])
    weights = np.random.default_rng(1).normal(size=shape)

    alone = loss_and_gradients(case.rule, from_start("definition"))
    outputs, gradient, grown = (
        np.zeros(shape),
        None,
        jax.tree.map(np.zeros_like, tokens),
    )
    for place in PLACES:
        part = jax.tree.map(lambda x, p=place: x[p], tokens)
        (_, (output, last)), (of_params, of_tokens) = alone(
            params, part, weights[place]
        )
        outputs[place] = output
        if gradient is None:
            gradient = of_params
        else:
            gradient = jax.tree.map(np.add, gradient, of_params)
        for into, x in zip(*map(jax.tree.leaves, (grown, of_tokens)), strict=True):
            into[place] = x

    packed = loss_and_gradients(case.rule, from_start("xla", documents()))
    (_, (actual, state)), (of_params, of_tokens) = packed(params, tokens, weights)
    assert not np.any(actual[~documents().real])
    assert error(actual, outputs) < 1e-10
    assert flat_error(of_params, gradient) < 1e-10
    assert flat_error(of_tokens, grown) < 1e-10

    defined = core.jit(partial(from_start("definition", documents()), case.rule))
    for result in ((actual, state), defined(params, tokens)):
        pairs = zip(*map(jax.tree.leaves, (result, (outputs, last))), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["titans", "gated_delta_net"])
def test_padding_on_the_left_may_have_any_length(name):
    case = CASES[name]
    params, tokens = core.inputs(case)
    rule, start = case.rule, core.start(case.rule)(params)

    @core.jit
    def read(params, state, tokens, marks):
        return miras.run(rule, params, state, tokens, documents=marks)

    go_on = core.run(rule, None)
    later = jax.tree.map(lambda x: x[:3], core.inputs(case, seed=1)[1])
    for first in (1, 4, 6):
        document = jax.tree.map(lambda x, f=first: x[f:], tokens)
        expected, state = core.run(rule, "definition")(params, start, document)
        following, _ = go_on(params, state, later)
        marks = documents([slice(first, core.LENGTH)], core.LENGTH)
        actual, state = read(params, start, tokens, marks)
        assert not np.any(actual[:first])
        assert error(actual[first:], expected) < 1e-10
        assert error(go_on(params, state, later)[0], following) < 1e-10


def test_without_chunks_a_document_may_start_anywhere_in_a_call():
    """Tiles of four, a start at the fifth token of a call that goes on with another."""
    case = CASES["gated_delta_net"]
    params, tokens = core.inputs(case)
    rule = case.rule
    marks = documents([slice(5, 9)], core.LENGTH)._replace(
        real=np.arange(core.LENGTH) < 9
    )
    first = jax.tree.map(lambda x: x[:3], core.inputs(case, seed=1)[1])
    _, state = core.run(rule, None)(params, core.start(rule)(params), first)
    results = [
        core.jit(
            lambda params, state, how=how: miras.run(
                rule, params, state, tokens, documents=marks, implementation=how
            )
        )(params, state._replace(position=jnp.asarray(state.position)))
        for how in ("xla", "definition")
    ]
    for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-12)


def test_alignment_is_what_a_rule_reads_at_once():
    expected = {"yaad": 4, "gated_delta_net": 4, "delta_product": 2}
    for name, tokens in expected.items():
        assert engine.alignment(CASES[name].rule) == tokens
    assert engine.alignment(CASES["retained-channels"].rule) == 1
