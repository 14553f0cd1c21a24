"""A trained model as one file, to share it or to read it elsewhere.

A safetensors file: the parameters by their names, float32, beside what makes a model of
them. Layers are stacked: an axis "layers" runs over the repetitions of a group of
blocks. Any reader of safetensors opens it; its metadata are

miras_jax   the version that wrote it
model       the `Model` as JSON (`training.serial`)
axes        of every parameter the names of its axes, as JSON
tokenizer   the tokenizer as JSON, which `tokenizers` reads if it is a BPE
step        of the training

An axis is "layers", one of `training.sharding.RULES`, or null.
The optimizer's state and the place in the data stay in the run's own checkpoints.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

import miras_jax
from miras_jax.errors import UserError
from miras_jax.nn.functional import FunctionalModel, Parameters
from miras_jax.nn.model import Model
from miras_jax.training import serial, tokenizer
from miras_jax.training.checkpoint import Restored
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import Tokenizer

SUFFIX = ".safetensors"


class Trained(NamedTuple):
    """A model to read and write text with."""

    model: FunctionalModel
    parameters: Parameters
    tokenizer: Tokenizer
    step: int


def of_run(run: Run, restored: Restored) -> Trained:
    """The model of a run at a checkpoint, on this process's first device.

    One device decodes without waiting for the others, which all hold a copy.
    """
    local = jax.tree.map(lambda x: x.addressable_data(0), restored.state.parameters)
    return Trained(run.model, local, run.tokenizer, restored.step)


def of_path(path: str | Path) -> Trained:
    """What `save` wrote, by its suffix, or else the best of a run's folder."""
    if Path(path).suffix == SUFFIX:
        return load(path)
    run = Run.open(path)
    return of_run(run, run.restore("best"))


def save(trained: Trained, path: str | Path) -> None:
    """Write a new file, whole or not at all. UserError: the path is taken or wrong."""
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path} must end in {SUFFIX}: what reads it goes by that")
    if path.exists():
        raise UserError(f"{path} exists; remove it first or give another name")
    metadata = {
        "miras_jax": miras_jax.__version__,
        "model": json.dumps(serial.to_json(trained.model.config)),
        "axes": json.dumps(_named_axes(trained.model)),
        "tokenizer": trained.tokenizer.to_json(),
        "step": str(trained.step),
    }
    arrays = {
        name: np.ascontiguousarray(array) for name, array in trained.parameters.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(arrays, part, metadata)
        part.rename(path)
    except SafetensorError as error:  # the library's form of what the system says
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def _named_axes(model: FunctionalModel) -> dict[str, list[str | None]]:
    """Of every parameter; a model names the last axes, before which layers stack."""
    return {
        name: ["layers"] * (len(shape.shape) - len(model.axes[name]))
        + [*model.axes[name]]
        for name, shape in model.shapes.items()
    }


def load(path: str | Path) -> Trained:
    """Read what `save` wrote. Only from those one trusts: it names what is imported.

    UserError: there is no such file, it is cut off, of something else, or of a model
    whose parameters this version shapes differently.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is no file; miras export WORKDIR writes one")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        arrays = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}; export it again") from error
    if "miras_jax" not in metadata:
        raise UserError(
            f"{path} was not written by miras export: it holds parameters, but no "
            "miras_jax model of them"
        )
    try:
        config = serial.from_json(json.loads(metadata["model"]))
        if not isinstance(config, Model):
            raise UserError(f"it is the {type(config).__name__} {config}")
        words = tokenizer.from_json(metadata["tokenizer"], "its tokenizer")
        step = int(metadata["step"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} has no readable model in it: {error}") from error
    model = FunctionalModel(config, words.vocab_size)
    expected = {name: [*shape.shape] for name, shape in model.shapes.items()}
    found = {name: [*array.shape] for name, array in arrays.items()}
    if difference := serial.first_difference(found, expected):
        raise UserError(
            f"{path} does not fit the model that it describes: {difference}; read it "
            f"with miras_jax {metadata['miras_jax']}, this is {miras_jax.__version__}"
        )
    parameters = {
        name: jax.numpy.asarray(arrays[name], shape.dtype)
        for name, shape in model.shapes.items()
    }
    return Trained(model, parameters, words, step)
