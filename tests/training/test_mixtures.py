"""Mixtures: every part has its share, and one stream after any restart."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from miras_jax.errors import UserError
from miras_jax.nn.model import Model
from miras_jax.training import prepare as module
from miras_jax.training import serial
from miras_jax.training.batches import train_batches
from miras_jax.training.config import Experiment
from miras_jax.training.data import TextFiles
from miras_jax.training.hashes import seal
from miras_jax.training.prepare import prepare
from miras_jax.training.tokenizer import Bytes

LENGTH = 8


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Parts of 160, 40 and 80 windows, of one, two and ten documents."""
    monkeypatch.chdir(tmp_path)
    Path("held.txt").write_text("held out")
    Path("a.txt").write_text("a" * 160 * LENGTH)
    for i in range(2):
        Path(f"b{i}.txt").write_text("b" * (20 * LENGTH))
    Path("c.jsonl").write_text(f'{{"text": "{"c" * (LENGTH * 8 - 1)}"}}\n' * 10)
    train = ("a.txt", "b*.txt", "c.jsonl")
    return TextFiles(train, ("held.txt",), LENGTH, Bytes(), shares=(0.5, 0.4, 0.1))


def batches(prepared, **options):
    return train_batches(prepared, batch_size=4, seed=1, **options)


def take(iterator, steps: int) -> np.ndarray:
    return np.stack([next(iterator) for _ in range(steps)])


def letters(rows: np.ndarray) -> Counter:
    """How many windows are of which part, by the only letter in them."""
    found = [set(row[row != 256].tolist()) for row in rows.reshape(-1, rows.shape[-1])]
    assert all(len(letters) == 1 for letters in found)
    return Counter(chr(letters.pop()) for letters in found)


def test_parts_have_their_shares(config):
    windows = take(batches(prepare(config, "out")), 100)
    assert windows.shape == (100, 4, LENGTH + 1)
    counts = letters(windows)
    for letter, share in zip("abc", config.shares, strict=True):
        assert counts[letter] == pytest.approx(share * 400, abs=1)
    # Also over a short stretch.
    assert letters(windows[50:60])["b"] in (15, 16, 17)


def test_packed_documents_are_mixed_too(config):
    packed = prepare(dataclasses.replace(config, documents="packed"), "out")
    windows = take(batches(packed, alignment=4), 100)
    assert letters(windows[:, :, 0]) == {"a": 200, "b": 160, "c": 40}
    assert windows[:, :, 1].max() == 10


def starts(config):
    """A prepared corpus of counted tokens, so that windows tell where they are from."""
    prepared = prepare(config, "out")
    numbered = np.arange(len(prepared.train), dtype=np.uint32)
    return dataclasses.replace(prepared, train=numbered)


def test_each_part_has_epochs_of_its_own(config):
    prepared = starts(config)
    firsts = take(batches(prepared), 200)[:, :, 0].ravel()
    epochs_of = []
    for part in prepared.parts:
        inside = firsts[(firsts >= part.begin) & (firsts < part.end)]
        size = (part.end - part.begin - 1) // LENGTH
        whole = inside[: len(inside) // size * size].reshape(-1, size)
        every = np.arange(part.begin, part.begin + size * LENGTH, LENGTH)
        for epoch in whole:
            np.testing.assert_array_equal(np.sort(epoch), every)
        assert len(np.unique(whole, axis=0)) == len(whole)
        epochs_of.append(len(whole))
    assert epochs_of == [2, 8, 1]


@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_a_mixture_resumes_exactly_on_any_shards(config, shard_count):
    prepared = starts(config)
    running = batches(prepared)
    take(running, 57)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 60)
    union = np.zeros_like(expected)
    for i in range(shard_count):
        shard = batches(prepared, shard_index=i, shard_count=shard_count)
        shard.set_state(state)
        union[:, i::shard_count] = take(shard, 60)
    np.testing.assert_array_equal(union, expected)


def test_shares_change_nothing_that_is_prepared(config, monkeypatch):
    first = prepare(config, "out")
    monkeypatch.setattr(module, "_tokenise", None)
    other = prepare(dataclasses.replace(config, shares=(0.2, 0.2, 0.6)), "out")
    assert [part.share for part in other.parts] == [0.2, 0.2, 0.6]
    assert [part[:2] for part in other.parts] == [part[:2] for part in first.parts]
    assert prepare(dataclasses.replace(config, shares=()), "out").parts == ()


def test_a_file_of_two_patterns_is_of_the_first(config):
    twice = dataclasses.replace(config, train=("a.txt", "*[0-9a].txt", "c.jsonl"))
    prepared = prepare(twice, "out")
    assert prepared.parts == prepare(config, "other").parts


def test_a_folder_that_does_not_tell_the_parts_is_prepared_again(config):
    prepare(config, "out")
    record = json.loads(Path("out/prepared.json").read_text())
    for split in ("train", "heldout"):
        del record["outputs"][f"{split}.starts.npy"], record[split]["documents"]
    record["seal"] = seal(record)
    Path("out/prepared.json").write_text(json.dumps(record))
    assert prepare(dataclasses.replace(config, shares=()), "out").train_starts is None
    assert len(prepare(config, "out").parts) == 3


def fails(match):
    return pytest.raises(UserError, match=match)


def test_shares_must_fit_the_patterns(config):
    with fails("shares has 2 numbers for 3 patterns in train"):
        dataclasses.replace(config, shares=(0.5, 0.5))
    for shares in [(0.5, 0.5, 0.0), (0.5, 0.4, 0.2), (1.5, -1.0, 0.5)]:
        with fails("positive numbers whose sum is 1"):
            dataclasses.replace(config, shares=shares)


def test_a_part_needs_a_window(config):
    Path("a.txt").write_text("short")
    with fails(r"train\[0\] has a share .* not one window of 8 tokens"):
        batches(prepare(config, "out"))


def test_consecutive_windows_are_not_mixed(config):
    with fails("shares mixes shuffled windows"):
        Experiment(Model(depth=1), config, 1, 1, windows="consecutive")


def test_what_was_stored_before_shares_means_the_same(config):
    plain = dataclasses.replace(config, shares=())
    stored = serial.to_json(plain)
    del stored["shares"], stored["field"]
    assert serial.from_json(serial.with_new_fields(stored)) == plain
    assert serial.from_json(serial.to_json(config)) == config


def test_without_shares_the_order_is_as_it_was(config):
    """A run that goes on reads the windows that it would have read before."""
    plain = starts(dataclasses.replace(config, shares=()))
    windows = take(batches(plain), 2)
    expected = [[107, 46, 203, 114], [238, 251, 135, 212]]
    assert (windows[:, :, 0] // LENGTH).tolist() == expected
