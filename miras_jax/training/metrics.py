"""What a training run says about itself: its log on disk and its progress display.

`MetricsLog` keeps the numbers (CSV and TensorBoard), `Progress` shows the latest
ones to whoever is watching. In a run of several processes the first one has them.
"""

import os
import sys
from collections import deque
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from time import perf_counter
from typing import Self, TextIO

import numpy as np
from tqdm import tqdm

from miras_jax.errors import UserError

TRAIN_TABLE = "metrics.csv"
HELDOUT_TABLE = "evaluations.csv"
TENSORBOARD_DIRECTORY = "tensorboard"


class MetricsLog:
    """The metrics of one run, in `workdir`: two CSV tables and TensorBoard events.

    `metrics.csv` has a row per logged training step, `evaluations.csv` a row per
    evaluation on held-out text; the first row written to a table fixes its columns.
    Every row is on its way to the disk when `write` returns. TensorBoard shows the
    same numbers as `train/<name>` and `heldout/<name>`.

    `start_step` is the step of the checkpoint that the run resumes from, 0 when it
    starts afresh. Rows beyond it were written by a run that was stopped before its
    next checkpoint; they are dropped, so that a run which was stopped and resumed
    leaves the same tables as one that was not. At 0 nothing is kept.
    """

    def __init__(self, workdir: str | os.PathLike, *, start_step: int):
        from tensorboardX import SummaryWriter  # slow to import, and only needed here

        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._train = _Table(workdir / TRAIN_TABLE, start_step)
        self._heldout = _Table(workdir / HELDOUT_TABLE, start_step)
        # Event files are named by the second: the suffix keeps a run that is resumed
        # within that second from overwriting the file of the run before.
        self._tensorboard = SummaryWriter(
            str(workdir / TENSORBOARD_DIRECTORY),
            purge_step=start_step + 1 if start_step else 0,
            flush_secs=10,
            filename_suffix=f".{start_step}",
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the training metrics of `step`.

        A step that the table already has is left as it is, so that work repeated
        after a resume is not logged twice. Raises `UserError` if the names differ
        from the columns of the table.
        """
        if self._train.append(step, values):
            self._to_tensorboard("train", step, values)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Log the held-out metrics measured after `step`; otherwise as `write`."""
        if self._heldout.append(step, values):
            self._to_tensorboard("heldout", step, values)

    def _to_tensorboard(
        self, group: str, step: int, values: Mapping[str, float]
    ) -> None:
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{group}/{name}", float(value), step)

    def close(self) -> None:
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class _Table:
    """A CSV table with one row per step, in increasing order."""

    def __init__(self, path: Path, start_step: int):
        self._path = path
        self._columns, self._last_step = _rewind(path, start_step)

    def append(self, step: int, values: Mapping[str, float]) -> bool:
        """Add a row; False if the table has this step already."""
        if step <= self._last_step:
            return False
        columns = ["step", *values]
        cells = [str(step), *map(_cell, values.values())]
        text = ",".join(cells) + "\n"
        if not self._columns:
            self._columns = columns
            text = ",".join(columns) + "\n" + text
        elif columns != self._columns:
            raise UserError(
                f"{self._path} has the columns {', '.join(self._columns)}, but this "
                f"run logs {', '.join(columns)}: use a new working directory"
            )
        # Opened for each row: the row is handed to the system in one piece, and there
        # is nothing that a killed run would have had to close.
        with self._path.open("a", newline="") as file:
            file.write(text)
        self._last_step = step
        return True


def _cell(value: float) -> str:
    # Nine digits are exact for float32; counts stay whole numbers.
    return str(value) if isinstance(value, Integral) else f"{float(value):.9g}"


def _complete_lines(path: Path) -> list[str]:
    """The lines of `path` that end in a newline; a killed run may leave half a line."""
    return path.read_text().split("\n")[:-1]


def _rewind(path: Path, start_step: int) -> tuple[list[str], int]:
    """Drop the rows beyond `start_step`; return the columns and the last step left."""
    if not path.exists():
        return [], -1
    header, *rows = _complete_lines(path) or [""]
    kept = [row for row in rows if start_step and _step(path, row) <= start_step]
    if not kept:
        path.unlink()
        return [], -1
    # Renamed over the old table, so that there is a whole one at every moment.
    rewound = path.with_name(path.name + ".new")
    with rewound.open("w", newline="") as file:
        file.write("\n".join([header, *kept, ""]))
        file.flush()
        os.fsync(file.fileno())
    rewound.replace(path)
    return header.split(","), _step(path, kept[-1])


def _step(path: Path, row: str) -> int:
    step = row.split(",")[0]
    if not step.isdecimal():
        raise UserError(
            f"{path} has a row that does not begin with a step ({row[:40]!r}): "
            "remove that row or use a new working directory"
        )
    return int(step)


def read_table(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The columns of a table that `MetricsLog` wrote, as float64 arrays by name.

    The run may still be writing it. Raises `UserError` if the table is missing, has
    no row yet, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the directory of a training run")
    header, *rows = _complete_lines(path) or [""]
    if not rows:
        raise UserError(f"{path} has no rows: let the run reach its first logged step")
    columns = header.split(",")
    try:
        values = np.array([row.split(",") for row in rows], dtype=np.float64)
        return dict(zip(columns, values.T, strict=True))
    except ValueError as error:
        raise UserError(
            f"{path} is not a table of numbers under {header[:60]!r}: "
            "remove the damaged rows"
        ) from error


class Progress:
    """Shows how far a run is: a bar on a terminal, otherwise a line now and then.

    Speed and time left follow the last `WINDOW` seconds; the first update, which
    pays for compilation, never counts. `stream` is standard error by default.
    """

    WINDOW = 30.0
    SECONDS_BETWEEN_LINES = 10.0

    def __init__(
        self,
        total_steps: int,
        start_step: int,
        *,
        tokens_per_step: int,
        stream: TextIO | None = None,
    ):
        self._total_steps = total_steps
        self._tokens_per_step = tokens_per_step
        self._stream = stream or sys.stderr
        self._started = perf_counter()
        self._recent: deque[tuple[int, float]] = deque()  # step, when it was done
        self._status = ""
        self._shown: tuple[int, float] | None = None  # the last plain line
        self._bar = None
        if _takes_a_bar(self._stream):
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                miniters=1,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )

    @property
    def tokens_per_second(self) -> float:
        """The recent speed; nan until two updates were seen."""
        if len(self._recent) < 2:
            return float("nan")
        (step, since), (last_step, now) = self._recent[0], self._recent[-1]
        return (last_step - step) * self._tokens_per_step / max(now - since, 1e-9)

    def update(self, step: int, loss: float) -> None:
        """Tell that `step` steps are done and what the loss was."""
        now = perf_counter()
        self._recent.append((step, now))
        while len(self._recent) > 2 and now - self._recent[1][1] >= self.WINDOW:
            self._recent.popleft()
        self._status = self._describe(step, float(loss), now)
        if self._bar is not None:
            self._bar.set_description_str(self._status, refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._is_due(step, now):
            self._print_status()

    def _describe(self, step: int, loss: float, now: float) -> str:
        parts = [f"step {step}/{self._total_steps}", f"loss {loss:.4f}"]
        speed = self.tokens_per_second
        if speed > 0:
            parts.append(f"{speed:,.0f} tokens/s")
            if step < self._total_steps:
                left = (self._total_steps - step) * self._tokens_per_step / speed
                parts.append(f"{format_duration(left)} left")
        if step >= self._total_steps:
            parts.append(f"done in {format_duration(now - self._started)}")
        return ", ".join(parts)

    def _is_due(self, step: int, now: float) -> bool:
        if self._shown is None or step >= self._total_steps:
            return True
        shown_step, shown_at = self._shown
        tenths = [10 * done // self._total_steps for done in (shown_step, step)]
        return now - shown_at >= self.SECONDS_BETWEEN_LINES or tenths[0] < tenths[1]

    def _print_status(self) -> None:
        self._shown = self._recent[-1]
        print(self._status, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state on show."""
        if self._bar is not None:
            self._bar.close()
        elif self._recent and self._shown != self._recent[-1]:
            self._print_status()


def _takes_a_bar(stream: TextIO) -> bool:
    if not stream.isatty():
        return False
    try:
        # Remote and container shells may not tell their size; a bar would not show.
        return os.get_terminal_size(stream.fileno()).lines > 0
    except OSError:  # a terminal by its own word, without a descriptor
        return True


def format_duration(seconds: float) -> str:
    """`65` as 1:05, `3725` as 1:02:05."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{minutes}:{seconds:02d}"
