"""Commands as they are typed, and a small run that they are tried on."""

import contextlib
import io
import re
import textwrap

import pytest

from miras_jax.cli import main

TRAIN = "It was a truth that a single man must be in want of a wife. " * 40
HELDOUT = "A single man of large fortune; what a fine thing for our girls! " * 9
EXPERIMENT = textwrap.dedent(
    """
    from miras_jax import variants
    from miras_jax.nn.miras import Miras
    from miras_jax.nn.model import Model
    from miras_jax.training.config import Experiment
    from miras_jax.training.optimizer import AdamW
    from miras_jax.training.data import TextFiles
    from miras_jax.training.tokenizer import Bytes

    def experiment():
        return Experiment(
            model=Model(width=32, depth=1, mixers=(Miras(variants.retnet(), 2),)),
            data=TextFiles(
                train=("FOLDER/train.txt",),
                heldout=("FOLDER/heldout.txt",),
                context_length=32,
                tokenizer=Bytes(),
            ),
            optimizer=AdamW(learning_rate=1e-2, warmup_steps=2),
            steps=6,
            batch_size=8,
            evaluate_every=3,
            checkpoint_every=3,
        )
    """
)


def command(*argv):
    """Exit status, standard output and standard error of one command."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "as the tests have it")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(part) for part in argv])
    return status, out.getvalue(), err.getvalue()


def refused(*argv):
    status, out, err = command(*argv)
    assert (status, out) == (2, "") and err.count("\n") == 1
    return err


def number(text, name):
    return float(re.search(rf"^ *{name} +([\d.,]+)", text, re.M)[1].replace(",", ""))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Texts and the experiment file."""
    folder = tmp_path_factory.mktemp("experiment")
    (folder / "train.txt").write_text(TRAIN)
    (folder / "heldout.txt").write_text(HELDOUT)
    (folder / "tiny.py").write_text(EXPERIMENT.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture(scope="session")
def trained(folder):
    """The folder of a finished run, and what training printed."""
    workdir = folder / "run"
    status, out, err = command("train", folder / "tiny.py", "--workdir", workdir)
    assert status == 0, err
    return workdir, out, err
