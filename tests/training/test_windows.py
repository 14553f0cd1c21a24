"""Consecutive windows: rows walk through the text, and the state is carried along."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from miras_jax import Rule, memory
from miras_jax.errors import UserError
from miras_jax.nn.attention import Attention
from miras_jax.nn.functional import FunctionalModel
from miras_jax.nn.miras import Miras
from miras_jax.nn.model import Model
from miras_jax.training import step
from miras_jax.training import train as train_module
from miras_jax.training.batches import train_batches
from miras_jax.training.config import Guard
from miras_jax.training.loss import token_losses
from miras_jax.training.packing import PackedWindows
from miras_jax.training.step import Walk
from miras_jax.training.train import train
from miras_jax.training.windows import Walks, Windows, heldout_plan
from tests.core import error, jit
from tests.training.runs import SharedRun, bits, tiny
from tests.training.test_data import counting, take

END, BATCH, LENGTH = 0, 2, 8
MIXERS = (
    Miras(Rule(memory.Linear(), chunk_size=4), num_heads=2),
    Attention(num_heads=2, window=11),
)
MODEL = Model(width=16, depth=2, mixers=MIXERS, hidden=16)


@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_rows_walk_through_the_text_on_any_number_of_shards(shard_count):
    """Each from its own share on, over the end to the beginning, a new document."""
    prepared = counting(10 * 8 + 3)
    size = 4 // shard_count

    def shards():
        return [
            train_batches(
                prepared,
                batch_size=4,
                seed=0,
                shard_index=i,
                shard_count=shard_count,
                walking=range(i * size, (i + 1) * size),
            )
            for i in range(shard_count)
        ]

    running = shards()
    rows = np.concatenate([take(shard, 25) for shard in running], axis=1)
    assert rows.shape == (25, 4, 2, 9) and rows.dtype == np.int32
    first = np.array([0, 2, 5, 7])
    places = first + np.arange(25)[:, None]
    np.testing.assert_array_equal(rows[:, :, 0, 0], 8 * (places % 10))
    np.testing.assert_array_equal(rows[:, :, 0, 1:], rows[:, :, 0, :1] + range(1, 9))
    ids = rows[:, :, 1]
    assert np.all(ids == ids[:, :, :1])
    changed = ids[1:, :, 0] != ids[:-1, :, 0]
    np.testing.assert_array_equal(changed, places[1:] % 10 == 0)

    state = json.loads(json.dumps(running[0].get_state()))
    expected = np.concatenate([take(shard, 3) for shard in running], axis=1)
    again = shards()
    for shard in again:
        shard.set_state(state)
    found = np.concatenate([take(shard, 3) for shard in again], axis=1)
    np.testing.assert_array_equal(found, expected)


def test_a_text_of_one_document_begins_anew_after_its_end():
    tokens = np.append(END, np.arange(1, 24))
    walks = Walks(PackedWindows(tokens, 8, 4, END), 1, range(1))
    ids = [set(walks[step][1, :-1].tolist()) for step in range(len(walks))]
    assert ids == 3 * [{1}] + 3 * [{2}]


@pytest.mark.parametrize("count, kept", [(1, 1), (7, 7), (12, 12), (7, 5), (9, 2)])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
def test_the_heldout_windows_are_read_in_order_and_once(count, kept, batch_size):
    plan = heldout_plan(count, kept, batch_size, consecutive=True)
    real = plan[plan >= 0]
    assert len(set(real)) == len(real) <= kept
    assert len(real) == kept or kept < count
    for row in plan.T:
        row = row[: np.count_nonzero(row >= 0)]
        assert np.all(np.diff(row) == 1) and np.all(row >= 0)


STILL, WALK = optax.set_to_zero(), Walk(BATCH, LENGTH)


@functools.cache
def program(model):
    """A step that changes no parameters, compiled once."""
    take_step = functools.partial(
        step.train_step, model, STILL, lambda n: 0.0, Guard(), WALK, 1
    )
    return jit(lambda state, tokens: take_step(state, tokens, jnp.zeros(1)))


def stepped(model, rows):
    """Losses and gradient norms of steps over rows `[S, B, 2, L + 1]`, the state."""
    state = step.init_state(model, STILL, WALK, jax.random.key(0))
    found = []
    for tokens in rows:
        state, metrics = program(model)(state, tokens)
        found.append((metrics.loss, metrics.gradient_norm))
    return (*np.array(found).T, state)


@pytest.fixture(scope="module")
def model():
    return FunctionalModel(MODEL, 60)


@pytest.fixture(scope="module")
def walked(model):
    """Three steps of two rows through one text, and the rows in one piece."""
    tokens = np.random.default_rng(0).integers(1, 60, 6 * LENGTH + 1).astype(np.uint16)
    walks = Walks(Windows(tokens, LENGTH), BATCH, range(BATCH))
    rows = np.stack([[walks[BATCH * s + r] for r in range(BATCH)] for s in range(3)])
    size = 3 * LENGTH
    whole = np.stack([tokens[r * size :][: size + 1] for r in range(BATCH)])
    return stepped(model, rows), whole.astype(np.int32)


def test_windows_are_read_as_one_text(model, walked):
    (losses, _, state), whole = walked
    expected, _ = jit(lambda p, rows: token_losses(model, p, rows))(
        state.parameters, whole
    )
    expected = np.asarray(expected).reshape(BATCH, 3, LENGTH).mean((0, 2))
    assert error(losses, expected) < 1e-6
    indices = [cache.last.index for cache in state.carry]
    assert np.all(np.array(indices) == 3 * LENGTH)


def test_gradients_end_at_the_windows_edge(model, walked):
    (_, norms, state), whole = walked

    def norm_of(cut):
        def loss(parameters):
            cache = model.start(parameters, BATCH, LENGTH)
            _, cache = model.apply(parameters, whole[:, :LENGTH], cache)
            second = whole[:, LENGTH : 2 * LENGTH + 1]
            losses, _ = token_losses(model, parameters, second, cut(cache))
            return jnp.mean(losses)

        return optax.tree.norm(jit(jax.grad(loss))(state.parameters)).item()

    expected = norm_of(jax.lax.stop_gradient)
    assert norms[1] == pytest.approx(expected, rel=1e-5)
    assert norms[1] != pytest.approx(norm_of(lambda cache: cache), rel=1e-3)


def test_documents_begin_anew_wherever_windows_are_cut(model):
    """Packed documents over consecutive windows lose what they lose alone."""
    lengths = (5, 20, 11, 9)
    rng = np.random.default_rng(1)
    documents = [np.append(END, rng.integers(1, 60, n - 1)) for n in lengths]
    windows = PackedWindows(np.concatenate(documents), LENGTH, 4, END)
    assert len(windows) == 7
    walks = Walks(windows, 1, range(1))
    # Twice the text, and both rows the same.
    rows = np.stack([[walks[s]] * BATCH for s in range(14)])
    losses, _, state = stepped(model, rows)
    counts = np.sum(rows[:, 0, 1, :-1] != 0, axis=1)
    total = 0.0
    alone = jit(lambda p, row: token_losses(model, p, row)[0])
    for document in documents:
        row = np.append(document, END)[None].astype(np.int32)
        total += np.sum(np.asarray(alone(state.parameters, row)))
    for passed in (slice(7), slice(7, 14)):
        assert np.sum((losses * counts)[passed]) == pytest.approx(total, rel=1e-5)


def test_a_skipped_step_begins_all_rows_anew(model):
    rows = np.ones((3, BATCH, 2, LENGTH + 1), np.int32)
    rows[1, 0, 0, 3] = 10**6  # its loss is NaN
    losses, _, state = stepped(model, rows)
    assert np.isfinite(losses).tolist() == [True, False, True]
    assert all(np.all(cache.last.index == LENGTH) for cache in state.carry)


def consecutive(folder):
    return tiny(folder, model=MODEL, windows="consecutive", checkpoint_every=2)


def test_a_run_that_is_cut_off_goes_on_with_its_state(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "Run", SharedRun)
    experiment = consecutive(tmp_path)

    def crash():
        raise RuntimeError

    result = train(experiment, tmp_path / "whole")
    monkeypatch.setattr(SharedRun, "events", {("step", 7): crash})
    with pytest.raises(RuntimeError):
        train(experiment, tmp_path / "cut")
    monkeypatch.setattr(SharedRun, "events", {})
    middle = SharedRun(experiment, tmp_path / "cut").restore("last")
    assert middle.step < 7
    assert train(experiment, tmp_path / "cut") == result
    whole, cut = (
        SharedRun(experiment, tmp_path / name).restore("last")
        for name in ("whole", "cut")
    )
    assert bits(whole.state) == bits(cut.state) and whole.data == cut.data
    indices = [cache.last.index for cache in cut.state.carry]
    assert np.all(np.array(indices) == 12 * 32)
    # The state has a part in what comes after it.
    assert bits(whole.state.carry) != bits(middle.state.carry)

    run = SharedRun(experiment, tmp_path / "cut")
    totals = run.evaluate(cut.state.parameters)
    count = len(run.prepared.heldout) - 1
    assert totals.counts.sum() == count and len(totals.losses) > 32
    assert totals.loss == result.heldout_loss


def test_windows_must_begin_where_chunks_do(tmp_path):
    with pytest.raises(UserError, match="Consecutive windows begin at multiples of 4"):
        shorter = dataclasses.replace(consecutive(tmp_path).data, context_length=30)
        dataclasses.replace(consecutive(tmp_path), data=shorter)
    with pytest.raises(UserError, match="'shuffled' or 'consecutive'; got 'both'"):
        tiny(tmp_path, windows="both")
