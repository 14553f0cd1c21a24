"""What an untrained deep memory starts from: forgetting, step size, chunks, RoPE.

    python -m experiments.studies.starts                  # every row
    python -m experiments.studies.starts forgetful fast   # some of them

The quickstart for 150 steps, with one thing changed per row. Prints the held-out loss
and the largest gradient norm after step 30: where forgetting keeps the weights so short
that a chunk's steps overshoot, it explodes long before the loss says so. Two to three
minutes a row on two cores; runs go to runs/starts/NAME and continue where they stopped.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from experiments.compare import command, table
from experiments.quickstart import experiment as quickstart
from experiments.studies.small import trained
from miras_jax import variants
from miras_jax.nn.miras import Miras, default_rates
from miras_jax.nn.rates import Fixed, LowRank, PerHead
from miras_jax.training.metrics import read_table

STEPS, AFTER = 150, 30


def mixer(
    chunk_size: int = 16, rotary: float = 0.25, variant=variants.yaad, **rates
) -> Miras:
    rule = dataclasses.replace(variant(), chunk_size=chunk_size)
    choices = dataclasses.replace(default_rates(rule), **rates)
    return Miras(rule, num_heads=3, rates=choices, rotary=rotary)


ROWS: dict[str, tuple[str, Miras]] = {
    "quickstart": ("as it is", mixer()),
    "static": (
        "learn 0: the memory stays what it was",
        mixer(learn=Fixed((1e-9, 1e-9))),
    ),
    "forgetful": (
        "forgets 0.0001 to 0.01 per token instead of 0.00001 to 0.001",
        mixer(keep=LowRank("keep", (0.0001, 0.01))),
    ),
    "fast": (
        "learn 0.16 to 0.64 and at most 2.6; by default 0.036 to 0.14 and 0.57",
        mixer(learn=LowRank("sigmoid", (0.16, 0.64), 2.6)),
    ),
    "fast_forgetful": (
        "both",
        mixer(
            learn=LowRank("sigmoid", (0.16, 0.64), 2.6),
            keep=LowRank("keep", (0.0001, 0.01)),
        ),
    ),
    "timid": (
        "learn 0.01 to 0.04, at most 0.08; thresholds 0.05 to 0.2",
        mixer(
            learn=LowRank("sigmoid", (0.01, 0.04), 0.08),
            threshold=LowRank("sigmoid", (0.05, 0.2)),
        ),
    ),
    "memora": ("Memora", mixer(variant=variants.memora)),
    "memora_forgetful": (
        "Memora that forgets 0.0001 to 0.01 per token",
        mixer(variant=variants.memora, keep=PerHead("keep", (0.0001, 0.01))),
    ),
    "chunk_64": ("chunks of 64 tokens", mixer(chunk_size=64)),
    "no_rope": ("no RoPE", mixer(rotary=0.0)),
    "full_rope": ("RoPE on all channels", mixer(rotary=1.0)),
}


def run_one(name: str, folder: Path) -> dict:
    """Train one row: what the table says of it."""
    about, changed = ROWS[name]
    base = quickstart()
    model = dataclasses.replace(base.model, mixers=(changed,))
    experiment = dataclasses.replace(
        base,
        model=model,
        steps=STEPS,
        evaluate_every=STEPS,
        evaluate_windows=128,
    )
    result = trained(experiment, folder / name)
    metrics = read_table(folder / name / "metrics.csv")
    norms = np.asarray(metrics["gradient_norm"])[AFTER:]
    return {
        "row": name,
        "": about,
        "held-out nats per token": f"{result.heldout_loss:.3f}" if result else "-",
        "largest gradient norm": f"{norms.max():.2g}",
    }


def main() -> None:
    arguments = command(__doc__, ROWS, folder="runs/starts").parse_args()
    rows = []
    for name in arguments.names or ROWS:
        print(f"\n{name}", flush=True)
        rows.append(run_one(name, arguments.folder))
        jax.clear_caches()
    print(f"\n{table(rows)}")


if __name__ == "__main__":
    main()
