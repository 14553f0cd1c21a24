"""How many pairs a memory recalls: associative recall, by layer and number of pairs.

    python -m experiments.studies.recall                  # every row
    python -m experiments.studies.recall yaad softmax     # some of them

An episode of 128 tokens is a stream of pairs, a letter and one of sixteen values. It
first gives every one of its 8, 16 or 32 letters a random value, then goes on with
letters that it has given, each followed by the same value again: whoever has stored the
pairs knows those values, whoever has not loses ln 16 = 2.77 nats on each. (The letters
themselves cannot be predicted.) The task is that of the recall studies of H3 (arXiv
2212.14052) and Zoology (arXiv 2312.04927); here every token counts in the loss, so that
the episodes are text like any other.

Language models of width 64 and depth 2, two heads of 32 channels, trained on 8 to 32
pairs at a time for 1,000 steps of 32 episodes. The table gives nats per value that had
been given before, on 256 new episodes of each number of pairs. One to five minutes a
row alone on two cores. Every measurement is kept in runs/recall/rows.jsonl; runs go on
where they stopped.

Deep memories start from `default_rates`, but "yaad_timid": shorter steps, more of them
forgotten, and smaller thresholds.
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.compare import command
from experiments.studies.rows import tabulate
from experiments.studies.small import trained
from miras_jax import variants
from miras_jax.evaluation import perplexity
from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras, default_rates
from miras_jax.nn.model import Mixer, Model
from miras_jax.nn.rates import Fixed, LowRank, Rate
from miras_jax.training.config import Experiment, Optimizer
from miras_jax.training.data import TextFiles
from miras_jax.training.metrics import read_table
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import Bytes

LENGTH, BATCH, STEPS, HEADS, CHUNK = 128, 32, 1000, 2, 16
KEYS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
VALUES = "0123456789+-*/=%"
PAIRS = (8, 16, 32)
HELDOUT = 256
RESULTS = Path(__file__).parents[1] / "results" / "recall"


def miras(variant, **rates: Rate) -> Miras:
    rule = variant()
    rule = dataclasses.replace(rule, chunk_size=min(rule.chunk_size, CHUNK))
    choices = dataclasses.replace(default_rates(rule), **rates)
    return Miras(rule, HEADS, rates=choices)


TIMID = {
    "learn": LowRank("sigmoid", (0.01, 0.04), 0.08),
    "keep": LowRank("keep", (0.0001, 0.01)),
    "threshold": LowRank("sigmoid", (0.05, 0.2)),
}
MIXERS: dict[str, Mixer] = {
    "yaad_static": miras(variants.yaad, learn=Fixed((1e-9, 1e-9))),
    "yaad_timid": miras(variants.yaad, **TIMID),
    "yaad": miras(variants.yaad),
    "moneta": miras(variants.moneta),
    "memora": miras(variants.memora),
    "titans": miras(variants.titans),
    "ttt_mlp": miras(variants.ttt_mlp),
    "linear_attention": miras(variants.linear_attention),
    "delta_net": miras(variants.delta_net),
    "gated_delta_net": miras(variants.gated_delta_net),
    "softmax": Attention(HEADS),
}


def episode(random: np.random.Generator, pairs: int) -> str:
    """LENGTH characters: every pair once, then pairs that were given before."""
    keys = random.permutation(len(KEYS))[:pairs]
    values = random.integers(len(VALUES), size=pairs)
    order = np.concatenate(
        [np.arange(pairs), random.integers(pairs, size=LENGTH // 2 - pairs)]
    )
    return "".join(KEYS[keys[i]] + VALUES[values[i]] for i in order)


def write_episodes(path: Path, pairs: tuple[int, ...], number: int, seed: int) -> None:
    """So many episodes as one text, each with a number of pairs of those."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(episode(random, random.choice(pairs)) for _ in range(number))
    path.write_text(text)


def data(folder: Path, steps: int, pairs: int) -> TextFiles:
    """Training episodes of all numbers of pairs, held-out ones of one of them."""
    train, heldout = folder / f"train-{steps}.txt", folder / f"heldout-{pairs}.txt"
    write_episodes(train, PAIRS, steps * BATCH, seed=0)
    write_episodes(heldout, (pairs,), HELDOUT, seed=pairs)
    # A window reads the end of the episode before and predicts its own.
    return TextFiles((str(train),), (str(heldout),), LENGTH, Bytes())


def experiment(mixer: Mixer, folder: Path, steps: int, pairs: int) -> Experiment:
    return Experiment(
        model=Model(width=64, depth=2, mixers=(mixer,)),
        data=data(folder, steps, pairs),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=50),
        steps=steps,
        batch_size=BATCH,
        evaluate_every=steps,
        checkpoint_every=steps,
    )


def measure(name: str, steps: int, workdir: Path) -> dict:
    """Train one model; nats per value that was given before, by number of pairs."""
    folder = workdir.parent
    wanted = experiment(MIXERS[name], folder, steps, PAIRS[-1])
    result = trained(wanted, workdir)
    run = Run.open(workdir)
    norms = read_table(workdir / "metrics.csv")["gradient_norm"]
    row = {"parameters": run.model.size, "gradient norm": float(np.max(norms))}
    if result is None:
        return row
    parameters = run.restore("last").state.parameters
    for pairs in PAIRS:
        harder = dataclasses.replace(wanted, data=data(folder, steps, pairs))
        totals = Run(harder, folder / f"episodes-{pairs}").evaluate(parameters)
        losses = perplexity.by_position(totals)
        row[str(pairs)] = float(np.mean(losses[2 * pairs + 1 :: 2]))
    return row


def line(name: str, row: dict) -> dict:
    """One line of the table."""
    nats = {pairs: row.get(str(pairs)) for pairs in PAIRS}
    return {
        "layer": name,
        "parameters": f"{row['parameters'] / 1e6:.2f} M",
        **{
            f"{n} pairs": "diverged" if x is None else f"{x:.2f}"
            for n, x in nats.items()
        },
        "largest gradient norm": f"{row['gradient norm']:.2g}",
    }


def main() -> None:
    parser = command(__doc__, MIXERS, folder="runs/recall", results=RESULTS)
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    arguments = parser.parse_args()
    tabulate(arguments, MIXERS, lambda name: repr(MIXERS[name]), measure, line)


if __name__ == "__main__":
    main()
