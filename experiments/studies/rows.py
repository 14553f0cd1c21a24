"""Rows of a table that survive an interruption: measured once, kept in a file."""

import argparse
import json
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

import jax

from experiments.compare import table


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
    of: Callable[[str], str],
    measure: Callable[[str, int, Path], dict],
    line: Callable[[str, dict], dict],
) -> None:
    """Measure the rows that are asked for, or all known ones, and report them.

    of: describes what is measured of a name; measure: makes it of a name, a number of
    steps and a folder; line: what the table says of it.
    """
    kept = Rows(arguments.folder / "rows.jsonl")
    lines = []
    for name in arguments.names or known:
        print(f"\n{name}", flush=True)
        label = f"{name}-{arguments.steps}"
        workdir = arguments.folder / label
        measured = partial(measure, name, arguments.steps, workdir)
        lines.append(line(name, kept.measure(label, of(name), measured)))
        # One process compiles every model: let go of what the last one left.
        jax.clear_caches()
    report(lines, arguments)
