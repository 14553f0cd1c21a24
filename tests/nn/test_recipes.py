"""Layers of published models: what they start from, and that each of them trains."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from miras_jax.errors import UserError
from miras_jax.nn import recipes
from miras_jax.nn.features import Features
from miras_jax.nn.miras import Miras
from miras_jax.nn.output import Output
from miras_jax.nn.rates import (
    ChunkStart,
    Constants,
    Discretised,
    ExpDecay,
    FromKeys,
    Given,
    LowRank,
    PerHead,
)
from tests import nn
from tests.core import error
from tests.nn import WIDTH, Program, shaken
from tests.nn.learning import check_that_it_learns

BUILD = {
    "mamba": lambda: recipes.mamba(WIDTH, expand=1, key_dim=4),
    "mamba2": lambda: recipes.mamba2(2, key_dim=8),
    "omega_net": lambda: recipes.omega_net(2, key_dim=4),
    "atlas": lambda: recipes.atlas(2, key_dim=4),
    "lact": lambda: recipes.lact(2, chunk_size=4),
}
# Those of several parts are in test_architectures.py.
NAMES = [
    name
    for name, recipe in vars(recipes).items()
    if callable(recipe) and not recipe.__module__.endswith("architectures")
]


def small(name):
    """The recipe with two heads and short chunks."""
    mixer = BUILD.get(name, lambda: getattr(recipes, name)(2))()
    if isinstance(mixer, Miras):
        rule = mixer.rule
        mixer = replace(mixer, rule=replace(rule, chunk_size=min(rule.chunk_size, 4)))
    return mixer


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_trains(name):
    check_that_it_learns(small(name))


@pytest.mark.parametrize("name", ["mamba", "hgrn2", "lact", "atlas"])
def test_recipes_decode_what_they_read(name):
    program = Program(nn.model((small(name),), groups=1))
    params, tokens = shaken(program.initial), nn.token_ids()
    whole = program.logits(params, tokens)
    in_parts, _ = program.decode(params, tokens, (11, *[1] * 13))
    assert error(in_parts, whole) < 1e-4


# Features.


def test_monomials_are_powers_of_the_inner_product():
    q, k = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    features = Features(degree=2, norm="none")
    phi = features.build()
    assert phi(q).shape == (5, features.dim(6)) == (5, 28)
    product = np.sum(q * k, axis=1)
    actual = np.sum(np.asarray(phi(q)) * np.asarray(phi(k)), axis=1)
    np.testing.assert_allclose(actual, 1 + product + product**2 / 4, rtol=1e-4)
    phi.coefficients[...] = jnp.asarray([2.0, 0.0, 3.0])
    actual = np.sum(np.asarray(phi(q)) * np.asarray(phi(k)), axis=1)
    np.testing.assert_allclose(actual, 4 + 9 * product**2, rtol=1e-4)


def test_features_activate_and_normalise():
    x = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
    elu = np.where(x > 0, x, np.expm1(x)) + 1
    np.testing.assert_allclose(
        Features("elu + 1", norm="none").build()(x), elu, rtol=1e-5
    )
    np.testing.assert_allclose(Features(norm="scale").build()(x), x / 2, rtol=1e-6)
    norms = np.linalg.norm(Features("silu").build()(x), axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=1e-4)


# Rates.


def given(x, keys=None, **rates):
    index = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    return Given(index, keys, rates)


def test_decays_of_the_mamba_family_start_where_they_say():
    x = np.zeros((1, 3, WIDTH), np.float32)
    build = (WIDTH, 4, 3, nnx.Rngs(0))
    a, dt = np.geomspace(1, 16, 4), np.geomspace(0.001, 0.1, 4)
    keep = ExpDecay().build(*build)(x)
    np.testing.assert_allclose(keep[0, 1], np.exp(-a * dt), rtol=1e-4)
    keep = ExpDecay(rank=2).build(*build)(x)
    dt = np.geomspace(0.001, 0.1, 12).reshape(4, 3)
    np.testing.assert_allclose(keep[0, 1], np.exp(-a[:, None] * dt), rtol=1e-4)
    learn = np.full((1, 3, 4), 0.1, np.float32)
    keep = Discretised().build(*build)(x, given(x, learn=learn))
    np.testing.assert_allclose(keep[0, 1], np.exp(-0.1 * a), rtol=1e-4)
    keep = Discretised((1, 3), "channels").build(*build)(x, given(x, learn=learn))
    expected = np.broadcast_to(np.exp(-0.1 * np.array([1, 2, 3])), (4, 3))
    np.testing.assert_allclose(keep[0, 1], expected, rtol=1e-4)


def test_rates_follow_keys_and_chunks():
    x = np.zeros((1, 5, WIDTH), np.float32)
    build = (WIDTH, 2, 3, nnx.Rngs(0))
    keys = np.random.default_rng(0).uniform(size=(1, 5, 2, 3))
    np.testing.assert_array_equal(FromKeys().build(*build)(x, given(x, keys)), 1 - keys)
    at_start = ChunkStart(PerHead("sigmoid", (0.25, 0.25)), 4).build(*build)
    expected = np.array([0.25, 1, 1, 1, 0.25])
    np.testing.assert_allclose(at_start(x, given(x))[0, :, 1], expected, rtol=1e-5)
    assert Constants((0.3, 0.6)).build(*build)(x)[0, 0].tolist() == pytest.approx(
        [0.3, 0.6]
    )
    with pytest.raises(UserError, match="2 heads"):
        Constants((0.3,)).build(*build)


@pytest.mark.parametrize(
    "choice, lowest",
    [
        (LowRank("keep", (0.01, 0.04), temperature=16.0), 0.0),
        (LowRank("bounded keep", (0.01, 0.3)), np.exp(-np.exp(-0.5))),
    ],
)
def test_keeps_of_gla_and_rwkv7(choice, lowest):
    layer = choice.build(WIDTH, 2, 3, nnx.Rngs(0))
    start = layer(np.zeros((1, 1, WIDTH), np.float32)).ravel()
    np.testing.assert_allclose(1 - start, np.geomspace(*choice.initial, 6), rtol=1e-3)
    graph, params = nnx.split(layer)
    far = nnx.merge(graph, shaken(params))(
        1e4 * np.random.default_rng(0).normal(size=(1, 99, WIDTH)).astype(np.float32)
    )
    assert np.min(far) == pytest.approx(lowest, abs=1e-3) and np.max(far) <= 1


def test_choices_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match="activation"):
        Features("relu")
    with pytest.raises(UserError, match="gate"):
        Output(gate="tanh")
    rule = recipes.gla().rule
    with pytest.raises(UserError, match="num_qk_heads"):
        Miras(rule, 4, num_qk_heads=3)
    with pytest.raises(UserError, match="convolution"):
        Miras(rule, 4, convolution=1)
    with pytest.raises(UserError, match="temperature"):
        PerHead("sigmoid", (0.1, 0.2), temperature=2.0)
