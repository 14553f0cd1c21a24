"""What an experiment is: frozen dataclasses of real objects, in a Python file.

An experiment file defines `experiment() -> Experiment`; its docstring says what to
expect. Variations are `dataclasses.replace`, sweeps list comprehensions; a file of
several experiments defines `experiment(name)`, and FILE:NAME is one of them.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from miras_jax.core.types import Choice
from miras_jax.errors import UserError
from miras_jax.nn.model import Model
from miras_jax.training.data import TextFiles
from miras_jax.training.optimizer import AdamW, Optimizer


@dataclass(frozen=True, repr=False)
class Guard(Choice):
    """Against a NaN or a spike: the update is skipped, and after `limit` in a row the
    run stops. A spike is a loss above `spike` times its running mean, or a gradient
    whose norm is above `norm`: that of a memory that has become chaotic."""

    spike: float = 2.0
    norm: float = 1e6
    limit: int = 10


@dataclass(frozen=True, repr=False)
class Mesh(Choice):
    """Devices along the axes data, fsdp and model; -1 takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    model: int = 1


@dataclass(frozen=True, repr=False)
class Experiment(Choice):
    """All that a run depends on. Intervals are in steps; batch_size is in sequences.

    windows: "shuffled" reads each from the model's start, in any order; "consecutive"
    lets each row of the batch walk through the text from window to window and carries
    the model's state along: backpropagation through time, truncated at the window's
    edge (docs/sequences.md).

    accumulation: a batch is read in so many parts, one after another, and their
    gradients are summed: the same training in the memory of one part (gradient
    accumulation).
    """

    model: Model
    data: TextFiles
    steps: int
    batch_size: int
    optimizer: Optimizer = AdamW()
    seed: int = 0
    evaluate_every: int = 100
    evaluate_windows: int | None = None  # held-out windows per evaluation; None: all
    checkpoint_every: int = 100
    guard: Guard = Guard()
    mesh: Mesh = Mesh()
    windows: Literal["shuffled", "consecutive"] = "shuffled"
    accumulation: int = 1

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "evaluate_every",
            "checkpoint_every",
            "accumulation",
        ):
            if getattr(self, name) < 1:
                raise UserError(
                    f"Experiment.{name} must be at least 1; got {getattr(self, name)}"
                )
        if self.windows not in ("shuffled", "consecutive"):
            raise UserError(
                "Experiment.windows is 'shuffled' or 'consecutive'; got "
                f"{self.windows!r}"
            )
        if self.data.shares and self.windows == "consecutive":
            raise UserError(
                "TextFiles.shares mixes shuffled windows, and consecutive ones follow "
                "the text; leave shares out, or use windows='shuffled'"
            )
        alignment, length = self.model.alignment, self.data.context_length
        packed = self.data.documents == "packed"
        if length % alignment and (packed or self.windows == "consecutive"):
            raise UserError(
                f"{'Packed documents' if packed else 'Consecutive windows'} begin at "
                f"multiples of {alignment} tokens, as the mixers' chunks do; "
                f"context_length={length} is none. Use "
                f"{-(-length // alignment) * alignment}, or documents='joined' and "
                "windows='shuffled'"
            )


def split_name(path: str | Path) -> tuple[Path, str | None]:
    """FILE and NAME of FILE:NAME; None where no name is given."""
    file, colon, name = str(path).rpartition(":")
    if not colon or Path(path).exists():
        return Path(path), None
    return Path(file), name


def load_experiment(path: str | Path) -> Experiment:
    """What `experiment()` of the Python file FILE returns, or `experiment(NAME)` for
    FILE:NAME; UserError if the file is no such thing."""
    path, name = split_name(path)
    if not path.is_file():
        raise UserError(f"{path} is no file; give the path of an experiment file")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or path.suffix != ".py":
        raise UserError(f"{path} is no Python file; an experiment is a .py file")
    module = importlib.util.module_from_spec(spec)
    _let_import_neighbours(path)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "experiment", None)
        if not callable(make):
            raise UserError(
                f"{path} has no function experiment(); see experiments/quickstart.py"
            )
        given = () if name is None else (name,)
        _check_name(make, given, path)
        experiment = make(*given)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        where = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} cannot be run as an experiment: {where}") from error
    if not isinstance(experiment, Experiment):
        raise UserError(
            f"experiment() in {path} returned a {type(experiment).__name__}; it must "
            "return a miras_jax.training.config.Experiment"
        )
    return experiment


def _let_import_neighbours(path: Path) -> None:
    """The folder of the file, or of the package that it is in, among those to import
    from: the `miras` command, unlike `python -m`, does not begin in any."""
    folder = path.resolve().parent
    while (folder / "__init__.py").is_file():
        folder = folder.parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _check_name(make: Callable, given: tuple[str, ...], path: Path) -> None:
    try:
        inspect.signature(make).bind(*given)
    except TypeError:
        if given:
            reason = f"is one experiment; leave :{given[0]} out"
        else:
            reason = f"holds several experiments; name one of them, as {path}:NAME"
        raise UserError(f"{path} {reason}") from None
