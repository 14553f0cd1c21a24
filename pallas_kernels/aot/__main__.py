"""`python -m pallas_kernels.aot tpu|gpu`: a table of what kernels compile to.

`gpu.py` tells what the columns for GPUs are. For TPUs, for every variant and pass, per
token and element (head of a sequence):

bundles     scheduled bundles of the kernels; each takes about a cycle
limit       the unit of the chip that is used most in the longest kernel, and how much
spills      registers that did not fit, stored in all kernels
VMEM MiB    the blocks that the larger kernel keeps on chip
matrix      cycles that the matrix units need at least for the kernels' products
memory      cycles that the memory needs at least for the kernels' operands and results
x matrix    bundles over that
XLA         XLA's own estimate of the same function without kernels, in cycles
x kernel    that over the bundles

Facts of compiled programs: nothing here was measured on a chip.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from pallas_kernels.aot import case as cases
from pallas_kernels.aot import hlo


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a variant does not compile."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot")
    parser.add_argument("platform", choices=("tpu", "gpu"))
    parser.add_argument("--chip", help="v5e, v5p, v6e, tpu7x, h100 or a100")
    parser.add_argument(
        "--cases",
        default="experiments.kernels.cases",
        help="module whose cases(variants, d, chunk) are compiled",
    )
    parser.add_argument("--variant", nargs="+", default=["all"])
    parser.add_argument(
        "--passes", nargs="+", choices=("forward", "both"), default=["forward", "both"]
    )
    parser.add_argument(
        "--into", help="a file that rows are added to, but those that it ends with"
    )
    parser.add_argument("--d", type=int, default=64, help="key and value channels")
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--no-xla", action="store_true", help="the kernels alone")
    parser.add_argument(
        "--xla", action="store_true", help="XLA's estimates alone, as JSON"
    )
    options = parser.parse_args(arguments)
    made = import_module(options.cases).cases
    found = [
        case
        for case in made(options.variant, options.d, options.chunk)
        if case.name.split()[-1] in options.passes
    ]
    if options.platform == "gpu":
        from pallas_kernels.aot import gpu

        # That of both passes has the forward kernel, too.
        found = [case for case in found if case.name.endswith(" both")]
        chip = options.chip or "h100"
        with (
            _into(options.into, arguments) as rows,
            tempfile.TemporaryDirectory() as dump,
        ):
            return gpu.table(_rest(found, rows), chip, dump, heading=len(rows) < 2)
    options.chip = options.chip or "v5e"
    if options.xla:
        print(json.dumps(_estimates(found, options.chip)))
        return 0
    estimates = {}
    if not options.no_xla:
        # In a process of its own: libtpu would dump what it makes of every operation.
        command = [sys.executable, "-m", "pallas_kernels.aot", *arguments, "--xla"]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        estimates = json.loads(answer.stdout.splitlines()[-1])
    with _into(options.into, arguments) as rows, tempfile.TemporaryDirectory() as dump:
        found = _rest(found, rows)
        return _table(found, options.chip, dump, estimates, heading=len(rows) < 2)


@contextlib.contextmanager
def _into(name: str | None, arguments: list[str]) -> Iterator[list[str]]:
    """Print to the end of a file; gives the rows that it ends with of this command.

    Long runs can so be cut and taken up again.
    """
    if name is None:
        yield []
        return
    path = Path(name)
    text = path.read_text() if path.exists() else ""
    command = " ".join(["$ python -m pallas_kernels.aot", *arguments])
    *_, last = text.split("\n\n")
    rows = last.splitlines()
    with path.open("a") as file, contextlib.redirect_stdout(file):
        if rows[:1] != [command]:
            rows = []
            print("\n" * bool(text) + command, flush=True)
        yield rows


def _rest(found, rows):
    """Those of the cases that have no row."""
    done = {row[: COLUMNS["variant"]].strip() for row in rows}
    return [case for case in found if case.name not in done]


def _estimates(found, chip) -> dict[str, float]:
    from pallas_kernels.aot import tpu

    estimates = {}
    for case in found:
        program = tpu.compile_for(chip, case.plain, *case.operands)
        cycles = hlo.estimated_cycles(program.as_text())
        estimates[case.name] = cycles / case.tokens
    return estimates


COLUMNS = {
    "variant": 31,
    "bundles": 8,
    "limit": 19,
    "spills": 7,
    "VMEM MiB": 9,
    "matrix": 7,
    "memory": 7,
    "x matrix": 9,
    "XLA": 6,
    "x kernel": 9,
}


def _print_row(*cells) -> None:
    name, *rest = zip(cells, COLUMNS.values(), strict=True)
    line = [f"{name[0]:<{name[1]}}", *(f"{cell:>{width}}" for cell, width in rest)]
    print("".join(line), flush=True)


def _table(found, chip, dump, estimates, heading) -> int:
    from pallas_kernels.aot import tpu

    tpu.prepare(dump)
    if heading:
        title = "per token and element; compile-time figures, not measurements"
        print(f"# {chip}, {title}")
        _print_row(*COLUMNS)
    failed = False
    for case in found:
        try:
            with tpu.target("tpu"):
                work = cases.work(case.kernel, *case.operands)
            schedules = tpu.schedules(
                dump, chip, work.loops, case.kernel, *case.operands
            )
        except Exception as error:  # whatever a compiler raises is the row's result
            failed = True
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            width = COLUMNS["variant"]
            print(f"{case.name:<{width}} does not compile: {reason}", flush=True)
            continue
        bundles = sum(s.bundles * work.steps[s.kernel] for s in schedules) / case.tokens
        longest = max(schedules, key=lambda s: s.bundles)
        floor = tpu.floor(chip, work)
        matrix, memory = (c / case.tokens if c else None for c in floor)
        xla = estimates.get(case.name)
        _print_row(
            case.name,
            f"{bundles:.1f}",
            f"{longest.limit} {longest.use[longest.limit]:.2f}",
            sum(s.spills for s in schedules),
            f"{work.blocks / 2**20:.1f}",
            f"{matrix:.1f}" if matrix else "-",
            f"{memory:.1f}" if memory else "-",
            f"{bundles / matrix:.1f}" if matrix else "-",
            f"{xla:.0f}" if xla else "-",
            f"{xla / bundles:.1f}" if xla else "-",
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
