"""Rows of a table that survive an interruption: measured once, kept in a file."""

import argparse
import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import jax
import numpy as np

from experiments.compare import table
from miras_jax.training.metrics import read_table


class Rows:
    """What was measured, by name, one JSON object per line of a file.

    A row counts as measured only for the same `of`, a description of what was measured:
    whatever changes there is measured again.
    """

    def __init__(self, path: Path):
        self.path = path
        self._rows = {}
        if path.is_file():
            *lines, rest = path.read_text().split("\n")
            if rest:  # half a line, which an interrupted write has left
                path.write_text("".join(f"{line}\n" for line in lines))
            self._rows = {row["name"]: row for row in map(json.loads, lines)}

    def measure(self, name: str, of: str, measure: Callable[[], dict]) -> dict:
        """The row of this name, measured now unless the file holds it."""
        row = self._rows.get(name)
        if row is None or row["of"] != of:
            row = {"name": name, "of": of, "measured": measure()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            self._rows[name] = row
        return row["measured"]


def report(lines: list[dict], arguments: argparse.Namespace) -> None:
    """Print the table; that of all rows is kept, too."""
    print(f"\n{table(lines)}")
    if not arguments.names:
        arguments.results.mkdir(parents=True, exist_ok=True)
        (arguments.results / "table.md").write_text(table(lines) + "\n")


def tabulate(
    arguments: argparse.Namespace,
    known: Collection[str],
    of: Callable[[str, int], str],
    measure: Callable[[str, int, int, Path], dict],
    line: Callable[[str, list[dict]], dict],
) -> dict[str, list[dict]]:
    """Measure the rows that are asked for, or all known ones, and report them.

    of: describes what is measured of a name and a seed; measure: makes it of a name, a
    seed, a number of steps and a folder; line: what the table says of a name's seeds.
    Returns what was measured, seed by seed.
    """
    kept = Rows(arguments.folder / "rows.jsonl")
    rows = {}
    for name in arguments.names or known:
        rows[name] = []
        for seed in range(arguments.seeds):
            label = f"{name}-{seed}-{arguments.steps}"
            print(f"\n{label}", flush=True)
            workdir = arguments.folder / label
            measured = partial(measure, name, seed, arguments.steps, workdir)
            rows[name].append(kept.measure(label, of(name, seed), measured))
        # One process compiles every model: let go of what the last one left.
        jax.clear_caches()
    report([line(name, seeds) for name, seeds in rows.items()], arguments)
    return rows


def spread(values: list[float], digits: int) -> str:
    """Mean, smallest and largest of what was measured; "-" of nothing."""
    if not values:
        return "-"
    mean, low, high = (
        f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values))
    )
    return f"{mean} ({low} to {high})"


def largest(values: list[float | None]) -> str:
    """The largest of them; None is one that was not finite."""
    return "not finite" if None in values else f"{max(values):.2g}"


def largest_norm(workdir: Path, after: int) -> float | None:
    """Largest gradient norm of a run after so many steps; None: one was not finite."""
    norms = np.asarray(read_table(workdir / "metrics.csv")["gradient_norm"])[after:]
    return float(norms.max()) if np.all(np.isfinite(norms)) else None
