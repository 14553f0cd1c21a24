"""Inputs that break things: every named rule gives finite outputs and gradients.

In bfloat16, as training has it, over several chunks. Longer texts and larger heads:
`experiments/studies/stability.py`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import bias, memory, retention, variants
from miras_jax.core.memory import layer_norm
from tests import core
from tests.core import Case

LENGTH, PARTS = 16, 8


def _waves(prediction, value):
    return -jnp.sum(jnp.cos(80 * (prediction - value))) / 80


@pytest.mark.parametrize("chunk_size, way", [(1, "definition"), (1, "xla"), (4, "xla")])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_a_chaotic_memory_are_finite(chunk_size, way, packed):
    """Weights stay where they are, but their derivative grows tenfold per step."""
    rule = miras.Rule(
        memory.Linear(), bias.Function(_waves), retention.Keep(), chunk_size=chunk_size
    )
    length = 64 * chunk_size
    ones = jnp.ones((length, 1))
    rates = miras.Rates(learn=0.5 * ones[:, 0])
    documents = miras.Documents(jnp.arange(length) == 0, jnp.ones(length, bool))

    def total(params, values):
        tokens = miras.Tokens(ones, ones, values, rates)
        outputs, _ = miras.run(
            rule,
            params,
            rule.start(params),
            tokens,
            documents=documents if packed else None,
            implementation=way,
        )
        return jnp.sum(outputs), outputs

    operands = miras.Params((jnp.ones((1, 2)),)), jnp.zeros((length, 2))
    gradients, outputs = core.jit(jax.grad(total, (0, 1), has_aux=True))(*operands)
    assert np.all(np.abs(outputs) < 300)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(gradients))
    assert 1e12 < largest < np.inf


def test_layer_norm_of_large_inputs_has_the_derivatives_of_small_ones():
    """LN(s x) = LN(x); powers of the variance would leave float32 at s = 1e10."""
    rng = np.random.default_rng(0)
    x, d, e = jnp.asarray(rng.normal(size=(3, 5, 8)), jnp.float32)
    params = miras.Params((), jnp.ones(8), jnp.zeros(8))

    def derivatives(scale):
        def first(x):
            return scale * jax.vjp(lambda x: layer_norm(x, params), x)[1](d)[0]

        return first(scale * x), scale * jax.vjp(first, scale * x)[1](e)[0]

    for small, large in zip(derivatives(1e3), derivatives(1e16), strict=True):
        np.testing.assert_allclose(large, small, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("float64")
def test_layer_norm_takes_out_what_all_tangents_share():
    """Its rounding, met by that of the mean, would be what is left of the others."""
    rng = np.random.default_rng(0)
    x, e = rng.normal(size=(2, 5, 64))
    x, e = (a.astype(np.float32) for a in (1 + x / 64, 30 + e))

    def tangent(dtype):
        params = miras.Params((), jnp.ones(64, dtype), jnp.zeros(64, dtype))
        x_and_e = ((jnp.asarray(a, dtype),) for a in (x, e))
        return jax.jvp(lambda x: layer_norm(x, params), *x_and_e)[1]

    assert core.error(tangent(jnp.float32), tangent(jnp.float64)) < 1e-5


def adverse(rule, tokens):
    """The same tokens as zeros, as one token, as two in turn, and loud.

    A delta rule diverges by its equation where learn |k|^2 > 2: its keys stay as layers
    make them.
    """
    every = np.arange(len(tokens.keys))
    some = tokens._replace(rates=miras.Rates())

    def changed(change):
        return jax.tree.map(change, some)._replace(rates=tokens.rates)

    cases = {
        "zeros": changed(np.zeros_like),
        "constant": changed(lambda x: x[0 * every]),
        "repeated": changed(lambda x: x[every % 2]),
        "loud values": tokens._replace(values=1e4 * tokens.values),
    }
    learner = rule.algorithm
    safe = learner.implicit or learner.curves or rule.bias != bias.L2()
    if safe or not rule.memory.is_linear:
        cases["loud"] = changed(lambda x: 1e4 * x)
    return cases


@pytest.mark.parametrize("case", core.variant_cases(), ids=lambda case: case.name)
def test_outputs_and_gradients_are_finite(case):
    """The parts of a text share one program, which carries the state through a scan."""
    rule = case.rule
    params, tokens = core.inputs(Case(case.name, rule, case.channelwise), LENGTH)

    def loss(params, tokens):
        def part(state, _):
            outputs, state = miras.run(rule, params, state, tokens)
            return state, outputs.astype(jnp.float32)

        state = rule.start(params)
        if rule.keeps_tokens:
            outputs = part(state, None)[1]
        else:
            outputs = jax.lax.scan(part, state, length=PARTS)[1]
        weigh = jnp.cos(jnp.arange(outputs.size)).reshape(outputs.shape)
        return jnp.mean(outputs * weigh), outputs

    both = core.jit(jax.grad(loss, (0, 1), has_aux=True))
    for name, given in adverse(rule, tokens).items():
        low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), given)
        full = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
        gradients, outputs = both(full, low)
        assert np.all(np.isfinite(outputs)), f"outputs, {name}"
        for path, leaf in jax.tree.leaves_with_path(gradients):
            finite = np.isfinite(np.asarray(leaf, np.float32))
            assert np.all(finite), f"gradient {jax.tree_util.keystr(path)}, {name}"


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("channelwise", [False, ("keep",)], ids=["token", "channel"])
def test_gradients_are_finite_where_a_rate_is_about_zero(channelwise):
    """Under a loud loss, and those of other tokens what the definition says."""
    rule = core.small(miras.variants.titans())
    params, tokens = core.inputs(Case("titans", rule, channelwise), LENGTH)
    none = np.resize([0, 1e-307, 1e-290, 1e-20], LENGTH)
    some = np.arange(LENGTH) % 5 == 2

    def changed(rate):
        shape = (LENGTH,) + (1,) * (rate.ndim - 1)
        return jnp.where(some.reshape(shape), none.reshape(shape), rate)

    rates = tokens.rates
    rates = rates._replace(keep=changed(rates.keep), momentum=changed(rates.momentum))

    def loss(rates, implementation):
        outputs, _ = miras.run(
            rule,
            params,
            rule.start(params),
            tokens._replace(rates=rates),
            implementation=implementation,
        )
        return 1e30 * jnp.sum(jnp.cos(jnp.arange(outputs.size)) * outputs.ravel())

    found, expected = (
        core.jit(jax.grad(lambda r, way=way: loss(r, way)))(rates)
        for way in ("xla", "definition")
    )
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            assert np.all(np.isfinite(a))
            assert core.error(a[~some], b[~some]) < 1e-9


def test_moneta_goes_on_when_its_dual_has_faded():
    """Weights A / |A|^2 would be 1e20 where forgetting has left 1e-20 of A."""
    rule = replace(variants.moneta(), chunk_size=4)
    params, tokens = core.inputs(Case("moneta", rule), LENGTH)
    some = np.ones(LENGTH)
    tokens = tokens._replace(rates=miras.Rates(learn=0 * some, keep=some))

    def loss(params, tokens):
        state = rule.start(params)
        faded = tuple(1e-20 * dual for dual in state.dual)
        outputs, state = miras.run(rule, params, state._replace(dual=faded), tokens)
        return jnp.sum(outputs), (outputs, rule.weights(state))

    single = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (params, tokens))
    gradient = core.jit(jax.grad(loss, (0, 1), has_aux=True))
    gradients, (outputs, weights) = gradient(*single)
    for leaf in jax.tree.leaves((gradients, outputs, weights)):
        assert np.all(np.isfinite(leaf))
    assert max(float(jnp.max(jnp.abs(w))) for w in weights) < 1e9
