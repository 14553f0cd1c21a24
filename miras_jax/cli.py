"""The command line: `miras`, and its commands that need no trained model.

Nothing slow is imported before a command runs, so that help is instant. Mistakes of the
user are one line on standard error and exit status 2; a diverged training exits with 3.
"""

import argparse
import dataclasses
import logging
import os
import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from miras_jax import benchmarks, commands
from miras_jax.errors import UserError

EXPERIMENT = "Python file with experiment(), or with experiment(NAME)"
EXIT_MISTAKE, EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 3, 130, 141


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal that lacks a character shows a question mark instead.
        sys.stdout.reconfigure(errors="replace")
    # Before a library does it in its own way.
    logging.basicConfig(format="miras: %(message)s", level=logging.WARNING)
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
        if arguments.run is None:
            parser.print_help()
            status = 0
        else:
            status = arguments.run(arguments, argv)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _complain(error, EXIT_MISTAKE)
    except BrokenPipeError:
        # The reader has left. Python flushes once more at its end: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _complain(error, EXIT_MISTAKE)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _complain(error: Exception, status: int) -> int:
    print("miras:", " ".join(str(error).split()), file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="miras", description="Miras sequence models: train, generate, evaluate."
    )
    parser.set_defaults(run=None)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name, run, about):
        sub = subparsers.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "Train an experiment, or continue it.")
    train.add_argument("file", metavar="FILE[:NAME]", help=EXPERIMENT)
    train.add_argument(
        "--workdir",
        metavar="DIR",
        help="folder of the run (runs/FILE or runs/FILE/NAME, without the .py)",
    )
    train.add_argument("--steps", type=int, metavar="N", help="instead of the file's")
    train.add_argument(
        "--seed", type=commands.seed, metavar="N", help="instead of the file's"
    )
    train.add_argument(
        "--profile",
        type=_steps,
        metavar="FIRST:LAST",
        help="trace these steps into WORKDIR/profile",
    )
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, found by jax.distributed.initialize()",
    )

    compile_for = command(
        "compile", _compile, "Compile an experiment for a TPU slice that is not here."
    )
    compile_for.add_argument("file", metavar="FILE[:NAME]", help=EXPERIMENT)
    compile_for.add_argument(
        "--slice", required=True, metavar="SLICE", help="such as v5e:16x16"
    )

    commands.add_commands(command)
    benchmarks.add_commands(command)
    variants = command(
        "variants", _variants, "List the published models and their choices."
    )
    variants.add_argument(
        "--markdown", action="store_true", help="as one table in Markdown"
    )
    return parser


def _program() -> str:
    """How to type `miras`: by the path of this call, unless the shell finds it."""
    called = sys.argv[0]
    if Path(called).name != "miras" or shutil.which("miras") == called:
        return "miras"
    return called


def _steps(text: str) -> tuple[int, int]:
    """First and last step, for argparse."""
    if not re.fullmatch(r"\d+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 10:12")
    first, last = text.split(":")
    return int(first), int(last)


def _train(arguments, argv: Sequence[str]) -> int:
    import jax

    if arguments.distributed:
        _join_processes()
    from miras_jax.training import config
    from miras_jax.training.run import Run
    from miras_jax.training.train import Diverged, train

    commands.prepare()
    experiment = config.load_experiment(arguments.file)
    given = {"steps": arguments.steps, "seed": arguments.seed}
    changes = {name: value for name, value in given.items() if value is not None}
    experiment = dataclasses.replace(experiment, **changes)
    file, name = config.split_name(arguments.file)
    workdir = arguments.workdir or Path("runs", file.stem, name or "")
    try:
        result = train(experiment, workdir, traced=arguments.profile)
    except Diverged as error:
        return _complain(error, EXIT_DIVERGED)
    speaks = jax.process_index() == 0
    if not result.finished:
        if speaks:
            print(
                f"stopped and saved at step {result.step} of {experiment.steps}; "
                f"to continue: {shlex.join([_program(), *argv])}"
            )
        return 0

    from miras_jax.evaluation import report

    if speaks:
        print("measuring on all of the held-out text", file=sys.stderr, flush=True)
    run = Run.open(workdir)
    # Every process takes part in the measurement, one tells of it.
    text = report.summary(run, run.restore("best"), _program())
    if speaks:
        print(f"\n{text}")
    return 0


def _compile(arguments, argv: Sequence[str]) -> int:
    # What is compiled for is not here; what is here may belong to others.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from miras_jax.training import ahead, config

    experiment = config.load_experiment(arguments.file)
    compiled = ahead.compile_step(experiment, arguments.slice)
    print(ahead.report(experiment, arguments.slice, compiled))
    return 0


def _variants(arguments, argv: Sequence[str]) -> int:
    from miras_jax.core import table, variants

    if arguments.markdown:
        print(table.markdown(variants.ALL, variants.CHANNELWISE))
        return 0
    print(
        "Models for Miras(variants.NAME()) in an experiment file.\n"
        "chunk: tokens whose gradients are taken at the same weights, and how tokens "
        "inside are read\n"
        f"state: numbers that a head of dimension {table.HEAD_DIM} carries while it "
        "decodes\n"
    )
    print(f"{'':24}  {'chunk':>13}    state  memory, bias, retention, algorithm")
    for make in variants.ALL:
        rule = make()
        row = table.row(rule, variants.CHANNELWISE.get(make, ()))
        axes = (rule.memory, rule.bias, rule.retention, rule.algorithm)
        choices = ", ".join(map(table.brief, axes))
        print(f"{make.__name__:24}  {row.chunk:>13}  {row.state:>7}  {choices}")
        indent = " " * 4
        print(f"{indent}{row.write}")
        text = " ".join(make.__doc__.split())
        print(textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=indent))
    return 0


def _join_processes() -> None:
    import jax

    # Its handler of SIGTERM would take the place of the one that saves.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"--distributed found no other processes ({error}); start it under Slurm, "
            "MPI or on TPU hosts, or leave it out"
        ) from error
