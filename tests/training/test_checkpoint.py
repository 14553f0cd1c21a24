"""Checkpoints: exact round trips, what is kept, and every kind of damage."""

import json
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from miras_jax.errors import UserError
from miras_jax.training.checkpoint import Checkpoints

CONFIG = {"model": {"width": 64, "layers": [{"kind": "miras"}, {"kind": "attention"}]}}


class Moments(NamedTuple):
    """An optimizer state is a NamedTuple; orbax stores it as a dict."""

    count: jax.Array
    mean: dict


def make_state(step):
    """Incompressible values, so that the files are larger than a 4 KiB page."""
    weights = np.random.default_rng(step).normal(size=(64, 64)).astype(np.float32)
    return {
        "weights": jnp.asarray(weights),
        "layers": [{"bias": jnp.asarray(weights[0], jnp.bfloat16)}, {}],
        "optimizer": (Moments(jnp.int32(step), {"bias": jnp.asarray(weights[1])}),),
        "step": jnp.int32(step),
        "key": jax.random.key(step),
    }


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
    )


def assert_same(got, expected):
    def bits(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for ours, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True
    ):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert bits(ours) == bits(theirs)


def save(checkpoints, step, loss=None):
    checkpoints.save(
        step, make_state(step), data={"next": step}, config=CONFIG, loss=loss
    )


def restore(directory, like=None, config=CONFIG, **options):
    with Checkpoints(directory, **options) as checkpoints:
        return checkpoints.restore(abstract(like or make_state(0)), config=config)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_steps")
    with Checkpoints(directory) as checkpoints:
        save(checkpoints, 1, loss=0.5)
        save(checkpoints, 2, loss=0.75)
    return directory


@pytest.fixture
def copy(two_steps, tmp_path):
    """A directory with the steps 1 and 2, to be damaged."""
    return Path(shutil.copytree(two_steps, tmp_path / "copy"))


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


def largest(directory, step):
    files = (path for path in (directory / str(step)).rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_page(path):
    content = bytearray(path.read_bytes())
    assert len(content) > 8192
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def zero_file(path):
    path.write_bytes(bytes(path.stat().st_size))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage", [flip_byte, zero_page, zero_file, truncate, Path.unlink]
)
def test_a_damaged_step_is_named_and_the_one_before_is_used(copy, damage, caplog):
    victim = largest(copy, 2)
    damage(victim)
    restored = restore(copy)
    assert (restored.step, restored.data, restored.loss) == (1, {"next": 1}, 0.5)
    assert_same(restored.state, make_state(1))
    assert f"step 2 in {copy} is skipped: {victim}" in caplog.text


@pytest.mark.parametrize("damage", [flip_byte, zero_file, truncate, Path.unlink])
def test_a_step_without_its_manifest_is_not_trusted(copy, damage, caplog):
    manifest = copy / "manifests" / "2.json"
    damage(manifest)
    assert restore(copy).step == 1
    assert f"step 2 in {copy} is skipped: {manifest}" in caplog.text


def test_every_file_of_a_step_is_covered(copy):
    files = [path for path in (copy / "2").rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        before = path.read_bytes()
        flip_byte(path)
        assert restore(copy, read_only=True).step == 1, path
        path.write_bytes(before)
    assert restore(copy).step == 2


def test_a_changed_loss_in_the_manifest_does_not_make_a_step_the_best(copy):
    path = copy / "manifests" / "2.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "loss": 0.25}))
    with Checkpoints(copy) as checkpoints:
        best = checkpoints.restore_best(abstract(make_state(0)), config=CONFIG)
    assert best.step == 1


def test_the_second_best_stands_in_for_a_damaged_best(copy):
    flip_byte(largest(copy, 1))
    with Checkpoints(copy) as checkpoints:
        best = checkpoints.restore_best(abstract(make_state(0)), config=CONFIG)
    assert best.step == 2


def test_when_all_steps_are_damaged_nothing_is_restored(copy):
    flip_byte(largest(copy, 1))
    truncate(largest(copy, 2))
    with pytest.raises(UserError, match=f"no checkpoint in {copy} is whole"):
        restore(copy)


@pytest.mark.parametrize("victim", ["file", "manifest"])
def test_a_damaged_step_makes_way_and_is_not_deleted(copy, victim):
    path = largest(copy, 2) if victim == "file" else copy / "manifests" / "2.json"
    path.unlink()
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)), config=CONFIG).step == 1
        assert checkpoints.steps() == [1, 2]
        save(checkpoints, 2)
    assert_same(restore(copy).state, make_state(2))
    assert (copy / "rejected" / "2-1" / "state").is_dir()


def test_a_damaged_step_does_not_count_as_one_of_the_last(copy):
    flip_byte(largest(copy, 2))
    with Checkpoints(copy) as checkpoints:
        assert checkpoints.restore(abstract(make_state(0)), config=CONFIG).step == 1
        save(checkpoints, 3, loss=0.25)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


def test_a_damaged_step_makes_way_even_if_nothing_was_restored(copy):
    flip_byte(largest(copy, 2))
    with Checkpoints(copy) as checkpoints:
        save(checkpoints, 2)
    assert restore(copy).step == 2
    assert (copy / "rejected" / "2-1").is_dir()


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
    ],
)
def test_another_config_is_refused_by_the_first_field(two_steps, model, difference):
    with pytest.raises(UserError, match=f"another config: {difference}; give"):
        restore(two_steps, config={"model": {**CONFIG["model"], **model}})


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


def test_leftovers_of_killed_saves_are_cleaned(copy):
    leftover = copy / "3.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    restore(copy, read_only=True)
    assert leftover.is_dir()
    restore(copy)
    assert not leftover.parent.exists()


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


@pytest.fixture
def small_files():
    """Writes beyond 8 KiB of a file fail, as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_failed_write_is_raised_by_the_next_call(tmp_path, small_files):
    # One array: orbax does not wait for the writes beside the one that failed, and
    # their late replies to its closed event loop would be reported in another test.
    small, large = {"weights": jnp.zeros(8)}, {"weights": make_state(2)["weights"]}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, small, data={}, config=CONFIG)
        checkpoints.save(2, large, data={}, config=CONFIG)
        with pytest.raises(Exception, match="File too large"):
            checkpoints.save(3, large, data={}, config=CONFIG)
        assert checkpoints.steps() == [1]
        assert checkpoints.restore(abstract(small), config=CONFIG).step == 1
        small_files()
        checkpoints.save(2, large, data={}, config=CONFIG)
        restored = checkpoints.restore(abstract(large), config=CONFIG)
    assert restored.step == 2
    assert_same(restored.state, large)


def test_a_manifest_that_cannot_be_written_is_raised_too(copy):
    with Checkpoints(copy) as checkpoints:
        checkpoints.restore(abstract(make_state(0)), config=CONFIG)
        (copy / "manifests").rename(copy / "elsewhere")
        save(checkpoints, 3)
        with pytest.raises(FileNotFoundError, match="manifests"):
            save(checkpoints, 4)
        (copy / "elsewhere").rename(copy / "manifests")
        save(checkpoints, 3)
    assert restore(copy).step == 3
    assert (copy / "rejected" / "3-1").is_dir()


TRAIN_UNTIL_KILLED = """
    import sys
    from miras_jax.training.checkpoint import Checkpoints
    from tests.training.test_checkpoint import CONFIG, abstract, make_state, save

    print("ready", flush=True)
    sys.stdin.readline()
    checkpoints = Checkpoints(sys.argv[1])
    restored = checkpoints.restore(abstract(make_state(0)), config=CONFIG)
    step = restored.step if restored else 0
    while True:
        step += 1
        save(checkpoints, step, loss=1 / step)
        # Step - 1 is certain by now: its commit and manifest came before this save.
        print(step - 1, flush=True)
"""


def test_after_sigkill_the_newest_verified_step_is_whole(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(TRAIN_UNTIL_KILLED), str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[2]
    # All start at once, since importing takes longest; each runs when told to.
    runs = [subprocess.Popen(command, cwd=root, **pipes) for _ in range(3)]
    chance = random.Random(0)
    certain = 0
    try:
        for run in runs:
            assert run.stdout.readline() == "ready\n"
            run.stdin.write("go\n")
            run.stdin.flush()
            first = int(run.stdout.readline())
            assert first >= certain
            time.sleep(chance.uniform(0.1, 0.6))
            run.kill()
            certain = int(([str(first)] + run.stdout.read().split())[-1])
            restored = restore(tmp_path, read_only=True)
            assert restored.step >= certain > 0
            assert restored.data == {"next": restored.step}
            assert_same(restored.state, make_state(restored.step))
    finally:
        for run in runs:
            run.kill()
            run.communicate()
