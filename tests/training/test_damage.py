"""Checkpoints that were damaged or cut short: what is still good counts."""

import json
import random
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from miras_jax.errors import UserError
from miras_jax.training.checkpoint import Checkpoints
from tests.training.saved import (
    CONFIG,
    abstract,
    assert_same,
    make_state,
    restore,
    save,
)


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


def test_leftovers_of_killed_saves_are_cleaned(copy):
    leftover = copy / "3.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    restore(copy, read_only=True)
    assert leftover.is_dir()
    restore(copy)
    assert not leftover.parent.exists()


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
    from tests.training.saved import CONFIG, abstract, make_state, save

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
            first, second = (int(run.stdout.readline()) for _ in range(2))
            assert first >= certain  # and what is certain by the second is a step
            time.sleep(chance.uniform(0.1, 0.6))
            run.kill()
            certain = int(([str(second)] + run.stdout.read().split())[-1])
            restored = restore(tmp_path, read_only=True)
            assert restored.step >= certain > 0
            assert restored.data == {"next": restored.step}
            assert_same(restored.state, make_state(restored.step))
    finally:
        for run in runs:
            run.kill()
            run.communicate()
