"""Yaad at the paper's 780M (24 blocks of width 1536, 16 heads), for a slice of TPUs.

    miras compile experiments/yaad_780m.py --slice v5e:8x8

says without a TPU what it needs; experiments/README.md has what it printed. `TRAIN` and
`HELDOUT` are the novels of the quickstart, a stand-in that is far too small for such a
model: put texts of your own there (docs/data.md), then

    miras train experiments/yaad_780m.py --distributed

on every host of the slice. Sizes and learning rate are the paper's, context and batch
(4,096 tokens, half a million per step) those of Titans, on which it builds.
"""

from experiments.quickstart import AUSTEN
from experiments.quickstart import TRAIN as NOVELS
from miras_jax import variants
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Experiment, Mesh
from miras_jax.training.data import TextFiles
from miras_jax.training.optimizer import AdamW
from miras_jax.training.tokenizer import BPE

TRAIN = tuple(str(AUSTEN / f"{name}.txt") for name in NOVELS)
HELDOUT = (str(AUSTEN / "persuasion.txt"),)


def experiment() -> Experiment:
    return Experiment(
        model=Model(
            width=1536,
            depth=24,
            mixers=(Miras(variants.yaad(), num_heads=16),),
            compute_dtype="bfloat16",
            remat="block",
        ),
        data=TextFiles(
            train=TRAIN,
            heldout=HELDOUT,
            context_length=4096,
            tokenizer=BPE(vocab_size=32_000),
        ),
        optimizer=AdamW(learning_rate=1.25e-3, warmup_steps=1000),
        steps=60_000,  # 30 billion tokens
        batch_size=128,
        evaluate_every=1000,
        evaluate_windows=256,
        checkpoint_every=1000,
        # Parameters over 32 devices, not over all: the compiler sends less then.
        mesh=Mesh(data=-1, fsdp=32),
    )
