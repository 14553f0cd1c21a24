"""What `observe` tells of a memory: losses, steps, norms by hand; a planted token."""

import jax
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import variants
from miras_jax.errors import UserError
from tests import core


def observe(rule, params, tokens):
    def observe_all(params, tokens):
        return miras.observe(rule, params, rule.start(params), tokens)

    return core.jit(observe_all)(params, tokens)


CASES = {case.name: case for case in core.all_cases()}
SEEN = (
    "moneta",
    "memora",
    "titans",
    "delta_product",
    "huber-switch-channels",
    "elastic-hard",
    "momentum-retained",
    "rwkv7",
)


@pytest.mark.parametrize("name", SEEN)
def test_outputs_and_state_are_those_of_run(name, float64):
    case = CASES[name]
    params, tokens = core.inputs(case)
    info, outputs, state = observe(case.rule, params, tokens)
    expected, after = core.run_whole(case.rule, "definition")(params, tokens)
    assert core.error(outputs, expected) < 1e-12
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-9), state, after)
    for field in info:
        assert field.shape == (core.LENGTH,) and np.all(np.isfinite(field))
    size = np.sqrt(sum(np.sum(np.square(w)) for w in case.rule.weights(after)))
    np.testing.assert_allclose(info.norm[-1], size)


def frobenius(*weights):
    return np.sqrt(sum(np.sum(np.square(w)) for w in weights))


def test_everything_of_a_deep_memory_by_hand(float64):
    """Yaad: chunks of four, channel-wise rates, the loss at the chunk's start."""
    case = CASES["huber-switch-channels"]
    params, tokens = core.inputs(case)
    rule, rates = case.rule, tokens.rates
    info, _, _ = observe(rule, params, tokens)
    _, states = core.run_steps(rule, params, tokens)
    before = core.start(rule)(params)
    for t, after in enumerate(states):
        if t % 4 == 0:
            anchor = rule.weights(before)
        prediction = rule.memory.read(
            lambda i, x, anchor=anchor: x @ anchor[i], params, tokens.keys[t]
        )
        loss = rule.bias.loss(prediction, tokens.values[t], rates.threshold[t])
        first, last = rule.weights(before)
        kept = rates.keep[t][:, None] * first, rates.keep[t][None] * last
        new = rule.weights(after)
        change = frobenius(*(w - k for w, k in zip(new, kept, strict=True)))
        expected = (
            loss,
            change / frobenius(*new),
            frobenius(*kept) / frobenius(first, last),
            frobenius(*new),
        )
        np.testing.assert_allclose([x[t] for x in info], expected, 1e-9)
        before = after


def test_the_loss_of_a_retained_gradient_is_that_of_the_decayed_memory(float64):
    case = CASES["momentum-retained"]
    params, tokens = core.inputs(case)
    rule = case.rule
    info, _, _ = observe(rule, params, tokens)
    _, states = core.run_steps(rule, params, tokens)
    w = core.start(rule)(params).dual[0]
    for t, after in enumerate(states):
        r = tokens.keys[t] @ (tokens.rates.keep[t] * w) - tokens.values[t]
        np.testing.assert_allclose(info.loss[t], r @ r / 2, 1e-9)
        w = after.dual[0]


def test_several_pairs_per_token_are_summed(float64):
    case = CASES["delta_product"]
    params, tokens = core.inputs(case)
    rule = case.rule.one_step
    info, _, _ = observe(case.rule, params, tokens)
    pairs, _, _ = observe(rule, params, case.rule.pairs(tokens))
    np.testing.assert_allclose(info.loss, pairs.loss.reshape(-1, 2).sum(axis=1))
    np.testing.assert_allclose(info.step, pairs.step.reshape(-1, 2).sum(axis=1))
    np.testing.assert_allclose(info.kept, pairs.kept.reshape(-1, 2).prod(axis=1))
    np.testing.assert_allclose(info.norm, pairs.norm[1::2])


def test_a_planted_token_is_the_most_surprising_one():
    """The delta rule reads a phrase of five tokens again and again, and one intruder.

    Once the phrase is known, only the intruder is news, and most is learned from it.
    """
    rng = np.random.default_rng(0)
    words = rng.normal(size=(6, 16)) / 4
    text = np.tile(np.arange(5), 8)
    text[27] = 5
    keys = words / np.linalg.norm(words, axis=1, keepdims=True)
    values = rng.normal(size=(6, 16))
    tokens = miras.Tokens(
        keys[text], keys[text], values[text], miras.Rates(learn=np.full(40, 0.8))
    )
    rule = variants.delta_net()
    params = rule.init(jax.random.key(0), 16, 16)
    info, _, _ = observe(rule, params, tokens)
    assert np.argmax(info.loss[10:]) == np.argmax(info.step[10:]) == 27 - 10
    assert info.loss[27] > 3 * np.max(np.delete(info.loss[10:], 17))
    np.testing.assert_array_equal(info.kept, 1)  # it never forgets
    np.testing.assert_allclose(info.step[0], 1)  # it was empty


def test_there_must_be_a_token():
    rule = variants.delta_net()
    empty = miras.Tokens(*(np.zeros((0, 4)),) * 3)
    params = rule.init(jax.random.key(0), 4, 4)
    with pytest.raises(UserError, match="observe needs at least one token"):
        miras.observe(rule, params, rule.start(params), empty)
