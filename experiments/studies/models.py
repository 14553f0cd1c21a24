"""Every published model in the quickstart's place, at a small size: does it learn?

    python -m experiments.studies.models                # every row
    python -m experiments.studies.models yaad titans    # some of them

Each layer as its own paper has it (`miras_jax.nn.recipes`), in a language model of
width 96 and depth 2 (hybrids: one block per mixer) with contexts of 128, 300 steps of
1,024 tokens of the novels of Jane Austen; *Persuasion* is held out. Chunks are of at
most 16 tokens, windows and segments of 32. One seed, one learning rate and no equal
parameter counts: the table tells that a model trains, not which is best. Every
measurement is kept in runs/models/rows.jsonl, so that a run that was interrupted
continues where it stopped; the table goes to experiments/results/models.
"""

import dataclasses
import inspect
from pathlib import Path

import numpy as np

from experiments.compare import command
from experiments.studies.rows import tabulate
from experiments.studies.small import CHUNK, HEADS, WIDTH, experiment, trained
from miras_jax.nn import recipes
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Mixer
from miras_jax.training.metrics import read_table

STEPS, EVERY = 300, 100
RESULTS = Path(__file__).parents[1] / "results" / "models"
SMALL = {
    "num_heads": HEADS,
    "width": WIDTH,
    "window": 2 * CHUNK,
    "segment": 2 * CHUNK,
    "chunk_size": 2 * CHUNK,
    "local_chunk_sizes": (CHUNK // 2,),
    "shard": 4 * CHUNK,
}
"""What a recipe is given of the parameters that it has."""
NAMES = tuple(name for name, value in vars(recipes).items() if callable(value))


def mixers(name: str) -> tuple[Mixer, ...]:
    """The recipe at this study's size."""
    recipe = getattr(recipes, name)
    given = {p: SMALL[p] for p in inspect.signature(recipe).parameters if p in SMALL}
    made = recipe(**given)
    made = made if isinstance(made, tuple) else (made,)
    return tuple(_with_short_chunks(mixer) for mixer in made)


def _with_short_chunks(mixer: Mixer) -> Mixer:
    if not isinstance(mixer, Miras) or mixer.rule.chunk_size <= 2 * CHUNK:
        return mixer
    rule = dataclasses.replace(mixer.rule, chunk_size=CHUNK)
    return dataclasses.replace(mixer, rule=rule)


def measure(name: str, seed: int, steps: int, workdir: Path) -> dict:
    """Train one model: held-out loss on the way, speed, largest gradient norm."""
    every = max(1, steps * EVERY // STEPS)
    wanted = experiment(mixers(name), steps=steps, seed=seed, evaluate_every=every)
    trained(wanted, workdir)
    metrics = read_table(workdir / "metrics.csv")
    heldout = read_table(workdir / "evaluations.csv")
    vocabulary = wanted.data.tokenizer.vocab_size
    return {
        "parameters": FunctionalModel(wanted.model, vocabulary).size,
        "first": float(metrics["loss"][0]),
        "heldout": [float(loss) for loss in heldout["loss"]],
        "skipped": int(metrics["skipped"][-1]),
        "gradient norm": float(np.max(metrics["gradient_norm"])),
        "tokens/s": float(np.nanmedian(metrics["tokens_per_second"])),
    }


def line(name: str, seeds: list[dict]) -> dict:
    """One line of the table, of one seed."""
    (row,) = seeds
    return {
        "model": name,
        "parameters": f"{row['parameters'] / 1e6:.2f} M",
        "first loss": f"{row['first']:.2f}",
        "held-out nats per token, on the way": " ".join(
            f"{loss:.3f}" for loss in row["heldout"]
        ),
        "skipped updates": f"{row['skipped']}",
        "largest gradient norm": f"{row['gradient norm']:.2g}",
    }


def main() -> None:
    parser = command(__doc__, NAMES, folder="runs/models", results=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.set_defaults(seeds=1)

    def of(name, seed):
        return repr(mixers(name))

    tabulate(parser.parse_args(), NAMES, of, measure, line)


if __name__ == "__main__":
    main()
