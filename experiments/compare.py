"""The quickstart with other sequence layers, at equal parameters and tokens.

    python -m experiments.compare                     # every row
    python -m experiments.compare moneta transformer  # some of them

Each model takes the place of Yaad in experiments/quickstart.py, with the MLP's hidden
width chosen so that the parameter count comes nearest to Yaad's, for 300 steps; data,
order, optimizer and seed are the same. Runs go to runs/compare/NAME and continue where
they stopped; the table and the plot by position go to experiments/results/compare.
"""

import argparse
import dataclasses
from collections.abc import Collection
from pathlib import Path

import jax
import numpy as np

from experiments.quickstart import experiment as quickstart
from miras_jax import variants
from miras_jax.evaluation import perplexity
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.training.config import Experiment
from miras_jax.training.metrics import read_table
from miras_jax.training.plots import plot_by_position
from miras_jax.training.run import Run
from miras_jax.training.train import train

HEADS = 3
WINDOW = 64
CHUNK = 16
STEPS = 300


def miras(variant) -> Miras:
    """The variant as a mixer; with chunks of 16 tokens unless it has none."""
    rule = variant()
    return Miras(
        dataclasses.replace(rule, chunk_size=min(rule.chunk_size, CHUNK)), HEADS
    )


MIXERS = {
    "yaad": (miras(variants.yaad),),
    "moneta": (miras(variants.moneta),),
    "memora": (miras(variants.memora),),
    "titans": (miras(variants.titans),),
    "ttt_mlp": (miras(variants.ttt_mlp),),
    "gated_delta_net": (miras(variants.gated_delta_net),),
    "linear_attention": (miras(variants.linear_attention),),
    "yaad_hybrid": (miras(variants.yaad), Attention(HEADS, WINDOW)),
    "transformer": (Attention(HEADS),),
}
RESULTS = Path(__file__).parent / "results" / "compare"


def experiment(name: str, base: Experiment) -> Experiment:
    """`base` with other mixers and as many parameters, to the nearest hidden width."""
    target = FunctionalModel(base.model, base.data.tokenizer.vocab_size).size
    model = dataclasses.replace(base.model, mixers=MIXERS[name])

    def size(hidden: int) -> int:
        candidate = dataclasses.replace(model, hidden=hidden)
        return FunctionalModel(candidate, base.data.tokenizer.vocab_size).size

    # The count is affine in the hidden width.
    first, step = size(8), size(16) - size(8)
    hidden = 8 + 8 * round((target - first) / step)
    return dataclasses.replace(base, model=dataclasses.replace(model, hidden=hidden))


def run_one(name: str, base: Experiment, folder: Path) -> tuple[dict, np.ndarray]:
    """Train and evaluate one model: its row of the table, its losses by position."""
    workdir = folder / name
    train(experiment(name, base), workdir)
    run = Run.open(workdir)
    restored = run.restore("best")
    totals = run.evaluate(restored.state.parameters)
    quality = perplexity.quality(totals, run.prepared)
    speed = read_table(workdir / "metrics.csv")["tokens_per_second"]
    row = {
        "model": name,
        "parameters": f"{run.model.size / 1e6:.2f} M",
        "bits per byte": f"{quality.bits_per_byte:.3f}",
        "token perplexity": f"{quality.token_perplexity:.1f}",
        "word perplexity": f"{quality.word_perplexity:.0f}",
        "tokens/s": f"{np.nanmedian(speed):,.0f}",
        "best step": f"{restored.step}",
    }
    return row, perplexity.by_position(totals)


def table(rows: list[dict]) -> str:
    """Rows as a Markdown table."""
    header = list(rows[0])
    cells = ([cell.replace("|", r"\|") for cell in row.values()] for row in rows)
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command(
    about: str, known: Collection[str], folder: str, results: Path | None = None
) -> argparse.ArgumentParser:
    """The parser of a command that does all that is known, or what it is given.

    results: where it keeps what it has made of all of them, or of any.
    """

    def name(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"no {text}; there are {', '.join(known)}")
        return text

    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument(
        "names", nargs="*", type=name, metavar="NAME", help=", ".join(known)
    )
    parser.add_argument("--folder", type=Path, default=Path(folder))
    if results is not None:
        parser.add_argument("--results", type=Path, default=results)
    return parser


def main() -> None:
    parser = command(__doc__, MIXERS, folder="runs/compare", results=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    arguments = parser.parse_args()
    base = dataclasses.replace(quickstart(), steps=arguments.steps)
    rows, curves = [], {}
    for name in arguments.names or MIXERS:
        print(f"\n{name}", flush=True)
        row, curves[name] = run_one(name, base, arguments.folder)
        rows.append(row)
        # One process compiles every model: let go of what the last one left.
        jax.clear_caches()
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "table.md").write_text(table(rows) + "\n")
    title = "Held-out loss by position in the context"
    plot_by_position(curves, arguments.results / "loss_by_position.png", title=title)
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
