"""Checkpoints: exact round trips, what is kept, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from miras_jax.errors import UserError
from miras_jax.training.checkpoint import Checkpoints
from miras_jax.training.serial import to_json
from tests.training.saved import (
    CONFIG,
    Mixer,
    Moments,
    abstract,
    assert_same,
    make_state,
    restore,
    save,
)


def test_a_round_trip_is_exact(two_steps):
    restored = restore(two_steps)
    assert_same(restored.state, make_state(2))
    assert (restored.step, restored.data, restored.loss) == (2, {"next": 2}, 0.75)


def test_an_empty_directory_has_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new") is None
    assert restore(tmp_path / "never", read_only=True) is None
    assert not (tmp_path / "never").exists()


def test_what_is_changed_after_save_does_not_reach_the_disk(tmp_path):
    forget = jax.jit(lambda array: jnp.zeros_like(array), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        # Several rounds, because what would go wrong is a race with the writer.
        for step in range(1, 9):
            host = np.arange(100_000, dtype=np.int32)
            state, data = {**make_state(step), "host": host}, {"next": step}
            checkpoints.save(step, state, data=data, config=CONFIG)
            data["next"] = -1
            host[:] = -1
            jax.block_until_ready(forget(state["weights"]))
            saved = {**make_state(step), "host": np.arange(100_000, dtype=np.int32)}
            restored = checkpoints.restore(abstract(saved), config=CONFIG)
            assert restored.data == {"next": step}
            assert_same(restored.state, saved)


@pytest.mark.parametrize("keep_last, kept", [(1, [2, 6]), (2, [2, 5, 6])])
def test_the_best_and_the_last_are_kept_across_restarts(tmp_path, keep_last, kept):
    losses = {1: float("nan"), 2: 1.5, 3: None, 4: 2.0, 5: 3.0, 6: 2.5}
    for step, loss in losses.items():
        with Checkpoints(tmp_path, keep_last=keep_last) as checkpoints:
            checkpoints.restore(abstract(make_state(0)), config=CONFIG)
            save(checkpoints, step, loss)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == kept
        best = checkpoints.restore_best(abstract(make_state(0)), config=CONFIG)
    assert (best.step, best.loss) == (2, 1.5)
    assert_same(best.state, make_state(2))
    manifests = {path.stem for path in (tmp_path / "manifests").iterdir()}
    assert manifests == {str(step) for step in kept}


def test_without_any_loss_there_is_no_best(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        save(checkpoints, 1)
        assert checkpoints.restore_best(abstract(make_state(0)), config=CONFIG) is None


def test_a_run_that_continues_no_saved_step_is_refused(copy):
    with Checkpoints(copy) as checkpoints:
        for step in (1, 2):
            with pytest.raises(UserError, match="already holds step 2"):
                save(checkpoints, step)
        checkpoints.restore(abstract(make_state(0)), config=CONFIG)
        save(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]
    assert not (copy / "rejected").exists()


@pytest.mark.parametrize(
    "change, difference",
    [
        (
            {"weights": jnp.zeros((64, 64), jnp.bfloat16)},
            r"weights: saved \[64, 64\] float32, expected \[64, 64\] bfloat16",
        ),
        (
            {"weights": jnp.zeros((64, 32))},
            r"weights: saved \[64, 64\] float32, expected \[64, 32\] float32",
        ),
        (
            {"layers": [{"bias": jnp.zeros(64, jnp.bfloat16), "scale": jnp.zeros(2)}]},
            r"layers\.0\.scale: saved nothing, expected \[2\] float32",
        ),
        (
            {"optimizer": (Moments(jnp.int32(0), {}),)},
            r"optimizer\.0\.mean\.bias: saved \[64\] float32, expected nothing",
        ),
        (
            {"key": jax.random.key(0, impl="rbg")},
            r"key: saved \[2\] uint32, expected \[4\] uint32",
        ),
        (
            {"key": jnp.zeros(2, jnp.uint32)},
            r"key: saved \[\] key<fry>, expected \[2\] uint32",
        ),
    ],
)
def test_another_model_is_refused_by_the_first_leaf(two_steps, change, difference):
    with pytest.raises(UserError, match=f"of another model: {difference}; give"):
        restore(two_steps, like={**make_state(0), **change})


@pytest.mark.parametrize(
    "model, difference",
    [
        ({"width": 128}, "model.width: saved 64, expected 128"),
        ({"depth": 2}, "model.depth: saved nothing, expected 2"),
        (
            {"layers": ({"kind": "miras"}, {"kind": "gru"})},
            "model.layers.1.kind: saved attention, expected gru",
        ),
        ({"mixer": to_json(Mixer(3))}, "model.mixer.heads: saved 2, expected 3"),
        ({"mixer": to_json(Mixer(2, 5))}, "model.mixer.window: saved 4, expected 5"),
        (
            {"mixer": to_json(Mixer(2, None))},
            "model.mixer.window: saved 4, expected None",
        ),
    ],
)
def test_another_config_is_refused_by_the_first_field(two_steps, model, difference):
    with pytest.raises(UserError, match=f"another config: {difference}; give"):
        restore(two_steps, config={"model": {**CONFIG["model"], **model}})


def test_a_field_that_came_later_is_no_difference_at_its_default(two_steps):
    config = {"model": {**CONFIG["model"], "mixer": to_json(Mixer(2))}}
    assert config != CONFIG
    assert restore(two_steps, config=config).step == 2


def test_a_config_with_tuples_is_the_same_config(two_steps):
    layers = tuple(CONFIG["model"]["layers"])
    config = {"model": {**CONFIG["model"], "layers": layers}}
    assert restore(two_steps, config=config).step == 2


def test_a_state_moves_to_another_mesh(tmp_path):
    devices = jax.devices()[:8]
    if len(devices) < 8:
        pytest.fail("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")

    def on_mesh(rows, columns):
        used = np.array(devices[: rows * columns]).reshape(rows, columns)
        mesh = Mesh(used, ("data", "model"))

        def placed(leaf):
            split = PartitionSpec("data", "model") if leaf.ndim == 2 else None
            return NamedSharding(mesh, split or PartitionSpec())

        return placed

    state, placed = make_state(1), on_mesh(2, 4)
    with Checkpoints(tmp_path) as checkpoints:
        spread = jax.tree.map(lambda leaf: jax.device_put(leaf, placed(leaf)), state)
        checkpoints.save(1, spread, data={}, config=CONFIG)
        for mesh in [(8, 1), (2, 2), (1, 1)]:
            placed = on_mesh(*mesh)
            like = jax.tree.map(
                lambda leaf, at=placed: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=at(leaf)
                ),
                state,
            )
            restored = checkpoints.restore(like, config=CONFIG).state
            assert_same(restored, state)
            assert restored["weights"].sharding == placed(restored["weights"])
            assert len(restored["step"].sharding.device_set) == mesh[0] * mesh[1]


def test_a_reader_cannot_save(copy):
    with Checkpoints(copy, read_only=True) as checkpoints:
        with pytest.raises(ValueError, match="read_only"):
            save(checkpoints, 3)


def test_unusable_directories_and_choices_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoints to .*file/run"):
        Checkpoints(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="is a URL"):
        Checkpoints("gs://bucket/run")
    with pytest.raises(UserError, match="keep at least 1"):
        Checkpoints(tmp_path, keep_last=0)
