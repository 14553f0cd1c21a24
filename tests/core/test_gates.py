"""What retention gates and the implicit step promise of the weights, on long texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import bias, memory, retention, variants
from tests import core
from tests.core import Case, error

PLAIN = miras.Rule(memory.MLP(expansion=2), bias.L2(), chunk_size=16)
GENERATORS = ("kl", "reverse_kl", "chi_square", "hellinger")


def weights_after(rule, length=512, loud=1.0):
    """Weights in float32 after a text whose values are `loud` times the usual."""
    params, tokens = core.inputs(Case("gate", rule), length=length)
    tokens = tokens._replace(values=loud * tokens.values)
    params, tokens = jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float32), (params, tokens)
    )
    outputs, state = core.run_whole(rule, None)(params, tokens)
    assert np.all(np.isfinite(outputs))
    return rule.weights(state)


@pytest.mark.parametrize("loud", [1.0, 100.0])
@pytest.mark.parametrize("generator", GENERATORS)
def test_divergences_keep_the_mass_of_every_slice(generator, loud):
    gate = retention.FDivergence(generator, mass=4.0)
    for matrix in weights_after(replace(PLAIN, retention=gate), loud=loud):
        assert np.all(matrix >= 0)
        np.testing.assert_allclose(np.sum(matrix, axis=0), 4.0, rtol=1e-6)
        assert np.ptp(matrix) > 0.1


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_divergence_leaves_a_chunk_without_steps_alone(generator):
    gate = retention.FDivergence(generator, mass=3.0)
    start = gate.dual(jnp.asarray(np.random.default_rng(0).normal(size=(5, 4))))
    assert error(gate.settle(start, start), start) < 1e-6
    # A constant added to a slice is what the multiplier takes away again.
    assert error(gate.settle(start, start + 0.7), start) < 1e-6


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_weight_of_nearly_nothing_grows_without_overflow(generator):
    gate = retention.FDivergence(generator, mass=3.0)
    start = jnp.asarray([[3.0], [1e-37]], jnp.float32)

    def settled(steps):
        return jnp.sum(jnp.asarray([[1.0], [2.0]]) * gate.settle(start, start + steps))

    steps = jnp.asarray([[0.0], [300.0]])
    matrix, gradient = gate.settle(start, start + steps), jax.grad(settled)(steps)
    np.testing.assert_allclose(jnp.sum(matrix), 3.0, rtol=1e-6)
    assert np.all(matrix >= 0) and np.all(np.isfinite(gradient))


def test_the_kl_divergence_is_memora_without_forgetting():
    gates = retention.FDivergence("kl", mass=4.0), retention.KL(mass=4.0)
    with jax.enable_x64(True):
        params, tokens = core.inputs(Case("kl", replace(PLAIN, retention=gates[0])))
        assert tokens.rates.keep is None
        outputs = [
            core.run_whole(replace(PLAIN, retention=gate), None)(params, tokens)[0]
            for gate in gates
        ]
    # Inside a chunk the linear readout of one is the other's, up to a slice's mean.
    exact = [
        core.run_whole(
            replace(PLAIN, retention=gate, readout="exact", chunk_size=4), None
        )
        for gate in gates
    ]
    with jax.enable_x64(True):
        first, second = (go(params, tokens)[0] for go in exact)
    assert error(first, second) < 1e-12
    assert np.all(np.isfinite(outputs[0]))


def test_the_elastic_net_makes_exact_zeros():
    for form, share in (("proximal", 0.02), ("lazy", 0.02)):
        gate = retention.ElasticNet(form, threshold=0.05)
        zeros = [np.mean(w == 0) for w in weights_after(replace(PLAIN, retention=gate))]
        assert max(zeros) > share, form


def test_a_sigmoid_link_keeps_weights_between_zero_and_one():
    for matrix in weights_after(replace(PLAIN, retention=retention.Bregman())):
        assert np.all((matrix > 0) & (matrix < 1))


@pytest.mark.parametrize(
    "gate",
    [
        retention.ElasticNet("lazy", 0.05),
        retention.ElasticNet("lazy", 0.05, smooth=True),
        retention.Bregman(retention.SignedPower(3.0)),
    ],
)
def test_memories_start_from_the_learned_weights(gate):
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    np.testing.assert_allclose(gate.weights(gate.dual(weights)), weights, rtol=1e-5)
    assert np.all(gate.weights(gate.dual(0 * weights)) == 0)


@pytest.mark.parametrize("learn", [1.0, 1e6])
def test_the_implicit_step_never_overshoots(learn):
    """What is left of the error is 1 / (1 + learn |k|^2), however large learn is."""
    rule = variants.longhorn()
    params, tokens = core.inputs(Case("longhorn", rule), length=64)
    rates = tokens.rates._replace(learn=np.full(64, learn))
    tokens = tokens._replace(rates=rates, queries=tokens.keys)
    explicit = replace(rule, algorithm=variants.delta_net().algorithm)
    with jax.enable_x64(True):
        outputs = np.asarray(core.run_whole(rule, None)(params, tokens)[0])
        wild = np.asarray(core.run_whole(explicit, None)(params, tokens)[0])
    remaining = np.linalg.norm(outputs - tokens.values, axis=1)
    assert np.all(remaining < 10)
    if learn > 1:
        assert error(outputs, tokens.values) < 1e-3
        assert not np.max(np.abs(wild)) < 1e6
