"""Yaad on five novels of Jane Austen, judged on the sixth.

miras train experiments/quickstart.py --workdir runs/quickstart
"""

from dataclasses import replace
from pathlib import Path

from miras_jax import variants
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Experiment
from miras_jax.training.data import TextFiles
from miras_jax.training.optimizer import AdamW
from miras_jax.training.tokenizer import BPE

AUSTEN = Path(__file__).parent / "data" / "austen"
TRAIN = (
    "sense_and_sensibility",
    "pride_and_prejudice",
    "mansfield_park",
    "emma",
    "northanger_abbey",
)


def experiment() -> Experiment:
    # Chunks of 16: at 64 the steps have to be smaller, and the memory learns less.
    rule = replace(variants.yaad(), chunk_size=16)
    return Experiment(
        model=Model(width=192, depth=4, mixers=(Miras(rule, num_heads=3),)),
        data=TextFiles(
            train=tuple(str(AUSTEN / f"{name}.txt") for name in TRAIN),
            heldout=(str(AUSTEN / "persuasion.txt"),),
            context_length=256,
            tokenizer=BPE(vocab_size=2048),
        ),
        optimizer=AdamW(learning_rate=3e-3, warmup_steps=20),
        steps=200,
        batch_size=8,
        evaluate_every=50,
        evaluate_windows=32,
        checkpoint_every=100,
    )
