"""A run: an experiment, its folder, and everything built from the two.

WORKDIR/config.json     the experiment
WORKDIR/data/           tokens and tokenizer
WORKDIR/checkpoints/    states, with their checksums
WORKDIR/metrics.csv     and evaluations.csv, tensorboard/, loss.png
"""

import dataclasses
import hashlib
import json
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from miras_jax import compiler
from miras_jax.errors import UserError
from miras_jax.nn.functional import FunctionalModel
from miras_jax.training import serial, sharding, step
from miras_jax.training.batches import heldout_batches
from miras_jax.training.checkpoint import Checkpoints, Restored
from miras_jax.training.config import Experiment, Mesh
from miras_jax.training.data import Prepared
from miras_jax.training.prepare import load, prepare
from miras_jax.training.step import TrainState, Walk
from miras_jax.training.tokenizer import Tokenizer


class Totals(NamedTuple):
    """Held-out sums per position in the window, over all windows.

    Where windows are consecutive, per position in all that a row reads.
    """

    losses: np.ndarray  # [L], nats
    counts: np.ndarray  # [L], tokens
    whole: bool = True  # False: some process was asked to stop before the last window

    @property
    def loss(self) -> float:
        """Nats per token."""
        return float(self.losses.sum() / self.counts.sum())


class Run:
    """Builds, lazily, what training, evaluation and generation need of one run."""

    def __init__(self, experiment: Experiment, workdir: str | Path):
        self.experiment = experiment
        self.workdir = Path(workdir)

    @classmethod
    def open(cls, workdir: str | Path) -> "Run":
        """The run that was trained in `workdir`; UserError if there is none."""
        path = Path(workdir) / "config.json"
        if not path.is_file():
            raise UserError(
                f"{workdir} holds no run (no config.json); train one there first: "
                f"miras train FILE --workdir {workdir}"
            )
        try:
            experiment = serial.from_json(json.loads(path.read_text()))
            if not isinstance(experiment, Experiment):
                raise UserError("it describes no experiment")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        # Reading a run needs no particular mesh: use the devices that are here.
        run = cls(dataclasses.replace(experiment, mesh=Mesh()), workdir)
        # What it was trained on, whatever has become of the texts since.
        run.prepared = load(run.workdir / "data")
        return run

    @cached_property
    def prepared(self) -> Prepared:
        return prepare(self.experiment.data, self.workdir / "data")

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prepared.tokenizer

    @cached_property
    def model(self) -> FunctionalModel:
        return FunctionalModel(self.experiment.model, self.tokenizer.vocab_size)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return sharding.make_mesh(self.experiment.mesh)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return self.experiment.optimizer.transformation(self.experiment.steps)

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, sharding.BATCH)

    @cached_property
    def data_part(self) -> tuple[int, int]:
        """Which part of every batch this process reads, of how many."""
        return sharding.data_part(self.mesh.devices, jax.process_index())

    @property
    def row_parts(self) -> int:
        """In how many parts the mesh splits a batch."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def check_rows(self) -> None:
        """UserError if mesh and accumulation do not divide the rows of a batch."""
        parts = self.experiment.accumulation
        if self.experiment.batch_size % (self.row_parts * parts):
            raise UserError(
                f"batch_size={self.experiment.batch_size} cannot be split over "
                f"{self.row_parts} devices along data and fsdp"
                + (f" in {parts} parts each" if parts > 1 else "")
                + f"; use a multiple of {self.row_parts * parts}"
            )

    @cached_property
    def rows_here(self) -> np.ndarray:
        """The rows of a batch that lie on devices of this process, in order."""
        shape = (self.experiment.batch_size,)
        held = self.batch_sharding.addressable_devices_indices_map(shape).values()
        return np.unique(np.concatenate([np.arange(*shape)[rows] for rows in held]))

    @cached_property
    def walk(self) -> Walk | None:
        """Of consecutive windows."""
        if self.experiment.windows == "shuffled":
            return None
        return Walk(self.experiment.batch_size, self.experiment.data.context_length)

    @cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, P())

    @cached_property
    def carry_sharding(self) -> NamedSharding:
        """Rows as in a batch; they are the second axis of every leaf."""
        return NamedSharding(self.mesh, P(None, *sharding.BATCH))

    @cached_property
    def parameter_shardings(self) -> dict[str, NamedSharding]:
        return {
            name: sharding.parameter_sharding(
                self.mesh, name, self.model.axes[name], shape.shape
            )
            for name, shape in self.model.shapes.items()
        }

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""
        init = partial(step.init_state, self.model, self.optimizer, self.walk)
        shapes = jax.eval_shape(init, jax.random.key(0))
        everywhere = jax.tree.map(lambda _: self.replicated, shapes)
        moments = jax.tree.map_with_path(self._moment_sharding, shapes.optimizer)
        # A run that was trained elsewhere may have rows that these devices do not
        # divide; whoever reads it has no use for where they were left.
        whole = self.experiment.batch_size % self.row_parts
        split = self.replicated if whole else self.carry_sharding
        shardings = everywhere._replace(
            parameters=self.parameter_shardings,
            optimizer=moments,
            carry=jax.tree.map(lambda _: split, shapes.carry),
        )
        return jax.tree.map(
            lambda s, split: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=split),
            shapes,
            shardings,
        )

    def _moment_sharding(self, path, moment: jax.ShapeDtypeStruct) -> NamedSharding:
        """As the parameter that a part of the optimizer's state is of, if any."""
        for name in (getattr(key, "key", None) for key in path):
            parameter = self.model.shapes.get(name)
            if parameter is not None and parameter.shape == moment.shape:
                return self.parameter_shardings[name]
        return self.replicated

    @cached_property
    def state_shardings(self) -> TrainState:
        return jax.tree.map(lambda s: s.sharding, self.abstract_state)

    def initial_state(self) -> TrainState:
        """A fresh state, made in place on the mesh; the same on every mesh."""
        init = partial(step.init_state, self.model, self.optimizer, self.walk)
        key = jax.random.key(self.experiment.seed)
        return jax.jit(init, out_shardings=self.state_shardings)(key)

    @property
    def identity(self) -> dict:
        """What a checkpoint must agree with to be of this model and vocabulary."""
        vocabulary = (self.workdir / "data" / "tokenizer.json").read_bytes()
        return {
            "model": serial.to_json(self.experiment.model),
            "tokenizer": serial.to_json(self.experiment.data.tokenizer),
            "vocabulary sha256": hashlib.sha256(vocabulary).hexdigest(),
        }

    def checkpoints(self, *, read_only: bool = False) -> Checkpoints:
        return Checkpoints(self.workdir / "checkpoints", read_only=read_only)

    def restore(self, which: str = "best") -> Restored:
        """The best or last checkpoint; UserError if there is none."""
        with self.checkpoints(read_only=True) as checkpoints:
            restore = (
                checkpoints.restore_best if which == "best" else checkpoints.restore
            )
            restored = restore(self.abstract_state, config=self.identity)
            if restored is None and which == "best":
                restored = checkpoints.restore(
                    self.abstract_state, config=self.identity
                )
        if restored is None:
            raise UserError(
                f"{self.workdir} holds no checkpoint yet; let miras train run until it "
                "has saved one"
            )
        return restored

    def to_devices(self, rows: np.ndarray) -> jax.Array:
        """This process's rows of a batch as a global array split over the mesh."""
        _, parts = self.data_part
        shape = (rows.shape[0] * parts, *rows.shape[1:])
        return jax.make_array_from_process_local_data(self.batch_sharding, rows, shape)

    @cached_property
    def flag_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, P(self.mesh.axis_names))

    def stop_flags(self, requested: bool) -> jax.Array:
        """`[devices]`: each process's own wish to stop, at its own devices.

        Summed inside a jitted step, so that all processes learn of it at the same step.
        """
        local = np.full(jax.local_device_count(), requested, np.int32)
        return jax.make_array_from_process_local_data(
            self.flag_sharding, local, (jax.device_count(),)
        )

    @cached_property
    def train_step(self):
        """Jitted: (state, tokens, stop) -> (state, metrics); the state is donated."""
        experiment = self.experiment
        function = partial(
            step.train_step,
            self.model,
            self.optimizer,
            experiment.optimizer.schedule(experiment.steps),
            experiment.guard,
            self.walk,
            experiment.accumulation,
        )
        return jax.jit(
            sharding.on_mesh(self.mesh, function),
            compiler_options=compiler.options(),
            donate_argnums=0,
            in_shardings=(
                self.state_shardings,
                self.batch_sharding,
                self.flag_sharding,
            ),
            out_shardings=(self.state_shardings, self.replicated),
        )

    @cached_property
    def evaluate_step(self):
        """Jitted: (parameters, carry, tokens, weights, stop) -> sums and carry."""
        batch, carry = self.batch_sharding, self.carry_sharding
        function = partial(step.evaluate_step, self.model)
        return jax.jit(
            sharding.on_mesh(self.mesh, function),
            compiler_options=compiler.options(),
            donate_argnums=1,
            in_shardings=(
                self.parameter_shardings,
                carry,
                batch,
                batch,
                self.flag_sharding,
            ),
            out_shardings=(self.replicated, self.replicated, self.replicated, carry),
        )

    @cached_property
    def evaluation_rows(self) -> int:
        """Of a batch: as many as training reads at a time.

        A run that was trained elsewhere may have some that these devices do not divide;
        evaluation does not depend on it.
        """
        rows = -(-self.experiment.batch_size // self.experiment.accumulation)
        return -(-rows // self.row_parts) * self.row_parts

    @cached_property
    def evaluation_start(self):
        """Jitted: parameters -> the state from which consecutive windows are read."""
        walk = Walk(self.evaluation_rows, self.experiment.data.context_length)
        start = partial(step.start_carry, self.model, walk)
        return jax.jit(start, out_shardings=self.carry_sharding)

    def evaluate(
        self,
        parameters,
        *,
        windows: int | None = None,
        consecutive: bool | None = None,
        stop=None,
    ) -> Totals:
        """Held-out loss by position; `stop()` is asked before every batch.

        Every token is predicted once, from at most `context_length` tokens before it,
        or, if windows are consecutive (None: as in training), from all that its row has
        read. What was summed until then, if any process was asked to stop.
        """
        experiment = self.experiment
        if consecutive is not None:
            order = "consecutive" if consecutive else "shuffled"
            experiment = dataclasses.replace(experiment, windows=order)
        consecutive = experiment.windows == "consecutive"
        part, parts = self.data_part
        batches = heldout_batches(
            self.prepared,
            self.evaluation_rows,
            alignment=experiment.model.alignment,
            shard_index=part,
            shard_count=parts,
            limit=windows,
            consecutive=consecutive,
        )
        carry = self.evaluation_start(parameters) if consecutive else None
        losses, counts, stopped = [], [], False
        for tokens, weights in batches:
            flags = self.stop_flags(bool(stop and stop()))
            batch = self.to_devices(tokens), self.to_devices(weights)
            loss, count, stopped, carry = self.evaluate_step(
                parameters, carry, *batch, flags
            )
            losses.append(np.asarray(loss, np.float64))
            counts.append(np.asarray(count, np.float64))
            if stopped:
                break
        join = np.concatenate if consecutive else sum
        return Totals(join(losses), join(counts), whole=not stopped)
