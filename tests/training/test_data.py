"""Batches: each token once, and one stream after any restart on any shards."""

import json

import numpy as np
import pytest

from miras_jax.errors import UserError
from miras_jax.training.batches import heldout_batches, train_batches
from miras_jax.training.data import Prepared, Windows
from miras_jax.training.tokenizer import Bytes


def counting(tokens: int, context_length: int = 8) -> Prepared:
    """A corpus whose ids are their own positions, so that batches show their origin."""
    stream = np.arange(tokens, dtype=np.uint16)
    byte = Bytes().train([])
    return Prepared(byte, context_length, stream, stream, tokens, tokens, 1, "")


def each_predicted_once(windows: Windows, tokens: int) -> bool:
    """Whether the windows predict 1, 2, ... from 0, 1, ..., each position once."""
    rows = np.stack([windows[i] for i in range(len(windows))])
    covered = rows[:, 1:].ravel()
    left = (tokens - 1) % (rows.shape[1] - 1)
    return (
        np.array_equal(rows[:, :-1] + 1, rows[:, 1:])
        and sorted(covered) == list(range(1, tokens - left))
        and left < rows.shape[1] - 1
    )


@pytest.mark.parametrize("tokens", [9, 16, 17, 18, 100])
def test_windows_predict_every_token_once(tokens):
    windows = Windows(np.arange(tokens, dtype=np.uint16), 8)
    assert each_predicted_once(windows, tokens)
    assert windows[0].dtype == np.int32
    assert [len(window) for window in windows] == [9] * ((tokens - 1) // 8)


@pytest.mark.parametrize("stride", [7, 9])
def test_a_wrong_stride_would_be_seen(stride):
    class OffByOne(Windows):
        def __len__(self):
            return (100 - 1) // stride

        def __getitem__(self, index):
            return np.arange(index * stride, index * stride + 9, dtype=np.int32)

    assert not each_predicted_once(OffByOne(np.arange(100), 8), 100)


def take(iterator, steps: int) -> np.ndarray:
    return np.stack([next(iterator) for _ in range(steps)])


def test_an_epoch_is_a_permutation_and_the_next_another():
    batches = train_batches(counting(97), batch_size=4, seed=0)
    first, second = take(batches, 3), take(batches, 3)
    assert first.dtype == np.int32
    assert first.shape == (3, 4, 9)
    for epoch in (first, second):
        assert sorted(epoch[:, :, 0].ravel()) == list(range(0, 96, 8))
    assert first.tolist() != second.tolist()
    assert first[:, :, 0].ravel().tolist() != list(range(0, 96, 8))


def test_seeds_decide_the_order():
    prepared = counting(401)
    first = take(train_batches(prepared, batch_size=4, seed=0), 5)
    again = take(train_batches(prepared, batch_size=4, seed=0), 5)
    other = take(train_batches(prepared, batch_size=4, seed=1), 5)
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_resume_continues_exactly(steps):
    prepared = counting(150)
    running = train_batches(prepared, batch_size=4, seed=3)
    for _ in range(steps):
        next(running)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 12)
    fresh = train_batches(prepared, batch_size=4, seed=3)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, 12), expected)
    late = train_batches(prepared, batch_size=4, seed=3)
    late.set_state({name: value + 4 for name, value in state.items()})
    assert take(late, 12).tolist() != expected.tolist()


@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_resume_on_other_shards_is_the_same_global_stream(shard_count):
    prepared = counting(150)
    running = [
        train_batches(prepared, batch_size=4, seed=3, shard_index=i, shard_count=2)
        for i in range(2)
    ]
    for shard in running:
        take(shard, 3)
    state = running[0].get_state()
    assert running[1].get_state() == state
    whole = train_batches(prepared, batch_size=4, seed=3)
    take(whole, 3)
    expected = take(whole, 6)
    union = np.zeros_like(expected)
    for i in range(shard_count):
        shard = train_batches(
            prepared, batch_size=4, seed=3, shard_index=i, shard_count=shard_count
        )
        shard.set_state(state)
        union[:, i::shard_count] = take(shard, 6)
    np.testing.assert_array_equal(union, expected)


@pytest.mark.parametrize("tokens", [3, 9, 10, 97, 100])
@pytest.mark.parametrize("shard_count", [1, 2])
def test_heldout_covers_every_token_once(tokens, shard_count):
    prepared = counting(tokens)
    shards = [
        list(heldout_batches(prepared, 4, shard_index=i, shard_count=shard_count))
        for i in range(shard_count)
    ]
    assert len({len(batches) for batches in shards}) == 1
    counts = np.zeros(tokens, int)
    for tokens_BL, weights_BL in (batch for batches in shards for batch in batches):
        assert tokens_BL.shape == (4 // shard_count, 9)
        assert weights_BL.shape == (4 // shard_count, 8)
        assert (tokens_BL.dtype, weights_BL.dtype) == (np.int32, np.float32)
        real = weights_BL == 1
        assert np.all(real | (weights_BL == 0))
        np.testing.assert_array_equal(
            tokens_BL[:, :-1][real] + 1, tokens_BL[:, 1:][real]
        )
        np.add.at(counts, tokens_BL[:, 1:][real], 1)
    assert counts.tolist() == [0] + [1] * (tokens - 1)


def test_heldout_is_in_order():
    starts = [t[:, 0] for t, _ in heldout_batches(counting(97), 4)]
    assert np.concatenate(starts).tolist() == list(range(0, 96, 8))


@pytest.mark.parametrize(
    "limit, windows",
    [(1, [0]), (3, [0, 4, 8]), (5, [0, 2, 4, 7, 9]), (12, range(12)), (50, range(12))],
)
def test_limit_spreads_windows_evenly(limit, windows):
    batches = list(heldout_batches(counting(97), 4, limit=limit))
    tokens = np.concatenate([t for t, _ in batches])
    weights = np.concatenate([w for _, w in batches])
    real = weights.any(axis=1)
    assert tokens[real, 0].tolist() == [8 * window for window in windows]
    assert weights.sum() == 8 * len(windows)


def test_a_batch_must_fit_the_windows():
    train_batches(counting(33), batch_size=4, seed=0)
    with pytest.raises(UserError, match="only 4 windows of 8 tokens"):
        train_batches(counting(33), batch_size=5, seed=0)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_batch_must_fit_the_shards(batch_size):
    message = f"batch_size={batch_size} cannot be split evenly over 2 shards"
    with pytest.raises(UserError, match=message):
        train_batches(counting(97), batch_size=batch_size, seed=0, shard_count=2)
    with pytest.raises(UserError, match=message):
        heldout_batches(counting(97), batch_size, shard_count=2)


def test_a_shard_must_exist():
    with pytest.raises(ValueError, match="shard_index 2"):
        heldout_batches(counting(97), 4, shard_index=2, shard_count=2)


def test_a_limit_must_leave_a_window():
    with pytest.raises(UserError, match="limit=0 leaves no held-out window"):
        heldout_batches(counting(97), 4, limit=0)
