"""What the paper leaves open of Moneta and Memora, decided by held-out loss.

    python -m experiments.studies.decisions                      # every row
    python -m experiments.studies.decisions moneta_paper memora  # some of them

A small language model (width 96, depth 2, heads of 32, contexts of 128) on the novels
of Jane Austen, 150 steps, three seeds a row: Moneta's gate as printed or as the exact
mirror map; Memora's mass, the axis of its slices and the spread of its initial logits;
Yaad for comparison. Prints the mean held-out loss, its spread over the seeds and the
largest gradient norm after step 50, where instability shows first. About a minute a
seed on two idle cores. Every measurement is kept in runs/decisions/rows.jsonl, and a
run that was interrupted continues where it stopped.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from experiments.compare import table
from experiments.studies.rows import Rows
from experiments.studies.small import CHUNK, HEADS, WIDTH, experiment
from miras_jax import retention, variants
from miras_jax.nn.miras import Miras
from miras_jax.training.config import Experiment
from miras_jax.training.metrics import read_table
from miras_jax.training.train import Diverged, train

STEPS, AFTER, SEEDS = 150, 50, (0, 1, 2)
HEAD_DIM = WIDTH // HEADS


def mixer(variant, gate: retention.Retention | None = None) -> Miras:
    rule = dataclasses.replace(variant(), chunk_size=CHUNK)
    if gate is not None:
        rule = dataclasses.replace(rule, retention=gate)
    return Miras(rule, HEADS)


def memora(**changes) -> Miras:
    """Memora whose first matrix has weights of mean one, but for the changes."""
    return mixer(variants.memora, retention.KL(**{"mass": float(HEAD_DIM), **changes}))


ROWS: dict[str, tuple[str, Miras]] = {
    "yaad": ("for comparison", mixer(variants.yaad)),
    "moneta_paper": ("W = A / ‖A‖², as printed", mixer(variants.moneta)),
    "moneta_mirror": (
        "W = sign(A) |A|³ / ‖A‖², the exact map",
        mixer(variants.moneta, retention.Lq(4.0, "mirror")),
    ),
    "memora": ("mass 32, slices along the inputs, logits of spread 1", memora()),
    "memora_mass_1": ("mass 1: the softmax itself", memora(mass=1.0)),
    "memora_mass_8": ("mass 8", memora(mass=8.0)),
    "memora_mass_128": ("mass 128", memora(mass=128.0)),
    "memora_outputs": ("slices along the outputs", memora(axis=1)),
    "memora_flat": ("initial logits of spread 0.1", memora(spread=0.1)),
    "memora_peaked": ("initial logits of spread 3", memora(spread=3.0)),
}


def measure(wanted: Experiment, workdir: Path) -> dict:
    """Train one seed of a row: its held-out loss and largest late gradient norm."""
    try:
        loss = train(wanted, workdir).heldout_loss
    except Diverged as error:
        print(error)
        loss = None
    norms = np.asarray(read_table(workdir / "metrics.csv")["gradient_norm"])
    late = norms[min(AFTER, wanted.steps // 2) :]
    largest = float(late.max()) if np.all(np.isfinite(late)) else None
    return {"loss": loss, "gradient norm": largest}


def line(name: str, seeds: list[dict]) -> dict:
    """One line of the table from the seeds of a row."""
    losses = [seed["loss"] for seed in seeds if seed["loss"] is not None]
    norms = [seed["gradient norm"] for seed in seeds]
    mean = f"{np.mean(losses):.3f}" if losses else "-"
    spread = f"{min(losses):.3f} to {max(losses):.3f}" if losses else "-"
    largest = "not finite" if None in norms else f"{max(norms):.2g}"
    return {
        "row": name,
        "": ROWS[name][0],
        "seeds": f"{len(losses)} of {len(seeds)}",
        "held-out nats per token": mean,
        "from, to": spread,
        "largest gradient norm": largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS), metavar="N")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N")
    parser.add_argument("--folder", type=Path, default=Path("runs/decisions"))
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(ROWS)
    if unknown:
        parser.error(f"unknown {', '.join(unknown)}; there are {', '.join(ROWS)}")
    kept = Rows(arguments.folder / "rows.jsonl")
    lines = []
    for name in arguments.names or ROWS:
        seeds = []
        for seed in range(arguments.seeds):
            wanted = experiment(
                (ROWS[name][1],),
                steps=arguments.steps,
                seed=seed,
                evaluate_every=arguments.steps,
            )
            label = f"{name}-{seed}-{arguments.steps}"
            workdir = arguments.folder / label
            print(f"\n{label}", flush=True)
            seeds.append(
                kept.measure(
                    label,
                    repr(wanted),
                    lambda wanted=wanted, workdir=workdir: measure(wanted, workdir),
                )
            )
        lines.append(line(name, seeds))
        jax.clear_caches()
    print(f"\n{table(lines)}")


if __name__ == "__main__":
    main()
