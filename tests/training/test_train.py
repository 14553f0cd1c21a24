"""The loop: runs that are cut off go on exactly, and what the guard makes of a run."""

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from miras_jax import variants
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.nn.titans import MAG
from miras_jax.training import train as train_module
from miras_jax.training.metrics import read_table
from miras_jax.training.train import Diverged, Result, implementations, train
from pallas_kernels.fused_scan import target
from tests import xla_flags
from tests.training.runs import SharedRun, bad_batch, bits, tiny


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """Trains with `SharedRun`; a SIGTERM that the loop does not take is an error."""

    def lost(number, _):
        raise AssertionError("SIGTERM outside of the loop's handler")

    monkeypatch.setattr(train_module, "Run", SharedRun)
    monkeypatch.setattr(SharedRun, "events", {})
    before = signal.signal(signal.SIGTERM, lost)
    yield
    assert signal.signal(signal.SIGTERM, before) is lost, "handler not put back"


@contextlib.contextmanager
def happening(**events):
    """`step_3=action` lets it happen before the third step, once."""
    SharedRun.events = {
        (kind, int(count)): action
        for (kind, _, count), action in (
            (name.partition("_"), action) for name, action in events.items()
        )
    }
    yield
    SharedRun.events = {}


def terminate():
    signal.raise_signal(signal.SIGTERM)


class Crash(Exception):
    pass


def crash():
    raise Crash


def last_state(experiment, workdir):
    return SharedRun(experiment, workdir).restore("last")


def record(experiment, workdir) -> dict:
    """All that two runs which did the same must have in common."""
    table = read_table(workdir / "metrics.csv")
    del table["tokens_per_second"]
    heldout = read_table(workdir / "evaluations.csv")
    restored = last_state(experiment, workdir)
    return {
        "metrics": {name: column.tolist() for name, column in table.items()},
        "heldout": {name: column.tolist() for name, column in heldout.items()},
        "state": bits(restored.state),
        "step": restored.step,
        "data": restored.data,
    }


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The record of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("straight")
    experiment = tiny(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "Run", SharedRun)
        result = train(experiment, folder / "run")
    return record(experiment, folder / "run") | {"result": result}


def assert_same_as(straight, experiment, workdir):
    found = record(experiment, workdir)
    for name, value in found.items():
        assert value == straight[name], f"{name} differs from the uninterrupted run"


def test_a_run_learns_and_tells_of_it(straight):
    metrics, heldout = straight["metrics"], straight["heldout"]
    assert straight["result"] == Result(12, True, pytest.approx(heldout["loss"][-1]))
    assert metrics["step"] == list(range(1, 13)) and heldout["step"] == [6, 12]
    assert heldout["loss"][1] < heldout["loss"][0] < np.log(257) + 0.1
    assert sum(metrics["skipped"]) == 0
    rates = [3e-3 * n / 4 for n in range(5)]
    assert metrics["learning_rate"][:5] == pytest.approx(rates)


@pytest.mark.parametrize("at", [2, 6, 12])
def test_a_crash_changes_nothing(at, straight, tmp_path):
    experiment = tiny(tmp_path)
    with happening(**{f"step_{at}": crash}), pytest.raises(Crash):
        train(experiment, tmp_path / "run")
    assert train(experiment, tmp_path / "run") == straight["result"]
    assert_same_as(straight, experiment, tmp_path / "run")


def test_a_kill_before_the_first_manifest_is_a_new_beginning(straight, tmp_path):
    experiment = tiny(tmp_path)
    with happening(step_6=crash), pytest.raises(Crash):
        train(experiment, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "manifests" / "4.json").unlink()
    assert train(experiment, tmp_path / "run") == straight["result"]
    assert_same_as(straight, experiment, tmp_path / "run")


# The signal, the step at which the run ends, and the evaluations written by then. A
# step's wish to stop is sent with it, so that a signal during a step ends the next.
STOPS = {
    "before the first step": ("start_0", 1, []),
    "while the first step compiles": ("step_1", 2, []),
    "in mid-run": ("step_8", 9, [6]),
    "in the first evaluation": ("evaluation_1", 6, []),
    "in the last evaluation": ("evaluation_3", 12, [6]),
    "in the step before an evaluation": ("step_5", 6, []),
}


@pytest.mark.parametrize("when", STOPS)
def test_sigterm_saves_and_the_run_goes_on_exactly(when, straight, tmp_path, capfd):
    event, at, evaluations = STOPS[when]
    experiment = tiny(tmp_path)
    workdir = tmp_path / "run"
    with happening(**{event: terminate}):
        result = train(experiment, workdir)
    assert (result.step, result.finished) == (at, at == 12)
    assert last_state(experiment, workdir).step == at
    table = workdir / "evaluations.csv"
    written = read_table(table)["step"].tolist() if table.exists() else []
    assert written == evaluations
    assert "SIGTERM: saving after the current step" in capfd.readouterr().err

    assert train(experiment, workdir) == straight["result"]
    assert_same_as(straight, experiment, workdir)


def test_an_evaluation_cut_short_by_another_process_is_not_believed(
    straight, tmp_path, capsys
):
    """The flag of the other arrives with the sum; this process has had no signal."""
    experiment = tiny(tmp_path)
    workdir = tmp_path / "run"
    others = jnp.zeros(jax.device_count(), jnp.int32).at[5].set(1)
    with happening(evaluation_1=lambda: others):
        assert train(experiment, workdir) == Result(6, False, None)
    assert not (workdir / "evaluations.csv").exists()
    train(experiment, workdir)
    assert_same_as(straight, experiment, workdir)


def test_a_bad_batch_costs_one_update(tmp_path):
    experiment = tiny(tmp_path)
    with happening(step_6=bad_batch):
        result = train(experiment, tmp_path / "run")
    table = read_table(tmp_path / "run" / "metrics.csv")
    assert result.finished and np.isfinite(result.heldout_loss)
    assert np.flatnonzero(np.isnan(table["loss"])).tolist() == [5]
    assert table["skipped"].tolist() == [0] * 5 + [1] * 7
    # The schedule counts updates, not batches.
    assert table["learning_rate"][6] == table["learning_rate"][5]


def test_a_diverged_run_keeps_its_last_good_checkpoint(straight, tmp_path):
    experiment = tiny(tmp_path)
    workdir = tmp_path / "run"
    bad = {f"step_{n}": bad_batch for n in (6, 7, 8)}
    with happening(**bad), pytest.raises(Diverged, match="3 updates .* up to step 8"):
        train(experiment, workdir)
    # Step 8 was due to be saved, and it is the third in a row.
    restored = last_state(experiment, workdir)
    assert (restored.step, int(restored.state.skipped)) == (4, 0)
    train(experiment, workdir)
    assert_same_as(straight, experiment, workdir)


KILLED = """
import sys
from pathlib import Path
from miras_jax.training.train import train
from tests.training.runs import tiny

folder = Path(sys.argv[1])
train(tiny(folder, checkpoint_every=2), folder / "run")
"""


def start(folder: Path, log) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(devices=1),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-c", KILLED, str(folder)],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=log,
        stderr=log,
    )


def test_what_runs_a_model_is_told(monkeypatch):
    """As layers would be read: persistent tokens, documents, float32."""
    version = SimpleNamespace(cudnn_get_version=lambda: 91000)
    monkeypatch.setattr(cudnn, "cuda_versions", version)
    memory = Miras(variants.yaad(), num_heads=2)
    layers = Attention(2), Attention(2, window=32, persistent=4)
    hybrid = Model(width=32, mixers=(MAG(memory, layers[1]), *layers), depth=3)
    expected = "memories in XLA, attention in XLA"
    assert implementations(hybrid, 256, packed=False) == expected
    with target("tpu"):
        expected = "memories in TPU kernels, attention in TPU kernels and XLA"
        assert implementations(hybrid, 256, packed=True) == expected
        only = Model(mixers=layers[:1], depth=1)
        assert implementations(only, 256, packed=True) == "attention in TPU kernels"
        assert implementations(only, 64, packed=True) == "attention in XLA"
    with target("gpu"):
        assert implementations(only, 256, packed=True) == "attention in XLA"
        window = Model(
            mixers=(Attention(4, window=32),), depth=1, compute_dtype="bfloat16"
        )
        assert implementations(window, 256, packed=False) == "attention in GPU kernels"
        assert implementations(window, 256, packed=True) == "attention in XLA"
        full = replace(window, mixers=(Attention(4),))
        assert implementations(full, 256, packed=True) == "attention in GPU kernels"
        carried = implementations(full, 256, packed=True, carried=True)
        assert carried == "attention in XLA"


def test_kill_dash_nine(tmp_path, straight):
    """Killed in mid-run at a random moment, the run goes on bit by bit."""
    manifests = tmp_path / "run" / "checkpoints" / "manifests"
    with open(tmp_path / "log", "w") as log:
        process = start(tmp_path, log)
        deadline = time.monotonic() + 240
        while not any(manifests.glob("*.json")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert start(tmp_path, log).wait() == 0, (tmp_path / "log").read_text()
    assert "from step" in (tmp_path / "log").read_text()
    found = record(tiny(tmp_path), tmp_path / "run")
    for name in ("metrics", "heldout", "data"):
        assert found[name] == straight[name]
    digests = [
        hashlib.sha256(b"".join(r["state"])).hexdigest() for r in (found, straight)
    ]
    assert digests[0] == digests[1]


def test_steps_are_traced(tmp_path):
    """Those that were asked for, or what of them there is before the run ends."""
    experiment = tiny(tmp_path)
    for first, last in ((2, 3), (11, 20)):
        workdir = tmp_path / f"from {first}"
        train(experiment, workdir, traced=(first, last))
        (trace,) = (workdir / "profile").rglob("*.xplane.pb")
        assert trace.stat().st_size > 0
    with pytest.raises(UserError, match="counted from 1"):
        train(experiment, workdir, traced=(3, 2))
