"""A trained model as one file: the same model read back, and what cannot be read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import miras_jax
from miras_jax import export
from miras_jax.core import variants
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.optimizer import AdamW
from miras_jax.training.tokenizer import BPE, ByteTokenizer

TEXT = "It was a truth that a single man must be in want of a wife. "
MODEL = Model(
    width=32, depth=2, mixers=(Miras(variants.memora(), 2), Attention(2, window=8))
)


def trained(words):
    model = FunctionalModel(MODEL, words.vocab_size)
    return export.Trained(model, model.init(jax.random.key(3)), words, 70)


@pytest.fixture(scope="module")
def bytewise():
    return trained(ByteTokenizer())


@pytest.fixture
def file(bytewise, tmp_path):
    path = tmp_path / "model.safetensors"
    export.save(bytewise, path)
    return path


@pytest.mark.parametrize("words", [ByteTokenizer(), BPE(300).train([TEXT * 20])])
def test_a_model_comes_back_as_it_was(words, tmp_path):
    saved = trained(words)
    path = tmp_path / "new folder" / "model.safetensors"
    export.save(saved, path)
    read = export.load(path)
    assert (read.model.config, read.step) == (MODEL, 70)
    np.testing.assert_array_equal(read.tokenizer.encode(TEXT), words.encode(TEXT))
    assert read.parameters.keys() == saved.parameters.keys()
    for name, array in saved.parameters.items():
        assert read.parameters[name].dtype == array.dtype
        np.testing.assert_array_equal(read.parameters[name], array, err_msg=name)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_model_read_back_computes_the_same(bytewise, file):
    tokens = jnp.asarray(bytewise.tokenizer.encode(TEXT))[None]
    read = export.load(file)
    logits, again = (
        jax.jit(each.model.apply)(each.parameters, tokens)[0]
        for each in (bytewise, read)
    )
    np.testing.assert_array_equal(logits, again)


def test_other_readers_find_arrays_and_what_they_mean(bytewise, file):
    arrays = load_file(file)
    assert {name: a.shape for name, a in arrays.items()} == {
        name: shape.shape for name, shape in bytewise.model.shapes.items()
    }
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
    assert metadata["miras_jax"] == miras_jax.__version__
    axes = json.loads(metadata["axes"])
    assert {name: len(a) for name, a in axes.items()} == {
        name: a.ndim for name, a in arrays.items()
    }
    assert axes["embedding"][0] == "vocab"
    assert axes["groups/blocks/0/mixer/qkv/weight"][0] == "layers"
    assert json.loads(metadata["model"])["width"] == 32


def test_a_file_is_never_overwritten(bytewise, file):
    before = file.read_bytes()
    with pytest.raises(UserError, match="exists; remove it first"):
        export.save(bytewise, file)
    assert file.read_bytes() == before


def test_an_interrupted_export_leaves_nothing(bytewise, tmp_path, monkeypatch):
    def interrupted(arrays, path, metadata):
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.save(bytewise, tmp_path / "model.safetensors")
    assert not [*tmp_path.iterdir()]


def test_another_suffix_is_refused(bytewise, tmp_path):
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        export.save(bytewise, tmp_path / "model.npz")


def altered(file, arrays=None, **changes):
    """The same file with other arrays or metadata."""
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata() | changes
    kept = {name: text for name, text in metadata.items() if text is not None}
    save_file(load_file(file) if arrays is None else arrays, file, kept)


def test_what_cannot_be_read_says_why(file):
    with pytest.raises(UserError, match="is no file; miras export WORKDIR writes one"):
        export.load(file.with_name("none.safetensors"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cannot be read: .*; export it again"):
        export.load(file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        export.load(file)
    file.write_bytes(whole)
    altered(file, miras_jax=None)
    with pytest.raises(UserError, match="was not written by miras export"):
        export.load(file)


def test_what_describes_no_model_that_is_here_says_why(bytewise, file):
    arrays = load_file(file)
    altered(file, arrays={name: arrays[name] for name in [*arrays][1:]})
    with pytest.raises(UserError, match=f"does not fit .* {[*arrays][0]}: saved noth"):
        export.load(file)
    kind = f"{AdamW.__module__}.{AdamW.__name__}"
    altered(file, model=json.dumps({"is": kind}))
    with pytest.raises(UserError, match="no readable model in it: it is the AdamW"):
        export.load(file)
    altered(file, model=json.dumps({"is": "miras_jax.nowhere.Model"}))
    with pytest.raises(UserError, match="which cannot be imported here"):
        export.load(file)
    whole = file.with_name("whole.safetensors")
    export.save(bytewise, whole)
    for damage in ({"step": None}, {"tokenizer": None}, {"tokenizer": "{"}):
        file.write_bytes(whole.read_bytes())
        altered(file, **damage)
        with pytest.raises(UserError, match="no readable model in it"):
            export.load(file)
    altered(file, model="{")
    with pytest.raises(UserError, match="no readable model in it"):
        export.load(file)
