"""Learning rates, weight decay, and Muon on stacked matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from miras_jax import variants
from miras_jax.errors import UserError
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Mesh
from miras_jax.training.optimizer import AdamW, Muon
from miras_jax.training.run import Run
from tests.training.runs import tiny


def test_schedule():
    rate = AdamW(learning_rate=2.0, warmup_steps=10).schedule(110)
    assert rate(0) == 0
    assert rate(5) == pytest.approx(1.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx((2.0 + 0.2) / 2)
    assert rate(110) == pytest.approx(0.2)
    # A warm-up longer than the run still ends with it.
    assert AdamW(learning_rate=2.0).schedule(20)(19) == pytest.approx(2.0)


@pytest.mark.parametrize("steps", [1, 2, 7, 110])
def test_the_usual_schedule_is_that_of_optax(steps):
    rate = AdamW(learning_rate=2.0, warmup_steps=10).schedule(steps)
    warmup = min(10, max(steps - 1, 1))
    usual = optax.warmup_cosine_decay_schedule(
        0.0, 2.0, warmup, max(steps, warmup + 1), 0.2
    )
    places = np.arange(steps + 2)
    found, expected = np.array(list(map(rate, places))), list(map(usual, places))
    np.testing.assert_allclose(found, np.array(expected), rtol=1e-6)


def test_a_learning_rate_that_stays_until_the_last_part():
    rate = AdamW(learning_rate=2.0, warmup_steps=10, decay_part=0.2).schedule(110)
    assert [rate(n) for n in (10, 50, 90)] == pytest.approx([2.0, 2.0, 2.0])
    assert rate(100) == pytest.approx((2.0 + 0.2) / 2)
    assert rate(110) == pytest.approx(0.2)
    for part in (0.0, 1.5):
        with pytest.raises(UserError, match="above 0, at most 1"):
            AdamW(decay_part=part)


RATES = ("learn", "keep", "threshold")


def test_what_decays():
    """With a gradient of zero all that moves a parameter is its decay."""
    model = FunctionalModel(
        Model(
            width=32,
            depth=2,
            mixers=(Miras(variants.yaad(), num_heads=2),),
            embedding="untied",
        ),
        257,
    )
    zero = {name: jnp.zeros(()) for name in model.shapes}
    ones = jax.tree.map(jnp.ones_like, zero)
    optimizer = AdamW(warmup_steps=1).transformation(10)
    # The first update has rate 0.
    _, state = optimizer.update(zero, optimizer.init(ones), ones)
    updates, _ = optimizer.update(zero, state, ones)
    mixer = "groups/blocks/0/mixer"
    rates = [f"rates/{r}/{p}" for r in RATES for p in ("down", "up")]
    output = ("output/gate", "output/projection")
    assert {name for name, update in updates.items() if jnp.any(update)} == {
        "embedding",
        "output/weight",
        *(f"{mixer}/{name}/weight" for name in ("qkv", *output, *rates)),
        *(f"groups/blocks/0/mlp/{name}/weight" for name in ("gate", "up", "down")),
    }


def test_muon_takes_orthogonal_steps_with_every_block():
    """Each matrix of a stack by itself, of one size whatever the gradient is."""
    rng = np.random.default_rng(0)
    shapes = {
        "groups/blocks/0/mlp/up/weight": (2, 8, 12),
        "groups/blocks/0/mixer_norm/scale": (2, 8),
        "embedding": (20, 8),
    }
    gradients = {n: jnp.float32(rng.normal(size=s)) for n, s in shapes.items()}
    up = "groups/blocks/0/mlp/up/weight"
    scales = jnp.float32([1e-3, 10])[:, None, None]
    gradients[up] *= scales
    zero = jax.tree.map(jnp.zeros_like, gradients)
    settings = {"learning_rate": 1.0, "warmup_steps": 1, "clip_norm": 1e9}

    def updates_of(optimizer):
        transformation = optimizer.transformation(10)
        _, state = transformation.update(gradients, transformation.init(zero), zero)
        return transformation.update(gradients, state, zero)[0]

    found, adam = updates_of(Muon(**settings)), updates_of(AdamW(**settings))
    for matrix, gradient in zip(found[up], gradients[up], strict=True):
        u, sizes, v = np.linalg.svd(-matrix / (0.2 * 12**0.5), full_matrices=False)
        # What five of these iterations leave of one.
        assert np.all((0.6 < sizes) & (sizes < 1.3))
        u_expected, _, v_expected = np.linalg.svd(gradient, full_matrices=False)
        np.testing.assert_allclose(u @ v, u_expected @ v_expected, atol=0.05)
    size = float(jnp.sqrt(jnp.mean(found[up] ** 2)))
    assert size == pytest.approx(0.2, rel=0.3)
    for name in (*shapes.keys() - {up},):
        assert jnp.all(jnp.sign(found[name]) == jnp.sign(adam[name]))


def test_muon_trains_the_same_on_every_mesh(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 257, (8, 33), np.int32)

    @functools.cache
    def losses(mesh):
        model = Model(width=32, depth=1, mixers=(Miras(variants.retnet(), 2),))
        muon = Muon(warmup_steps=1)
        run = Run(tiny(tmp_path, model=model, mesh=mesh, optimizer=muon), tmp_path)
        run.model = FunctionalModel(run.experiment.model, 257)
        state, found = run.initial_state(), []
        for _ in range(4):
            state, metrics = run.train_step(
                state, run.to_devices(tokens), run.stop_flags(False)
            )
            found.append(metrics.loss.item())
        return found

    assert losses(Mesh(data=8))[-1] < losses(Mesh(data=8))[0] - 0.1
    assert losses(Mesh(2, 2, 2)) == pytest.approx(losses(Mesh(data=8)), rel=1e-4)
