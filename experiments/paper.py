"""The paper's three models at its sizes, for a slice of TPUs.

    miras compile experiments/paper.py:yaad_780m --slice v5e:8x8

says without a TPU what one needs; experiments/README.md has what it printed. `TRAIN`
and `HELDOUT` are the novels of the quickstart, a stand-in that is far too small for
such models: put texts of your own there (docs/data.md), then

    miras train experiments/paper.py:yaad_780m --distributed

on every host of the slice. NAME is moneta, yaad or memora, and a size: 170m, 340m, 780m
or 1300m. Sizes and learning rates are the paper's (Table 5), 1.3B's, which it leaves
out, those of Atlas (arXiv 2505.23735, Table 7) but for the heads: 16 of 128 channels in
place of 8 of 256, whose kernel needs more VMEM than kernels here may use. Context and
batch (4,096 tokens, half a million per step) are those of Titans, on which it builds.
"""

from typing import NamedTuple

from experiments.quickstart import AUSTEN
from experiments.quickstart import TRAIN as NOVELS
from miras_jax import variants
from miras_jax.errors import UserError
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.config import Experiment, Mesh
from miras_jax.training.data import TextFiles
from miras_jax.training.optimizer import AdamW
from miras_jax.training.tokenizer import BPE

TRAIN = tuple(str(AUSTEN / f"{name}.txt") for name in NOVELS)
HELDOUT = (str(AUSTEN / "persuasion.txt"),)
CONTEXT, ROWS = 4096, 128


class Size(NamedTuple):
    """A row of the paper's table of sizes."""

    depth: int
    width: int
    num_heads: int
    learning_rate: float
    tokens: float
    fsdp: int  # devices that share the parameters; more, and the compiler sends more


SIZES = {
    "170m": Size(12, 768, 16, 3e-3, 15e9, fsdp=16),
    "340m": Size(24, 1024, 16, 1.5e-3, 15e9, fsdp=16),
    "780m": Size(24, 1536, 16, 1.25e-3, 30e9, fsdp=32),
    "1300m": Size(18, 2048, 16, 7e-4, 100e9, fsdp=32),
}
RULES = {"moneta": variants.moneta, "yaad": variants.yaad, "memora": variants.memora}


def experiment(name: str) -> Experiment:
    model, _, size = name.partition("_")
    if model not in RULES or size not in SIZES:
        raise UserError(
            f"{name!r} is none of the paper's models: it is one of {', '.join(RULES)}, "
            f"an underscore, and one of {', '.join(SIZES)}"
        )
    row = SIZES[size]
    return Experiment(
        model=Model(
            width=row.width,
            depth=row.depth,
            mixers=(Miras(RULES[model](), row.num_heads),),
            compute_dtype="bfloat16",
            remat="block",
        ),
        data=TextFiles(
            train=TRAIN,
            heldout=HELDOUT,
            context_length=CONTEXT,
            tokenizer=BPE(vocab_size=32_000),
        ),
        optimizer=AdamW(learning_rate=row.learning_rate, warmup_steps=1000),
        steps=round(row.tokens / (ROWS * CONTEXT)),
        batch_size=ROWS,
        evaluate_every=1000,
        evaluate_windows=256,
        checkpoint_every=1000,
        mesh=Mesh(data=-1, fsdp=row.fsdp),
    )
