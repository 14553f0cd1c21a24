"""The commands of `miras` that read a trained model: generate, evaluate and others.

Nothing slow is imported before a command runs.
"""

import argparse
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from miras_jax.errors import UserError

SOURCE = "folder of the run, or a file of miras export"


def add_commands(command: Callable) -> None:
    """Describe them; command(name, run, about) is a new command's parser."""
    generate = command("generate", _generate, "Write text with a trained model.")
    generate.add_argument("source", metavar="WORKDIR", help=SOURCE)
    generate.add_argument(
        "prompt", nargs="?", default="", help="text to continue (none: a new document)"
    )
    for name, kind, default, about in (
        ("length", int, 200, "most tokens to write"),
        ("temperature", float, 0.8, "0 takes the likeliest token"),
        ("top-p", float, 0.95, "draw from the likeliest tokens of this probability"),
        ("seed", seed, 0, "the same seed writes the same text"),
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
    inspect.add_argument("source", metavar="WORKDIR", help=SOURCE)
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


def seed(text: str) -> int:
    """A number that can be a seed, for argparse."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no whole number from 0 to {2**32 - 1}"
        )
    return int(text)


def _generate(arguments, argv: Sequence[str]) -> int:
    from miras_jax.export import of_path
    from miras_jax.generate import generate

    prepare()
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

    prepare()
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

    prepare()
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

    prepare()
    run = Run.open(arguments.workdir)
    trained = export.of_run(run, run.restore(arguments.checkpoint))
    export.save(trained, arguments.file)
    size = Path(arguments.file).stat().st_size / 1e6
    print(
        f"{arguments.file}: {trained.model.size:,} parameters of step {trained.step:,}"
        f", tokenizer and model, {size:,.1f} MB"
    )
    return 0


def prepare() -> None:
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
