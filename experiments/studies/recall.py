"""How many pairs a memory recalls: associative recall, by layer and number of pairs.

    python -m experiments.studies.recall                  # every row
    python -m experiments.studies.recall yaad softmax     # some of them

An episode of 64 tokens is a stream of pairs, a letter and one of sixteen values. It
first gives every one of its 4, 8 or 16 letters a random value, then goes on with
letters that it has given, each followed by the same value again: whoever has stored the
pairs knows those values, whoever has not loses ln 16 = 2.77 nats on each. (The letters
themselves cannot be predicted.) The task is that of the recall studies of H3 (arXiv
2212.14052) and Zoology (arXiv 2312.04927); here every token counts in the loss, so that
the episodes are text like any other.

Language models of width 64 and one block, two heads of 32 channels, trained on 4 to 16
pairs at a time for 1,000 steps of 32 episodes, three seeds a row. The table gives nats
per value that had been given before, on 256 new episodes of each number of pairs. One
to three minutes a seed on one core. Every measurement is kept in
runs/recall/rows.jsonl; runs go on where they stopped.

Deep memories start from `default_rates`. "yaad_static" does not learn while it reads;
"yaad_timid" starts from a quarter of the step, ten times the forgetting and smaller
thresholds; "yaad_tolerant" from thresholds that an untrained memory's errors, of norm
1.7, mostly do not reach.
"""

import dataclasses
from pathlib import Path

import numpy as np

from experiments.compare import command
from experiments.studies.recall_plot import plot
from experiments.studies.rows import largest, largest_norm, spread, tabulate
from experiments.studies.small import trained
from miras_jax import variants
from miras_jax.evaluation import perplexity
from miras_jax.nn.attention import Attention
from miras_jax.nn.miras import Miras, default_rates
from miras_jax.nn.model import Mixer, Model
from miras_jax.nn.rates import Fixed, LowRank, Rate
from miras_jax.training.config import Experiment
from miras_jax.training.data import TextFiles
from miras_jax.training.optimizer import AdamW
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import Bytes

LENGTH, BATCH, STEPS, SEEDS, HEADS, CHUNK = 64, 32, 1000, 3, 2, 16
KEYS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
VALUES = "0123456789+-*/=%"
PAIRS = (4, 8, 16)
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
    "yaad": miras(variants.yaad),
    "yaad_timid": miras(variants.yaad, **TIMID),
    "yaad_tolerant": miras(
        variants.yaad, threshold=LowRank("sigmoid", (1.5, 3.0), 6.0)
    ),
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


def experiment(
    name: str, folder: Path, steps: int, seed: int, pairs: int = PAIRS[-1]
) -> Experiment:
    return Experiment(
        model=Model(width=64, depth=1, mixers=(MIXERS[name],)),
        data=data(folder, steps, pairs),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=50),
        steps=steps,
        seed=seed,
        batch_size=BATCH,
        evaluate_every=steps,
        checkpoint_every=steps,
    )


def measure(name: str, seed: int, steps: int, workdir: Path) -> dict:
    """Train one model; nats per value that was given before, by number of pairs."""
    folder = workdir.parent
    result = trained(experiment(name, folder, steps, seed), workdir)
    run = Run.open(workdir)
    row = {"parameters": run.model.size, "gradient norm": largest_norm(workdir, 0)}
    if result is None:
        return row
    parameters = run.restore("last").state.parameters
    for pairs in PAIRS:
        harder = experiment(name, folder, steps, seed, pairs)
        totals = Run(harder, folder / f"episodes-{pairs}").evaluate(parameters)
        losses = perplexity.by_position(totals)
        row[str(pairs)] = float(np.mean(losses[2 * pairs + 1 :: 2]))
    return row


def by_pairs(seeds: list[dict]) -> dict[int, list[float]]:
    """Nats per value of the seeds that did not diverge, by number of pairs."""
    return {n: [seed[str(n)] for seed in seeds if str(n) in seed] for n in PAIRS}


def line(name: str, seeds: list[dict]) -> dict:
    """One line of the table from the seeds of a row."""
    nats = by_pairs(seeds)
    return {
        "layer": name,
        "parameters": f"{seeds[0]['parameters'] / 1e6:.2f} M",
        "seeds": f"{len(nats[PAIRS[0]])} of {len(seeds)}",
        **{f"{n} pairs (from, to)": spread(found, 2) for n, found in nats.items()},
        "largest gradient norm": largest([seed["gradient norm"] for seed in seeds]),
    }


def main() -> None:
    parser = command(__doc__, MIXERS, folder="runs/recall", results=RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")

    def of(name, seed):
        return repr(MIXERS[name])

    arguments = parser.parse_args()
    rows = tabulate(arguments, MIXERS, of, measure, line)
    if not arguments.names:
        found = {name: by_pairs(seeds) for name, seeds in rows.items()}
        plot(found, len(VALUES), arguments.results / "recall.png")


if __name__ == "__main__":
    main()
