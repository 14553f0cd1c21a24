"""Muon, Omega and Newton against the recurrence of each paper, beyond one block."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import miras_jax as miras
from miras_jax import algorithm, memory, variants
from miras_jax.core.algorithm.muon import orthogonalised
from miras_jax.core.product import Dot
from miras_jax.core.readout import momentum_square
from tests import core
from tests.core import Case, error, recurrences

pytestmark = pytest.mark.usefixtures("float64")


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def agree(rule, params, tokens, expected, bound=1e-10):
    for implementation in ("definition", "xla"):
        outputs, _ = core.run_whole(rule, implementation)(params, tokens)
        assert error(outputs, expected) < bound, implementation


def test_atlas_with_chunks_of_one_is_the_printed_recurrence():
    learner = algorithm.Omega(3, algorithm.Muon(learn="outside"))
    rule = replace(
        variants.atlas(), memory=memory.Linear(), algorithm=learner, chunk_size=1
    )
    params, tokens = core.inputs(Case("atlas", rule), length=20)
    rates = tokens.rates
    expected = recurrences.atlas(
        params.weights[0].T,
        *tokens[:3],
        eta=rates.learn,
        theta=rates.momentum,
        alpha=rates.keep,
        window=3,
        iterations=5,
    )
    # The norm's own 1e-12, which the paper has not.
    agree(rule, params, tokens, expected, bound=1e-9)


def test_lact_is_its_papers_large_chunk():
    rule = replace(variants.lact(), chunk_size=4)
    params, tokens = core.inputs(Case("lact", rule), length=14)
    beta = np.full(14, 0.7)
    first = np.arange(14) % 4 == 0
    rates = tokens.rates._replace(momentum=np.where(first, beta, 1))
    expected = recurrences.lact(
        [w.T for w in params.weights],
        *tokens[:3],
        eta=rates.learn,
        beta=beta,
        size=4,
        iterations=5,
    )
    agree(rule, params, tokens._replace(rates=rates), expected, bound=1e-9)


FULL, HALF = (
    Dot(jnp.dtype(x), jnp.dtype(jnp.float32)) for x in ("float32", "bfloat16")
)


@pytest.mark.parametrize("dot", [FULL, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8), (32, 128)])
def test_newton_schulz_makes_singular_values_nearly_equal(shape, dot):
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values = np.linalg.svd(core.jit(lambda m: orthogonalised(m, 5, dot))(matrix))[1]
    assert np.ptp(np.linalg.svd(matrix)[1]) > 1
    assert np.all((values > 0.6) & (values < 1.3)), values
    assert np.all(orthogonalised(jnp.zeros((3, 4), jnp.float32), 5, dot) == 0)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (16, 16)])
def test_newton_schulz_loses_no_small_singular_value(shape):
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=shape), False)
    matrix = (u * np.geomspace(1, 1e-6, 16)) @ v
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    exact = Dot(jnp.dtype(jnp.float64), jnp.dtype(jnp.float64))
    assert error(orthogonalised(jnp.asarray(matrix), 5, exact), x) < 1e-11
    # With all five on one square, 2e-4.
    assert error(orthogonalised(jnp.float32(matrix), 5, FULL), x) < 3e-5


def test_newton_schulz_in_bfloat16_takes_every_square_from_its_matrix():
    u, _, v = np.linalg.svd(np.random.default_rng(0).normal(size=(32, 128)), False)
    matrix = jnp.asarray((u * np.geomspace(1, 1e-2, 32)) @ v, jnp.float32)
    expected = orthogonalised(matrix, 5, FULL)
    # With squares of squares 0.044.
    assert error(orthogonalised(matrix, 5, HALF), expected) < 0.03


def test_the_square_of_a_small_momentum_is_that_of_what_is_read():
    """Steps in bfloat16 that take away nearly all of the momentum that came in."""
    rng = np.random.default_rng(0)
    a, d = (jnp.asarray(rng.normal(size=(4, n)), jnp.float32) for n in (16, 32))
    mix = jnp.tri(4, dtype=jnp.float32)
    m = a.T @ d * (1 + 0.02 * rng.normal(size=(16, 32)).astype(np.float32))
    rounded = (np.asarray(x, jnp.bfloat16).astype(np.float64) for x in (m, a, d))
    start, left, right = rounded
    steps = np.cumsum(left[:, :, None] * right[:, None], axis=0)
    expected = np.sum((start - steps) ** 2, axis=(1, 2))
    assert expected[-1] < 1e-3 * np.sum(start**2)
    one = jnp.ones((4, 1), jnp.float32)
    square = jax.jit(momentum_square, static_argnums=0)(HALF, one, mix, m, a, d)
    # With the square of m itself, 0.4.
    np.testing.assert_allclose(square[:, 0], expected, rtol=2e-3)


def test_mesa_net_is_the_least_squares_solution_of_all_pairs():
    rng, length = np.random.default_rng(0), 70
    queries, keys = unit(rng, length, 4), unit(rng, length, 4)
    learn, keep = rng.uniform(0.05, 0.95, length), rng.uniform(0.8, 1, length)
    keep[20] = 0  # forgets everything before
    tokens = miras.Tokens(
        queries, keys, rng.normal(size=(length, 6)), miras.Rates(learn, keep)
    )
    weights, ridge = rng.normal(size=(4, 6)), rng.normal(size=4)
    expected = recurrences.mesa_net(
        weights.T, *tokens[:3], learn, keep, 0.25 + np.log1p(np.exp(ridge))
    )
    agree(variants.mesa_net(), miras.Params((weights,), ridge=ridge), tokens, expected)


def test_conjugate_gradients_converge_at_the_width_of_a_head():
    """In single precision, with keys that point nearly the same way: also gradients."""
    rule, rng, length, width = variants.mesa_net(), np.random.default_rng(0), 96, 64
    keys = unit(rng, length, width) + 3 * unit(rng, 1, width)
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    rates = miras.Rates(np.full(length, 0.5), np.full(length, 0.999))
    values = rng.normal(size=(length, width)) / 8
    tokens = miras.Tokens(unit(rng, length, width), keys, values, rates)
    weigh = rng.normal(size=(length, width))
    with jax.enable_x64(False):
        params = rule.init(jax.random.key(0), width, width)
        results = []
        for implementation in ("definition", "xla"):

            def loss(params, tokens, implementation=implementation):
                outputs, _ = miras.run(
                    rule,
                    params,
                    rule.start(params),
                    tokens,
                    implementation=implementation,
                )
                return jnp.sum(outputs * weigh.astype(np.float32))

            single = jax.tree.map(lambda x: x.astype(np.float32), tokens)
            results.append(core.jit(jax.grad(loss, (0, 1)))(params, single))
    direct, iterated = map(jax.tree.leaves, results)
    for actual, expected in zip(iterated, direct, strict=True):
        assert error(actual, expected) < 1e-4


def test_too_few_rounds_are_noticed():
    rule = variants.mesa_net()
    params, tokens = core.inputs(Case("mesa_net", rule))
    short = replace(rule, algorithm=algorithm.Newton(iterations=1))
    exact, _ = core.run_whole(short, "definition")(params, tokens)
    outputs, _ = core.run_whole(short, "xla")(params, tokens)
    assert error(outputs, exact) > 1e-3
