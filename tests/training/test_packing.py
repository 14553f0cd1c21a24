"""Documents packed into windows: aligned, whole, and without loss across borders."""

from pathlib import Path

import jax
import numpy as np
import pytest

from miras_jax import Rule, memory
from miras_jax.errors import UserError
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training.batches import heldout_batches, train_batches
from miras_jax.training.config import Experiment
from miras_jax.training.data import TextFiles
from miras_jax.training.loss import loss_and_gradients, token_losses
from miras_jax.training.packing import PackedWindows
from miras_jax.training.prepare import load, prepare
from miras_jax.training.tokenizer import Bytes
from tests.core import jit

END = 0
LENGTHS = (5, 8, 1, 21, 3)


def corpus():
    """Documents of these lengths; their ids are all different and never END."""
    ids = iter(range(1, 1000))
    documents = [[END, *(next(ids) for _ in range(n - 1))] for n in LENGTHS]
    return np.concatenate(documents).astype(np.uint16)


@pytest.mark.parametrize("context_length, alignment", [(8, 4), (16, 8), (7, 1)])
def test_windows_hold_aligned_documents_and_predict_each_token_once(
    context_length, alignment
):
    tokens = corpus()
    windows = PackedWindows(tokens, context_length, alignment, END)
    rows = np.stack([windows[i] for i in range(len(windows))])
    assert rows.dtype == np.int32
    # The layout again, from windows that share their border token.
    ids, segments = (rows[:, i, :-1].ravel() for i in (0, 1))
    starts = np.flatnonzero((segments != 0) & (np.diff(segments, prepend=0) != 0))
    assert np.all(starts % alignment == 0)
    for number, document in enumerate(np.split(tokens, np.cumsum(LENGTHS)[:-1])):
        np.testing.assert_array_equal(ids[segments == number + 1], document)
    assert np.all(ids[segments == 0] == END)
    assert np.all(rows[:-1, :, -1] == rows[1:, :, 0])

    predicted = rows[:, 0, 1:][rows[:, 1, :-1] != 0]
    others = predicted[predicted != END]
    np.testing.assert_array_equal(others, tokens[tokens != END])
    # And the end of each document; the text itself has none after the last.
    assert np.sum(predicted == END) == len(LENGTHS)
    assert sum(windows.weights(row).sum() for row in rows) == len(tokens) - 1
    with pytest.raises(IndexError):
        windows[len(windows)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for i in range(7):
        Path(f"text/{i}.txt").write_text("word " * (3 * i + 1))
    Path("held.txt").write_text("held out " * 3)
    return TextFiles(("text/*.txt",), ("held.txt",), 16, Bytes(), documents="packed")


def test_batches_of_packed_documents_resume_exactly(config):
    prepared = prepare(config, "data")

    def batches():
        return train_batches(prepared, batch_size=2, seed=1, alignment=8)

    whole = batches()
    first = [next(whole) for _ in range(3)]
    state = whole.get_state()
    rest = [next(whole) for _ in range(6)]
    assert first[0].shape == (2, 2, 17)
    again = batches()
    again.set_state(state)
    for expected in rest:
        np.testing.assert_array_equal(next(again), expected)
    whole.close(), again.close()

    assert load("data").documents == "packed"
    joined = prepare(TextFiles(config.train, config.heldout, 16, Bytes()), "joined")
    assert joined.fingerprint != prepared.fingerprint
    total = 0
    for tokens, weights in heldout_batches(prepared, 2, alignment=8):
        assert tokens.shape == (2, 2, 17)
        total += weights.sum()
    assert total == len(prepared.heldout) - 1


def test_the_loss_of_a_packed_row_is_that_of_its_documents():
    mixer = Miras(Rule(memory.Linear(), chunk_size=4), num_heads=2)
    model = FunctionalModel(Model(width=16, depth=1, mixers=(mixer,), hidden=16), 40)
    parameters = model.init(jax.random.key(0))
    tokens = corpus()[: sum(LENGTHS[:2])]
    windows = PackedWindows(tokens, 16, 4, END)
    assert len(windows) == 1
    loss = jit(lambda p, rows: loss_and_gradients(model, p, rows)[0][0])
    alone = jit(lambda p, row: token_losses(model, p, row)[0])
    losses = []
    for document in np.split(tokens, LENGTHS[:1]):
        row = np.append(document, END)[None].astype(np.int32)
        losses.append(np.asarray(alone(parameters, row)).ravel())
    expected = np.mean(np.concatenate(losses))
    assert loss(parameters, windows[0][None]) == pytest.approx(expected, rel=1e-5)


def test_a_context_that_is_no_multiple_of_the_chunks_is_refused(config):
    model = Model(depth=1, mixers=(Miras(Rule(memory.Linear(), chunk_size=24)),))
    with pytest.raises(UserError, match="Use 24"):
        Experiment(model, config, steps=1, batch_size=1)
    with pytest.raises(UserError, match="packed"):
        TextFiles(("a",), ("b",), 8, Bytes(), documents="apart")
