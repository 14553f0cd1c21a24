"""What a write takes of its error: by writing it, and at the default rates."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import bias, memory, retention, variants
from miras_jax.nn.defaults import default_rates
from miras_jax.nn.gain import gain

DIM, PAIRS, THRESHOLD = 32, 256, 0.4
RULES = {
    "yaad": variants.yaad(),
    "moneta": variants.moneta(),
    "memora": variants.memora(),
    "ttt_mlp": variants.ttt_mlp(),
    "mirror": miras.Rule(
        memory.MLP(), bias.L2(), retention.Lq(4.0, "mirror"), chunk_size=4
    ),
    "residual": miras.Rule(
        memory.Linear(residual=True), bias.L2(), retention.Keep(), chunk_size=4
    ),
}


def taken(rule: miras.Rule, learn: float) -> float:
    """The part of its error that one write of a random pair takes, by writing it."""
    rule = replace(rule, chunk_size=1)
    of_weights, of_keys, of_values = jax.random.split(jax.random.key(7), 3)
    params = rule.init(of_weights, DIM, DIM)
    start = rule.start(params)
    rates = miras.Rates(
        learn=jnp.asarray(learn),
        keep=jnp.ones(()) if "keep" in rule.rates else None,
        threshold=jnp.full(DIM, THRESHOLD) if "threshold" in rule.rates else None,
    )

    def errors(key, value):
        before = rule.recall(params, start, key[None])[0] - value
        token = miras.Tokens(key, key, value, rates)
        after, _ = miras.step(rule, params, start, token)
        return before @ (before + value - after), before @ before

    draws = (jax.random.normal(k, (PAIRS, DIM)) for k in (of_keys, of_values))
    keys, values = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in draws)
    less, error = jax.vmap(errors)(keys, values)
    return float(less.sum() / error.sum())


@pytest.mark.parametrize("name", RULES)
def test_a_short_write_takes_learn_times_the_gain_of_its_error(name):
    rule = RULES[name]
    learn = 0.02 / gain(rule, THRESHOLD)
    # Other weights and pairs than those that the gain is a mean over.
    assert taken(rule, learn) == pytest.approx(0.02, rel=0.25)


def test_a_matrix_of_its_keys_takes_all():
    assert gain(RULES["residual"], THRESHOLD) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["yaad", "moneta", "memora", "ttt_mlp"])
def test_an_untrained_layer_writes_neither_nothing_nor_everything(name):
    """At chunks of 16; Memora, whose unit is bounded, the least."""
    rule = replace(RULES[name], chunk_size=16)
    low, high = default_rates(rule).learn.initial
    parts = taken(rule, low), taken(rule, high)
    assert 0.02 < parts[0] < parts[1] < 0.6


def test_a_layer_that_is_being_traced_has_the_same_rates():
    rule = replace(variants.yaad(), chunk_size=32)

    @jax.jit
    def traced(x):
        return x * np.float32(default_rates(rule).learn.limit)

    gain.cache_clear()
    assert traced(1.0) == np.float32(default_rates(rule).learn.limit)
