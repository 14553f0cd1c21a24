"""The commands of `miras` that ask a trained model what papers ask: harness, needle.

Nothing slow is imported before a command runs.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from miras_jax.commands import SOURCE, prepare, seed
from miras_jax.errors import UserError


def add_commands(command: Callable) -> None:
    """Describe them; command(name, run, about) is a new command's parser."""
    harness = command(
        "harness", _harness, "Score a model on tasks of lm-evaluation-harness."
    )
    harness.add_argument("source", metavar="MODEL", help=SOURCE)
    harness.add_argument(
        "--tasks",
        type=_names,
        required=True,
        metavar="A,B",
        help="names of tasks, such as lambada_openai,piqa",
    )
    harness.add_argument(
        "--include", metavar="DIR", help="folder of your own YAML task files"
    )
    harness.add_argument(
        "--limit", type=_count, metavar="N", help="only so many examples of each (all)"
    )
    harness.add_argument(
        "--num-fewshot", type=int, metavar="N", help="instead of the tasks' own"
    )
    harness.add_argument(
        "--max-length",
        type=_count,
        default=2048,
        metavar="N",
        help="most tokens that the model reads at once (%(default)s)",
    )
    harness.add_argument("--output", metavar="FILE.json", help="also write results")

    needle = command(
        "needle", _needle, "Let a model find a needle in a haystack, as RULER does."
    )
    needle.add_argument("source", metavar="MODEL", help=SOURCE)
    needle.add_argument(
        "--lengths",
        type=_counts,
        default=[1024, 2048, 4096, 8192],
        metavar="N,N",
        help="tokens of prompt and answer (1024,2048,4096,8192)",
    )
    needle.add_argument(
        "--kind",
        type=_names,
        default=["noise", "number", "uuid"],
        metavar="A,B",
        help="noise, number or uuid, of which the last two are in prose (all)",
    )
    needle.add_argument(
        "--haystack",
        metavar="FILE",
        help="the prose (the held-out text of a run's folder)",
    )
    for name, kind, default, about in (
        ("samples", _count, 32, "needles for each kind and length"),
        ("seed", seed, 0, "the same seed asks the same"),
    ):
        needle.add_argument(
            f"--{name}",
            type=kind,
            default=default,
            metavar="N",
            help=f"{about} (%(default)s)",
        )
    needle.add_argument(
        "--plot", metavar="FILE.png", help="also draw what is found by length and depth"
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of names such as a,b")
    return names


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_count(part.strip()) for part in text.split(",")]


def _harness(arguments, argv: Sequence[str]) -> int:
    try:
        from miras_jax.evaluation import harness
    except ModuleNotFoundError as error:
        if error.name.split(".")[0] != "lm_eval":
            raise
        raise UserError(
            "miras harness needs lm_eval: pip install 'miras-jax[eval]'"
        ) from error
    from miras_jax.export import of_path

    prepare()
    trained = of_path(arguments.source)
    # What the harness says on its way is not the table.
    with contextlib.redirect_stdout(sys.stderr):
        results = harness.evaluate(
            trained,
            arguments.tasks,
            include=arguments.include,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            max_length=arguments.max_length,
        )
    print(harness.tables(results))
    if arguments.output:
        text = json.dumps(harness.kept(results), indent=2, sort_keys=True)
        Path(arguments.output).write_text(text + "\n", encoding="utf-8")
    return 0


def _needle(arguments, argv: Sequence[str]) -> int:
    from miras_jax.evaluation import needle
    from miras_jax.export import of_path

    prepare()
    in_prose = set(arguments.kind) != {"noise"}
    prose = _prose(arguments) if in_prose else ""
    tasks = [
        needle.Task(kind, length, prose=prose)
        for kind in arguments.kind
        for length in arguments.lengths
    ]
    trained = of_path(arguments.source)
    found = {kind: {} for kind in arguments.kind}
    for task in tasks:
        scores = needle.evaluate(trained, task, arguments.samples, arguments.seed)
        found[task.kind][task.length] = scores
        share = f"{needle.accuracy(scores):.1%}"
        print(f"{task.kind}, {task.length:,} tokens: {share}", file=sys.stderr)
    print("\n".join(needle.table(found)))
    if arguments.plot:
        from miras_jax.evaluation.needle_plot import plot  # slow to import

        print(f"\nplot  {plot(found, Path(arguments.plot))}")
    return 0


def _prose(arguments) -> str:
    """The text of the file that was given, or else what the run has held out."""
    from miras_jax.evaluation import inspect
    from miras_jax.export import SUFFIX
    from miras_jax.training.run import Run

    if arguments.haystack:
        return inspect.text_of(arguments.haystack)
    if Path(arguments.source).suffix == SUFFIX:
        raise UserError(
            f"{arguments.source} has no text beside it to hide needles in; give one "
            "with --haystack FILE, or --kind noise"
        )
    prepared = Run.open(arguments.source).prepared
    return prepared.tokenizer.decode(prepared.heldout)
