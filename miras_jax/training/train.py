"""The training loop, top to bottom: prepare, restore, step, evaluate, save.

Metrics of a step are fetched after the next one was dispatched, so that the host never
waits for the device. What decides the course of training (parameters, optimizer,
position in the data) is in the checkpoint; a run that is killed and started again
continues bit by bit as if it had not been.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training import plots, serial
from miras_jax.training.batches import train_batches
from miras_jax.training.config import Experiment
from miras_jax.training.metrics import MetricsLog, Progress
from miras_jax.training.profile import Profile
from miras_jax.training.run import Run
from miras_jax.training.step import Metrics, TrainState
from pallas_kernels.fused_scan import platform


class Result(NamedTuple):
    """How training ended."""

    step: int
    finished: bool  # False: asked to stop before the last step
    heldout_loss: float | None  # nats per token at the last evaluation


class Diverged(UserError):
    """The guard's limit was reached: updates kept being skipped."""


def train(
    experiment: Experiment,
    workdir: str | Path,
    *,
    traced: tuple[int, int] | None = None,
) -> Result:
    """Train in `workdir` until `experiment.steps`, continuing what is there.

    traced: the first and the last step to profile, into WORKDIR/profile.

    SIGTERM and SIGINT end the run after the current step with a checkpoint and a normal
    return. Raises UserError for what the user can mend, Diverged if the loss is beyond
    repair; checkpoints from before are kept.
    """
    run = Run(experiment, workdir)
    profile = Profile(run.workdir / "profile", traced)
    _claim(run)
    prepared = run.prepared
    part, parts = run.data_part
    batches = train_batches(
        prepared,
        batch_size=experiment.batch_size,
        seed=experiment.seed,
        alignment=experiment.model.alignment,
        shard_index=part,
        shard_count=parts,
        walking=run.rows_here if experiment.windows == "consecutive" else None,
    )
    with (
        contextlib.closing(batches),
        contextlib.closing(profile),
        run.checkpoints() as checkpoints,
        _stop_on_signal() as stop,
    ):
        restored = checkpoints.restore(run.abstract_state, config=run.identity)
        if restored is None:
            start, state, heldout = 0, run.initial_state(), None
        else:
            start, state, heldout = restored.step, restored.state, restored.loss
            batches.set_state(restored.data)
        with _logging(run, start) as log:
            around = batches, checkpoints, log, profile, stop
            return _loop(run, state, start, heldout, *around)


def _loop(
    run: Run,
    state: TrainState,
    start,
    heldout,
    batches,
    checkpoints,
    log,
    profile,
    stop,
) -> Result:
    experiment = run.experiment
    saved = step = start
    pending: tuple[int, Metrics] | None = None
    stopped = False

    def due(interval: int) -> bool:
        return step == experiment.steps or step % interval == 0

    def evaluate() -> float | None:
        totals = run.evaluate(
            state.parameters, windows=experiment.evaluate_windows, stop=stop.is_set
        )
        if not totals.whole:
            return None  # cut short, not comparable
        log.evaluation(step, totals.loss)
        return totals.loss

    def save(loss: float | None) -> None:
        checkpoints.save(
            step, state, data=batches.get_state(), config=run.identity, loss=loss
        )

    if start and heldout is None and due(experiment.evaluate_every):
        # The run before was stopped in this evaluation.
        heldout = evaluate()
        stopped = heldout is None
    while step < experiment.steps and not stopped:
        profile.begin(step + 1)
        tokens = run.to_devices(next(batches))
        state, metrics = run.train_step(state, tokens, run.stop_flags(stop.is_set()))
        step += 1
        profile.end(step, metrics)
        if pending is not None:
            log.step(*pending)
        pending = (step, metrics)
        if stop.is_set() or jax.process_count() > 1:
            stopped = bool(metrics.stop)

        due_to_save = due(experiment.checkpoint_every)
        due_to_evaluate = due(experiment.evaluate_every)
        if due_to_save or due_to_evaluate:
            # Only a checked state is saved, and its metrics come before its evaluation.
            log.step(*pending)
            pending = None
            loss = evaluate() if due_to_evaluate else None
            if loss is not None:
                heldout = loss
            stopped = stopped or (due_to_evaluate and loss is None)
            if due_to_save:
                save(loss)
                saved = step
    if pending is not None:
        log.step(*pending)
    if saved != step:
        save(None)
    checkpoints.wait()
    return Result(step, step >= experiment.steps, heldout)


class _Log:
    """Progress and metrics files on process 0; the guard's limit on every process."""

    def __init__(self, run: Run, start: int, metrics_log, progress):
        self._run, self._files, self._progress = run, metrics_log, progress

    def step(self, step: int, metrics: Metrics) -> None:
        values = {
            name: value.item()
            for name, value in zip(Metrics._fields, metrics, strict=True)
        }
        guard = self._run.experiment.guard
        if values["skipped_in_row"] >= guard.limit:
            raise Diverged(
                f"training diverged: {guard.limit} updates in a row were skipped up to "
                f"step {step} (loss {values['loss']:.4g}, gradient norm "
                f"{values['gradient_norm']:.4g}); the last good checkpoint is kept. "
                "Lower the learning rate or look at the data there"
            )
        if self._progress is None:
            return
        if values["skipped_in_row"]:
            self._progress.note(
                f"step {step}: loss {values['loss']:.4g}, gradient norm "
                f"{values['gradient_norm']:.4g}: update skipped"
            )
        self._progress.update(step, values["loss"])
        del values["stop"], values["skipped_in_row"]
        values["tokens_per_second"] = self._progress.tokens_per_second
        self._files.write(step, values)

    def evaluation(self, step: int, loss: float) -> None:
        if self._progress is None:
            return
        self._progress.note(f"step {step}: held-out loss {loss:.4f} nats per token")
        self._files.write_evaluation(step, {"loss": loss})
        plots.plot_losses(self._run.workdir, title=self._run.workdir.name)


@contextlib.contextmanager
def _logging(run: Run, start: int):
    if jax.process_index() != 0:
        yield _Log(run, start, None, None)
        return
    experiment = run.experiment
    per_step = experiment.batch_size * run.prepared.context_length
    with (
        MetricsLog(run.workdir, start_step=start) as files,
        contextlib.closing(
            Progress(experiment.steps, start, tokens_per_step=per_step)
        ) as progress,
    ):
        size = f"{run.model.size / 1e6:.2f} M parameters"
        where = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
        begin = f"from step {start}" if start else "from the beginning"
        packed = run.prepared.documents == "packed"
        kernels = implementations(
            experiment.model,
            run.prepared.context_length,
            packed,
            carried=experiment.windows == "consecutive",
        )
        progress.note(f"{size}, {where}, {kernels}, {begin}")
        yield _Log(run, start, files, progress)


def implementations(
    model: Model, length: int, packed: bool, carried: bool = False
) -> str:
    """What runs a model: "memories in XLA, attention in TPU kernels"."""
    names = {"tpu": "TPU kernels", "gpu": "GPU kernels"}
    parts = []
    if any(_all(Miras, model.mixers)):
        parts.append(f"memories in {names.get(platform(), 'XLA')}")
    dtype = jnp.dtype(model.compute_dtype)
    found = {
        names.get(
            layer.implementation(model.width, length, dtype, packed, carried), "XLA"
        )
        for layer in _all(Attention, model.mixers)
    }
    if found:
        parts.append(f"attention in {' and '.join(sorted(found))}")
    return ", ".join(parts)


def _all(kind: type, choice) -> Iterator:
    """The choices of a kind inside of mixers, whatever they are made of."""
    if isinstance(choice, kind):
        yield choice
    elif isinstance(choice, tuple):
        for part in choice:
            yield from _all(kind, part)
    elif is_dataclass(choice):
        for field in fields(choice):
            yield from _all(kind, getattr(choice, field.name))


def _claim(run: Run) -> None:
    """Write config.json, or check that the run there is of the same model."""
    try:
        run.workdir.mkdir(parents=True, exist_ok=True)
        if not os.access(run.workdir, os.W_OK):
            raise PermissionError("permission denied")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"workdir {run.workdir} cannot be written ({reason}); "
            "give another --workdir"
        ) from error
    if jax.process_index() != 0:
        return
    path = run.workdir / "config.json"
    if path.is_file() and run.checkpoints(read_only=True).steps():
        there = serial.with_new_fields(json.loads(path.read_text()))
        ours = serial.to_json(run.experiment)
        parts = [
            {"model": of["model"], "tokenizer": of["data"]["tokenizer"]}
            for of in (there, ours)
        ]
        if difference := serial.first_difference(*parts):
            raise UserError(
                f"{run.workdir} holds a run of another model or tokenizer: "
                f"{difference}; give another --workdir, or continue it with its own "
                "experiment file"
            )
    run.check_rows()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(serial.to_json(run.experiment), indent=1))
    temporary.replace(path)


@contextlib.contextmanager
def _stop_on_signal():
    """An event that SIGTERM or SIGINT sets; the handlers are put back afterwards."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, _):
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        name = signal.Signals(number).name
        # Not print: a signal may arrive in the middle of one, which may not be entered
        # a second time.
        os.write(2, f"\n{name}: saving after the current step\n".encode())

    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
