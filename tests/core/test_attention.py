"""Tokens kept as they are: longer than a tile of queries, in windows of every size."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import memory, variants
from miras_jax.errors import UserError
from tests import core
from tests.core import Case, error, oracle

pytestmark = pytest.mark.usefixtures("float64")

LENGTH = 150  # beyond a tile of queries


def windowed(window):
    return replace(variants.softmax_attention(), memory=memory.Cache(window))


def inputs(rule, length=LENGTH):
    params, tokens = core.inputs(Case("attention", rule), length)
    return params, tokens._replace(queries=3 * tokens.queries)  # far from a plain mean


@pytest.mark.parametrize("window", [None, 1, 5, 40, LENGTH, 200])
def test_long_sequences_match_the_oracle_wherever_they_are_cut(window):
    rule = windowed(window)
    params, tokens = inputs(rule)
    expected, rows = oracle.run(rule, params, tokens)
    whole, last = core.run_whole(rule, None)(params, tokens)
    assert error(whole, expected) < 1e-12
    definition, _ = core.run_whole(rule, "definition")(params, tokens)
    assert error(definition, expected) < 1e-12

    first, state = core.run(rule, None)(
        params, rule.start(params), jax.tree.map(lambda x: x[:70], tokens)
    )
    second, state = core.run(rule, None)(
        params, state, jax.tree.map(lambda x: x[70:], tokens)
    )
    assert error(np.concatenate([first, second]), expected) < 1e-12
    for kept, one, other in zip(rows, rule.weights(last), state.dual, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one[-len(kept) :], kept)
        assert not np.any(one[: -len(kept)])


def test_the_state_of_a_window_is_constant_and_without_one_grows():
    params, tokens = inputs(windowed(5))
    state = windowed(5).start(params)
    _, after = core.run_whole(windowed(5), None)(params, tokens)
    shapes = [jax.tree.map(jnp.shape, part.dual) for part in (state, after)]
    assert shapes == [((5, 4), (5, 6))] * 2
    assert windowed(None).start(params).dual[0].shape == (0, 4)
    _, after = core.run_whole(windowed(None), None)(params, tokens)
    assert after.dual[0].shape == (LENGTH, 4)


def test_a_window_is_full_attention_as_far_as_it_reaches():
    params, tokens = inputs(windowed(None))
    full, _ = core.run_whole(windowed(None), None)(params, tokens)
    narrow, _ = core.run_whole(windowed(20), None)(params, tokens)
    np.testing.assert_allclose(narrow[:20], full[:20], rtol=1e-12)
    assert all(error(narrow[t], full[t]) > 1e-6 for t in range(20, LENGTH))


def test_large_scores_do_not_overflow():
    rule = windowed(None)
    params, tokens = inputs(rule)
    tokens = tokens._replace(queries=1e4 * tokens.queries)

    def total(tokens):
        return jnp.sum(miras.run(rule, params, rule.start(params), tokens)[0])

    value, gradients = core.jit(jax.value_and_grad(total))(tokens)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_a_memory_that_is_not_learned_has_nothing_to_observe():
    rule = windowed(3)
    params, tokens = inputs(rule, 4)
    with pytest.raises(UserError, match="learns"):
        miras.observe(rule, params, rule.start(params), tokens)
