"""The command line: miras train, compile, generate, evaluate, inspect and others.

Nothing slow is imported before a command runs, so that help is instant. Mistakes of the
user are one line on standard error and exit status 2; a diverged training exits with 3.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from miras_jax.errors import UserError

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
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def command(name, run, about):
        sub = commands.add_parser(name, help=about, description=about)
        sub.set_defaults(run=run)
        return sub

    train = command("train", _train, "Train an experiment, or continue it.")
    train.add_argument("file", metavar="FILE", help="Python file with experiment()")
    train.add_argument(
        "--workdir", metavar="DIR", help="folder of the run (runs/NAME for NAME.py)"
    )
    train.add_argument("--steps", type=int, metavar="N", help="instead of the file's")
    train.add_argument("--seed", type=_seed, metavar="N", help="instead of the file's")
    train.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, found by jax.distributed.initialize()",
    )

    compile_for = command(
        "compile", _compile, "Compile an experiment for a TPU slice that is not here."
    )
    compile_for.add_argument(
        "file", metavar="FILE", help="Python file with experiment()"
    )
    compile_for.add_argument(
        "--slice", required=True, metavar="SLICE", help="such as v5e:16x16"
    )

    generate = command("generate", _generate, "Write text with a trained model.")
    source = "folder of the run, or a file of miras export"
    generate.add_argument("source", metavar="WORKDIR", help=source)
    generate.add_argument(
        "prompt", nargs="?", default="", help="text to continue (none: a new document)"
    )
    for name, kind, default, about in (
        ("length", int, 200, "most tokens to write"),
        ("temperature", float, 0.8, "0 takes the likeliest token"),
        ("top-p", float, 0.95, "draw from the likeliest tokens of this probability"),
        ("seed", _seed, 0, "the same seed writes the same text"),
    ):
        generate.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="X" if kind is float else "N",
            help=f"{about} (%(default)s)",
        )

    evaluate = command("evaluate", _evaluate, "Measure a run on its held-out text.")
    evaluate.add_argument("workdir", metavar="WORKDIR", help="folder of the run")
    evaluate.add_argument(
        "--windows", type=int, metavar="N", help="only so many, evenly spread (all)"
    )
    evaluate.add_argument(
        "--consecutive",
        action="store_true",
        default=None,
        help="read on from window to window, as training did only if its file says so",
    )
    evaluate.add_argument(
        "--recall",
        type=int,
        metavar="N",
        help="also: what is recalled of a passage that was read up to N tokens ago",
    )
    inspect = command(
        "inspect", _inspect, "Show what the memories of a run make of a text."
    )
    inspect.add_argument("source", metavar="WORKDIR", help=source)
    inspect.add_argument("--text", required=True, metavar="FILE", help="text to read")
    inspect.add_argument(
        "--length",
        type=int,
        default=1024,
        metavar="N",
        help="most tokens to read (%(default)s)",
    )
    inspect.add_argument(
        "--output",
        metavar="DIR",
        help="folder of page and pictures (inspect in WORKDIR or beside the file)",
    )
    export = command("export", _export, "Write a trained model as one file.")
    export.add_argument("workdir", metavar="WORKDIR", help="folder of the run")
    export.add_argument("file", metavar="FILE.safetensors", help="what to write")
    export.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="by held-out loss, or the newest (%(default)s)",
    )
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


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number from 0 to {2**32 - 1}"
        )
    return int(text)


def _train(arguments, argv: Sequence[str]) -> int:
    import jax

    if arguments.distributed:
        _join_processes()
    from miras_jax.training import config
    from miras_jax.training.run import Run
    from miras_jax.training.train import Diverged, train

    _prepare()
    experiment = config.load_experiment(arguments.file)
    given = {"steps": arguments.steps, "seed": arguments.seed}
    changes = {name: value for name, value in given.items() if value is not None}
    experiment = dataclasses.replace(experiment, **changes)
    workdir = arguments.workdir or Path("runs") / Path(arguments.file).stem
    try:
        result = train(experiment, workdir)
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


def _generate(arguments, argv: Sequence[str]) -> int:
    from miras_jax.export import of_path
    from miras_jax.generate import generate

    _prepare()
    pieces = generate(
        of_path(arguments.source),
        arguments.prompt,
        length=arguments.length,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    print(arguments.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def _evaluate(arguments, argv: Sequence[str]) -> int:
    from miras_jax.evaluation import report
    from miras_jax.training.run import Run

    _prepare()
    if arguments.windows is not None and arguments.windows < 1:
        raise UserError(f"--windows is {arguments.windows}; evaluate at least 1")
    run = Run.open(arguments.workdir)
    restored = run.restore("best")
    print(
        report.evaluation(
            run, restored, arguments.windows, arguments.consecutive, arguments.recall
        )
    )
    return 0


def _inspect(arguments, argv: Sequence[str]) -> int:
    from miras_jax.evaluation import inspect, inspect_page, inspect_plots
    from miras_jax.export import of_path

    _prepare()
    text = inspect.text_of(arguments.text)
    origin = Path(arguments.source)
    trained = of_path(origin)
    reading = inspect.read(trained, text, arguments.length)
    name = Path(arguments.text).name
    tokens = f"{len(reading.pieces):,}"
    part = f"the first {tokens} tokens" if reading.left else f"all {tokens} tokens"
    source = f"{origin}, step {trained.step:,}, reading {part} of {name}."
    home = origin if origin.is_dir() else origin.parent
    folder = Path(arguments.output or home / "inspect")
    folder.mkdir(parents=True, exist_ok=True)
    stem = Path(arguments.text).stem
    page = folder / f"{stem}.html"
    page.write_text(inspect_page.page(reading, name, source), encoding="utf-8")
    print(f"page   {page}")
    print(f"text   {inspect_plots.plot_text(reading, folder / f'{stem}_text.png')}")
    print(f"curves {inspect_plots.plot_curves(reading, folder / f'{stem}_curves.png')}")
    if reading.left:
        print(f"{reading.left:,} tokens were left out; --length N reads more")
    return 0


def _export(arguments, argv: Sequence[str]) -> int:
    from miras_jax import export
    from miras_jax.training.run import Run

    _prepare()
    run = Run.open(arguments.workdir)
    trained = export.of_run(run, run.restore(arguments.checkpoint))
    export.save(trained, arguments.file)
    size = Path(arguments.file).stat().st_size / 1e6
    print(
        f"{arguments.file}: {trained.model.size:,} parameters of step {trained.step:,}"
        f", tokenizer and model, {size:,.1f} MB"
    )
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


def _prepare() -> None:
    """Settings of a process that is a command: compilation cache, quiet libraries."""
    import jax

    # Programs from the cache that run on several simulated devices of one CPU have been
    # seen to wait for each other for ever.
    simulated = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    if not simulated and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = Path(caches) / "miras_jax" / "compilation"
        # Where nothing can be kept, every command compiles anew.
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
    # Orbax reports every file it touches, tensorboardX every NaN (as the speed of the
    # first step). Their errors are exceptions and reach the user anyway.
    for name in ("absl", "tensorboardX"):
        logging.getLogger(name).setLevel(logging.ERROR)


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
