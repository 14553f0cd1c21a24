"""What the paper leaves open, decided by held-out loss over seeds.

    python -m experiments.studies.decisions                      # every row
    python -m experiments.studies.decisions moneta_paper memora  # some of them

A small language model (width 96, depth 2, heads of 32, chunks of 16, contexts of 128)
on the novels of Jane Austen, 150 steps, three seeds a row; a row is one of the three
models of the paper with one choice changed, or one of its other gates. Prints the mean
held-out loss, its range over the seeds and the largest gradient norm after step 50,
where instability shows first. About a minute a seed on two idle cores. Every
measurement is kept in runs/decisions/rows.jsonl, so that a run that was interrupted
continues where it stopped; the table goes to experiments/results/decisions.
"""

import dataclasses
from pathlib import Path

import jax

from experiments.compare import command
from experiments.studies.rows import largest, largest_norm, spread, tabulate
from experiments.studies.small import CHUNK, HEADS, WIDTH, experiment, trained
from miras_jax import bias, memory, retention, variants
from miras_jax.nn.defaults import RateChoices, default_rates
from miras_jax.nn.miras import Miras
from miras_jax.nn.rates import PerHead
from miras_jax.training.config import Experiment

STEPS, AFTER, SEEDS = 150, 50, 3
HEAD_DIM = WIDTH // HEADS


def mixer(variant, heads: int = HEADS, rates=None, **changes) -> Miras:
    """A model of the paper, with these fields of its rule changed."""
    changes = {"chunk_size": CHUNK, **changes}
    return Miras(dataclasses.replace(variant(), **changes), heads, rates)


def memora(**changes) -> Miras:
    """Memora whose first matrix has weights of mean one, but for the changes."""
    gate = retention.KL(**{"mass": float(HEAD_DIM), **changes})
    return mixer(variants.memora, retention=gate)


def _one_rate_per_head() -> RateChoices:
    """Yaad's rates, from where they start, without channels of their own."""
    rates = default_rates(mixer(variants.yaad).rule)
    per_head = {
        name: PerHead(rate.activation, rate.initial, rate.limit)
        for name, rate in vars(rates).items()
        if rate is not None
    }
    return RateChoices(**per_head)


ROWS: dict[str, tuple[str, Miras]] = {
    "yaad": ("eq. 16, as the library has it", mixer(variants.yaad)),
    "yaad_norm": (
        "Huber of the norm, eq. 15",
        mixer(variants.yaad, bias=bias.Huber("norm")),
    ),
    "yaad_coordinate": (
        "Huber per coordinate, eq. 14",
        mixer(variants.yaad, bias=bias.Huber("coordinate")),
    ),
    "yaad_l2": ("no threshold: ½‖r‖²", mixer(variants.yaad, bias=bias.L2())),
    "yaad_one_rate": (
        "one rate per token and head",
        mixer(variants.yaad, rates=_one_rate_per_head()),
    ),
    "yaad_one_head": ("one memory per layer", mixer(variants.yaad, heads=1)),
    "yaad_silu": (
        "SiLU in the memory",
        mixer(variants.yaad, memory=memory.MLP(activation=jax.nn.silu)),
    ),
    "yaad_deep": ("three matrices", mixer(variants.yaad, memory=memory.MLP(depth=3))),
    "yaad_chunk_4": ("chunks of 4", mixer(variants.yaad, chunk_size=4)),
    "yaad_chunk_64": ("chunks of 64", mixer(variants.yaad, chunk_size=64)),
    "moneta_paper": ("W = A / ‖A‖², as printed", mixer(variants.moneta)),
    "moneta_mirror": (
        "W = sign(A) |A|³ / ‖A‖², the exact map",
        mixer(variants.moneta, retention=retention.Lq(4.0, "mirror")),
    ),
    "moneta_exact_sign": (
        "Sign and |r| instead of remark 5",
        mixer(variants.moneta, bias=bias.Lp(3.0, smooth=False)),
    ),
    "moneta_exact": (
        "every token read through the gate",
        mixer(variants.moneta, readout="exact"),
    ),
    "memora": ("mass 32, slices along the inputs, logits of spread 1", memora()),
    "memora_mass_1": ("mass 1: the softmax itself", memora(mass=1.0)),
    "memora_mass_8": ("mass 8", memora(mass=8.0)),
    "memora_mass_128": ("mass 128", memora(mass=128.0)),
    "memora_outputs": ("slices along the outputs", memora(axis=1)),
    "memora_flat": ("initial logits of spread 0.1", memora(spread=0.1)),
    "memora_peaked": ("initial logits of spread 3", memora(spread=3.0)),
    "elastic_net": (
        "Yaad with the gate of eq. 22",
        mixer(variants.yaad, retention=retention.ElasticNet()),
    ),
    "f_divergence": (
        "Memora with a chi-square gate, eq. 18",
        mixer(variants.memora, retention=retention.FDivergence("chi_square", HEAD_DIM)),
    ),
    "bregman": (
        "Yaad with a sigmoid link",
        mixer(variants.yaad, retention=retention.Bregman(retention.Sigmoid())),
    ),
}
RESULTS = Path(__file__).parents[1] / "results" / "decisions"


def wanted(name: str, seed: int, steps: int = STEPS) -> Experiment:
    mixers = (ROWS[name][1],)
    return experiment(mixers, steps=steps, seed=seed, evaluate_every=steps)


def measure(name: str, seed: int, steps: int, workdir: Path) -> dict:
    """Train one seed of a row: its held-out loss and largest late gradient norm."""
    result = trained(wanted(name, seed, steps), workdir)
    norm = largest_norm(workdir, min(AFTER, steps // 2))
    return {"loss": result and result.heldout_loss, "gradient norm": norm}


def line(name: str, seeds: list[dict]) -> dict:
    """One line of the table from the seeds of a row."""
    losses = [seed["loss"] for seed in seeds if seed["loss"] is not None]
    return {
        "row": name,
        "": ROWS[name][0],
        "seeds": f"{len(losses)} of {len(seeds)}",
        "held-out nats per token (from, to)": spread(losses, 3),
        "largest gradient norm": largest([seed["gradient norm"] for seed in seeds]),
    }


def main() -> None:
    parser = command(__doc__, ROWS, folder="runs/decisions", results=RESULTS)
    parser.add_argument("--seeds", type=int, default=SEEDS, metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    arguments = parser.parse_args()

    def of(name, seed):
        return repr(wanted(name, seed))

    tabulate(arguments, ROWS, of, measure, line)


if __name__ == "__main__":
    main()
