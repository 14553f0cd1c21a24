"""Gradients of the outer loop against finite differences of the NumPy oracle.

The oracle has no automatic differentiation and the engine no finite differences, so
agreement tests both at once.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

import miras_jax as miras
from tests import core
from tests.core import error, oracle

STEP = 3e-5
# Weights of the derivative's five-point formula, exact to the fourth order of STEP.
STENCIL = {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12}


# Variants of one rule differ in their rates' parametrisation alone.
VARIANTS = list({case[1:]: case for case in reversed(core.variant_cases())}.values())


def gradient_cases():
    """Every variant, the exact readouts, and every row of the table with channels."""
    table = {case.name: case for case in core.all_cases()}
    yield from VARIANTS
    for name in ("moneta", "memora"):
        rule = replace(table[name].rule, readout="exact")
        yield table[name]._replace(name=f"{name}-exact", rule=rule)
    yield from (case for case in core.axis_cases() if case.channelwise)
    for name in (
        "huber-coordinate",
        "huber-norm",
        "lp-exact",
        "linf",
        "robust",
        "f-reverse-kl",
        "f-chi-square",
        "bregman-sigmoid",
        "momentum-lq",
    ):
        yield table[name]
    exact = replace(table["f-hellinger"].rule, readout="exact")
    yield table["f-hellinger"]._replace(name="f-hellinger-exact", rule=exact)


CASES = list(gradient_cases())


def objectives(case, outputs):
    """One fixed random linear functional of every output: `[L]`."""
    _, value_dim = core.dims(case.rule)
    return outputs @ np.random.default_rng(9).normal(size=value_dim)


def jacobian(case, implementation):
    """Jacobian `[L, *shape]` of the objectives by every parameter and token array."""
    rule = case.rule

    def function(params, tokens):
        outputs, _ = miras.run(
            rule, params, rule.start(params), tokens, implementation=implementation
        )
        return objectives(case, outputs)

    with jax.enable_x64(True):
        rows = core.jit(jax.jacrev(function, argnums=(0, 1)))(*core.inputs(case))
        return [(path, x) for path, x in jax.tree.leaves_with_path(rows) if x.size]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def computed(case):
    return jacobian(case, "xla")


@pytest.mark.parametrize("case", VARIANTS, indirect=True, ids=lambda case: case.name)
def test_both_implementations_have_the_same_jacobian(case, computed):
    definition = jacobian(case, "definition")
    for (path, actual), (_, expected) in zip(computed, definition, strict=True):
        assert error(actual, expected) < 1e-9, path


def test_jacobian_matches_finite_differences(case, computed):
    """Along a random direction of each array, every output at once."""
    leaves, structure = jax.tree.flatten(core.inputs(case))
    filled = [i for i, leaf in enumerate(leaves) if leaf.size]
    rng = np.random.default_rng(7)

    def evaluate(i, leaf):
        changed = [*leaves[:i], leaf, *leaves[i + 1 :]]
        outputs, _ = oracle.run(case.rule, *jax.tree.unflatten(structure, changed))
        return objectives(case, outputs)

    for i, (path, rows) in zip(filled, computed, strict=True):
        direction = rng.normal(size=leaves[i].shape)
        slopes = sum(
            weight * evaluate(i, leaves[i] + steps * STEP * direction) / STEP
            for steps, weight in STENCIL.items()
        )
        assert np.max(np.abs(slopes)) > 1e-3, f"{path} has no effect"
        product = np.tensordot(rows, direction, axes=direction.ndim)
        assert error(product, slopes) < 1e-6, path


def test_outputs_depend_on_the_present_and_past_alone(case, computed):
    """The Jacobian by tokens is lower triangular, with an effect on its diagonal.

    Where a chunk is read at its start, its own tokens have none but as queries.
    """
    future = np.triu_indices(core.LENGTH, k=1)
    chunks = np.arange(core.LENGTH) // case.rule.chunk_size
    for path, rows in computed:
        if path[0].idx == 0:  # a parameter
            continue
        strength = np.abs(rows).reshape(core.LENGTH, core.LENGTH, -1).max(axis=2)
        assert np.all(strength[future] == 0), path
        if case.rule.readout == "start" and path[-1].name != "queries":
            assert np.all(strength[chunks[:, None] == chunks] == 0), path
            present = strength[chunks[:, None] > chunks]
            assert np.mean(present > 0) > 0.8, path
            continue
        present = np.diagonal(strength)
        # A clipped residual hides its value and its sign, an unclipped one the
        # threshold; with momentum 0 carried at first, its rate has no effect there.
        sometimes = path[-1].name in ("values", "threshold", "momentum")
        # The first of all tokens is read alone, whatever its key and query.
        sometimes |= case.rule.keeps_tokens
        assert np.any(present > 0) if sometimes else np.all(present > 0), path
