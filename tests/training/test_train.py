"""The loop: the golden step, the guard, and runs that are cut off and go on exactly."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from miras_jax import variants
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training import config, step
from miras_jax.training import train as train_module
from miras_jax.training.config import Experiment, Guard, Optimizer
from miras_jax.training.data import TextFiles
from miras_jax.training.metrics import read_table
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import Bytes
from miras_jax.training.train import Diverged, Result, train

RULE = dataclasses.replace(variants.titans(), chunk_size=8)


def tiny(folder: Path, **changes) -> Experiment:
    """Twelve steps of a small Titans on made-up text, which is written to `folder`.

    An evaluation reads two batches, of which the last is not full.
    """
    words, rng = ["the", "cat", "sat", "on", "a", "mat"], random.Random(0)
    for name, count in (("train", 1500), ("heldout", 90)):
        text = " ".join(rng.choice(words) for _ in range(count))
        (folder / f"{name}.txt").write_text(text)
    experiment = Experiment(
        model=Model(width=32, depth=2, mixers=(Miras(RULE, num_heads=2),)),
        data=TextFiles(
            (str(folder / "train.txt"),), (str(folder / "heldout.txt"),), 32, Bytes()
        ),
        optimizer=Optimizer(warmup_steps=4),
        steps=12,
        batch_size=8,
        evaluate_every=6,
        checkpoint_every=4,
        guard=Guard(limit=3),
    )
    return dataclasses.replace(experiment, **changes)


def one_device() -> jax.sharding.Mesh:
    device = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return jax.sharding.Mesh(device, ("data", "fsdp", "model"))


@functools.cache
def compiled(experiment: Experiment) -> dict:
    """What runs of equal models share, so that each program is compiled once."""
    run = Run(experiment, "nowhere")
    run.mesh = one_device()
    run.model = FunctionalModel(experiment.model, Bytes().train([]).vocab_size)
    state = jax.tree.map(np.asarray, run.initial_state())
    names = ("mesh", "model", "abstract_state", "state_shardings")
    steps = {"the_step": run.train_step, "the_evaluation": run.evaluate_step}
    return {name: getattr(run, name) for name in names} | steps | {"fresh": state}


class SharedRun(Run):
    """A run on one device, in which a test can let something happen.

    `events` maps ("step", 3), ("evaluation", 1) or ("start", 0) to what happens just
    before that, counted from 1 in this process. It returns None, or what takes the
    place of the tokens of a step or of the stop flags of an evaluation.
    """

    events = {}

    def __init__(self, experiment, workdir):
        super().__init__(experiment, workdir)
        plain = dataclasses.replace(
            experiment,
            data=TextFiles((), (), 32, Bytes()),
            evaluate_every=1,
            checkpoint_every=1,
        )
        self.__dict__.update(compiled(plain))
        self.counts = {"step": 0, "evaluation": 0}

    def happen(self, kind, array):
        self.counts[kind] += 1
        event = self.events.get((kind, self.counts[kind]), lambda: None)
        replaced = event()
        # As the loop would put it: placed otherwise, it would be compiled for anew.
        return array if replaced is None else jax.device_put(replaced, array.sharding)

    def initial_state(self):
        self.events.get(("start", 0), lambda: None)()
        return jax.device_put(self.fresh, self.state_shardings)

    def train_step(self, state, tokens, stop):
        return self.the_step(state, self.happen("step", tokens), stop)

    def evaluate_step(self, parameters, tokens, weights, stop):
        stop = self.happen("evaluation", stop)
        return self.the_evaluation(parameters, tokens, weights, stop)


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


def bad_batch():
    """Tokens beyond the vocabulary, whose loss is NaN."""
    return np.full((8, 33), 10**6, np.int32)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


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


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """`(change, tokens) -> before, after, metrics` of one step from the third on."""
    experiment = tiny(tmp_path_factory.mktemp("one_step"))
    run = SharedRun(experiment, "nowhere")
    tokens = np.random.default_rng(0).integers(0, 257, (8, 33), np.int32)

    def take(change=lambda state: state, tokens=tokens):
        state = jax.device_put(run.fresh, run.state_shardings)
        for _ in range(2):
            state, _ = run.the_step(state, run.to_devices(tokens_0), no_stop)
        state = jax.device_put(change(state), run.state_shardings)
        before = jax.tree.map(np.array, state)
        after, metrics = run.the_step(state, run.to_devices(tokens), no_stop)
        return before, jax.tree.map(np.array, after), metrics

    tokens_0, no_stop = tokens, run.stop_flags(False)
    return take


def with_average(factor):
    """The running mean such that the next loss, about 5.5, is `factor` times it."""
    return lambda state: state._replace(average_loss=state.average_loss / factor)


def with_nan(state):
    """One NaN among the parameters."""
    embedding = state.parameters["embedding"].at[0, 0].set(jnp.nan)
    return state._replace(parameters=state.parameters | {"embedding": embedding})


@pytest.mark.parametrize(
    "case",
    [{"tokens": bad_batch()}, {"change": with_nan},
     {"change": with_average(2.2)}],
    ids=["nan batch", "nan parameter", "spike"],
)  # fmt: skip
def test_a_skipped_update_changes_nothing_but_the_counters(case, one_step):
    before, after, metrics = one_step(**case)
    counters = {"step": 3, "skipped": 1, "skipped_in_row": 1}
    expected = before._replace(**{n: np.int32(v) for n, v in counters.items()})
    assert bits(after) == bits(expected)
    assert (int(metrics.skipped), int(metrics.skipped_in_row)) == (1, 1)


def test_an_update_is_accepted_below_the_spike_and_ends_a_row(one_step):
    def change(state):
        state = with_average(1.8)(state)
        return state._replace(skipped=jnp.int32(1), skipped_in_row=jnp.int32(1))

    before, after, metrics = one_step(change)
    assert bits(after.parameters) != bits(before.parameters)
    assert (after.step, after.skipped, after.skipped_in_row) == (3, 1, 0)
    mean = 0.95 * before.average_loss + 0.05 * float(metrics.loss)
    assert after.average_loss == pytest.approx(mean, rel=1e-6)


# Loss (about log 257) and gradient norm of the tiny configuration's first step.
GOLDEN = (5.548593521118164, 1.2001930475234985)


def test_golden_first_step(one_step, tmp_path):
    run = SharedRun(tiny(tmp_path), "nowhere")
    tokens = np.arange(8 * 33, dtype=np.int32).reshape(8, 33) * 7 % 257
    state = jax.device_put(run.fresh, run.state_shardings)
    _, metrics = run.the_step(state, run.to_devices(tokens), run.stop_flags(False))
    found = (metrics.loss.item(), metrics.gradient_norm.item())
    assert found == pytest.approx(GOLDEN, rel=1e-5), (
        f"the first step gives loss and gradient norm {found}, not {GOLDEN}: the "
        "model, its initial values or the loss have changed. If that was meant, write "
        "the new numbers into GOLDEN and say so in CHANGELOG.md"
    )


def test_schedule():
    rate = step.schedule(Optimizer(learning_rate=2.0, warmup_steps=10), 110)
    assert rate(0) == 0
    assert rate(5) == pytest.approx(1.0)
    assert rate(10) == pytest.approx(2.0)
    assert rate(60) == pytest.approx((2.0 + 0.2) / 2)
    assert rate(110) == pytest.approx(0.2)
    # A warm-up longer than the run still ends with it.
    assert step.schedule(Optimizer(learning_rate=2.0), 20)(19) == pytest.approx(2.0)


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
    optimizer = step.make_optimizer(config.Optimizer(warmup_steps=1), 10)
    # The first update has rate 0.
    _, state = optimizer.update(zero, optimizer.init(ones), ones)
    updates, _ = optimizer.update(zero, state, ones)
    mixer = "groups/blocks/0/mixer"
    rates = [f"rates/{r}/{p}" for r in RATES for p in ("down", "up")]
    assert {name for name, update in updates.items() if jnp.any(update)} == {
        "embedding",
        "output/weight",
        *(f"{mixer}/{name}/weight" for name in ("qkv", "gate", "output", *rates)),
        *(f"groups/blocks/0/mlp/{name}/weight" for name in ("gate", "up", "down")),
    }


RATES = ("learn", "keep", "threshold")

KILLED = """
import sys
from pathlib import Path
from miras_jax.training.train import train
from tests.training.test_train import tiny

folder = Path(sys.argv[1])
train(tiny(folder, checkpoint_every=2), folder / "run")
"""


def start(folder: Path, log) -> subprocess.Popen:
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
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
