"""Each token once, one stream after any restart, nothing half-written believed."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from miras_jax.errors import UserError
from miras_jax.training import data
from miras_jax.training.data import TextFiles, Windows, prepare
from miras_jax.training.tokenizer import BPE, Bytes

AUSTEN = Path(__file__).parents[2] / "experiments" / "data" / "austen"
OUTPUTS = ("train.npy", "heldout.npy", "tokenizer.json", "prepared.json")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two training documents and a held-out one, named relative to the directory."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text/a.txt").write_text("The first document, of little weight.\n" * 5)
    Path("text/b.txt").write_text("A second: \u541b\u5b50\u52a1\u672c.\n" * 9)
    Path("held.txt").write_text("Nobody has read this before.\n" * 3)
    return TextFiles(("text/*.txt",), ("held.txt",), 8, Bytes())


def counting(tokens: int, context_length: int = 8) -> data.Prepared:
    """A corpus whose ids are their own positions, so that batches show their origin."""
    stream = np.arange(tokens, dtype=np.uint16)
    byte = Bytes().train([])
    return data.Prepared(byte, context_length, stream, stream, tokens, tokens, 1, "")


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
    batches = data.train_batches(counting(97), batch_size=4, seed=0)
    first, second = take(batches, 3), take(batches, 3)
    assert first.dtype == np.int32
    assert first.shape == (3, 4, 9)
    for epoch in (first, second):
        assert sorted(epoch[:, :, 0].ravel()) == list(range(0, 96, 8))
    assert first.tolist() != second.tolist()
    assert first[:, :, 0].ravel().tolist() != list(range(0, 96, 8))


def test_seeds_decide_the_order():
    prepared = counting(401)
    first = take(data.train_batches(prepared, batch_size=4, seed=0), 5)
    again = take(data.train_batches(prepared, batch_size=4, seed=0), 5)
    other = take(data.train_batches(prepared, batch_size=4, seed=1), 5)
    np.testing.assert_array_equal(first, again)
    assert first.tolist() != other.tolist()


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_resume_continues_exactly(steps):
    prepared = counting(150)
    running = data.train_batches(prepared, batch_size=4, seed=3)
    for _ in range(steps):
        next(running)
    state = json.loads(json.dumps(running.get_state()))
    expected = take(running, 12)
    fresh = data.train_batches(prepared, batch_size=4, seed=3)
    fresh.set_state(state)
    np.testing.assert_array_equal(take(fresh, 12), expected)
    late = data.train_batches(prepared, batch_size=4, seed=3)
    late.set_state({name: value + 4 for name, value in state.items()})
    assert take(late, 12).tolist() != expected.tolist()


@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_resume_on_other_shards_is_the_same_global_stream(shard_count):
    prepared = counting(150)
    running = [
        data.train_batches(prepared, batch_size=4, seed=3, shard_index=i, shard_count=2)
        for i in range(2)
    ]
    for shard in running:
        take(shard, 3)
    state = running[0].get_state()
    assert running[1].get_state() == state
    whole = data.train_batches(prepared, batch_size=4, seed=3)
    take(whole, 3)
    expected = take(whole, 6)
    union = np.zeros_like(expected)
    for i in range(shard_count):
        shard = data.train_batches(
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
        list(data.heldout_batches(prepared, 4, shard_index=i, shard_count=shard_count))
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
    starts = [t[:, 0] for t, _ in data.heldout_batches(counting(97), 4)]
    assert np.concatenate(starts).tolist() == list(range(0, 96, 8))


@pytest.mark.parametrize(
    "limit, windows",
    [(1, [0]), (3, [0, 4, 8]), (5, [0, 2, 4, 7, 9]), (12, range(12)), (50, range(12))],
)
def test_limit_spreads_windows_evenly(limit, windows):
    batches = list(data.heldout_batches(counting(97), 4, limit=limit))
    tokens = np.concatenate([t for t, _ in batches])
    weights = np.concatenate([w for _, w in batches])
    real = weights.any(axis=1)
    assert tokens[real, 0].tolist() == [8 * window for window in windows]
    assert weights.sum() == 8 * len(windows)


@pytest.mark.parametrize("choice", [Bytes(), BPE(vocab_size=300)], ids=repr)
def test_prepare_keeps_the_whole_text(config, choice):
    prepared = prepare(dataclasses.replace(config, tokenizer=choice), "out")
    end = prepared.tokenizer.end_of_text
    assert isinstance(prepared.train, np.memmap)
    assert prepared.train.dtype == np.uint16
    assert prepared.train[0] == prepared.heldout[0] == end
    assert np.count_nonzero(prepared.train == end) == 2
    cut = int(np.flatnonzero(prepared.train == end)[1])
    texts = [path.read_text() for path in sorted(Path("text").iterdir())]
    assert prepared.tokenizer.decode(prepared.train[:cut]) == texts[0]
    assert prepared.tokenizer.decode(prepared.train[cut:]) == texts[1]
    held = Path("held.txt").read_text()
    assert prepared.tokenizer.decode(prepared.heldout) == held
    assert prepared.train_bytes == len("".join(texts).encode())
    assert prepared.heldout_bytes == len(held.encode())
    assert prepared.heldout_words == 15
    assert prepared.context_length == 8


def test_tokenizer_sees_the_training_text_only(config):
    def learned(tokenizer):
        return {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}

    Path("held.txt").write_text("zq " * 99)
    config = dataclasses.replace(config, tokenizer=BPE(400))
    assert b"zq" not in learned(prepare(config, "out").tokenizer)
    swapped = dataclasses.replace(config, train=config.heldout, heldout=config.train)
    assert b"zq" in learned(prepare(swapped, "swapped").tokenizer)


def test_large_vocabularies_get_wide_ids(config, monkeypatch):
    monkeypatch.setattr("miras_jax.training.tokenizer.ByteTokenizer.vocab_size", 65_537)
    assert prepare(config, "out").train.dtype == np.uint32


def times() -> list[int]:
    return [os.stat(Path("out") / name).st_mtime_ns for name in OUTPUTS]


def test_an_equal_preparation_is_reused(config):
    first = prepare(config, "out")
    before = times()
    second = prepare(config, "out")
    assert times() == before
    assert second.fingerprint == first.fingerprint
    np.testing.assert_array_equal(second.train, first.train)
    assert second.heldout_words == first.heldout_words


def test_the_place_of_the_files_does_not_matter(config, tmp_path):
    first = prepare(config, "out")
    before = times()
    Path("text").rename("moved")
    moved = dataclasses.replace(config, train=(str(tmp_path / "moved" / "**"),))
    assert prepare(moved, "out").fingerprint == first.fingerprint
    assert times() == before


def change_text(config):
    Path("text/b.txt").write_text("An entirely new second document.\n" * 9)
    return config


def change_heldout(config):
    Path("held.txt").write_text("Something else altogether.\n" * 3)
    return config


CHANGES = {
    "text": change_text,
    "heldout": change_heldout,
    "order": lambda c: dataclasses.replace(c, train=("text/b.txt", "text/a.txt")),
    "window": lambda c: dataclasses.replace(c, context_length=7),
    "tokenizer": lambda c: dataclasses.replace(c, tokenizer=BPE(300)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_prepared_again(config, change):
    old = prepare(config, "out")
    changed = change(config)
    new = prepare(changed, "out")
    assert new.fingerprint != old.fingerprint
    fresh = prepare(changed, "fresh")
    np.testing.assert_array_equal(new.train, fresh.train)
    np.testing.assert_array_equal(new.heldout, fresh.heldout)
    assert new.context_length == changed.context_length


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_is_repaired(config, name, damage):
    prepare(config, "out")
    path = Path("out") / name
    whole = path.read_bytes()
    if damage == "flip":
        middle = len(whole) // 2
        byte = bytes([whole[middle] ^ 1])
        path.write_bytes(whole[:middle] + byte + whole[middle + 1 :])
    elif damage == "truncate":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.unlink()
    prepare(config, "out")
    assert path.read_bytes() == whole


def test_a_seal_without_its_fields_is_not_believed(config):
    prepare(config, "out")
    path = Path("out/prepared.json")
    whole = path.read_text()
    for content in ["[]", "null", "{}", '"text"', whole.replace("15", "16")]:
        path.write_text(content)
        assert prepare(config, "out").heldout_words == 15
        assert path.read_text() == whole


@pytest.mark.parametrize("moved", range(5))
def test_an_interrupted_preparation_is_not_believed(config, monkeypatch, moved):
    """Stop after 0 to 4 of the files were moved in, over an older preparation."""
    prepare(dataclasses.replace(config, context_length=5, tokenizer=BPE(300)), "out")
    real, done = os.replace, []

    def replace_until(source, target):
        if len(done) == moved:
            raise KeyboardInterrupt
        real(source, target)
        done.append(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until)
        if moved < len(OUTPUTS):
            with pytest.raises(KeyboardInterrupt):
                prepare(config, "out")
        else:
            prepare(config, "out")
    calls = []
    real_tokenise = data._tokenise
    monkeypatch.setattr(
        data, "_tokenise", lambda *args: (calls.append(1), real_tokenise(*args))
    )
    prepared = prepare(config, "out")
    assert len(calls) == (moved < len(OUTPUTS))
    fresh = prepare(config, "fresh")
    np.testing.assert_array_equal(prepared.train, fresh.train)
    np.testing.assert_array_equal(prepared.heldout, fresh.heldout)
    assert prepared.tokenizer.vocab_size == fresh.tokenizer.vocab_size == 257


def test_a_killed_preparation_leaves_no_lock(config):
    script = (
        "import os, signal\n"
        "from miras_jax.training.data import Bytes, TextFiles, prepare\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(TextFiles(('text/*.txt',), ('held.txt',), 8, Bytes()), 'out')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert Path("out/.preparing/prepared.json").exists()
    prepared = prepare(config, "out")
    assert prepared.heldout_words == 15
    assert not Path("out/.preparing").exists()


def test_processes_that_prepare_together_tokenise_once(config, monkeypatch):
    calls, results = [], []
    real = data._tokenise

    def slow(*args):
        calls.append(1)
        time.sleep(0.2)
        real(*args)

    monkeypatch.setattr(data, "_tokenise", slow)
    threads = [
        threading.Thread(target=lambda: results.append(prepare(config, "out")))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({result.fingerprint for result in results}) == 1
    assert len(results) == 3


def fails(match: str):
    return pytest.raises(UserError, match=match)


def test_missing_files_are_named(config):
    with fails(r"no file matches 'nothing/\*\.txt' \(TextFiles\.train\)"):
        prepare(dataclasses.replace(config, train=("nothing/*.txt",)), "out")
    with fails(r"no file matches 'absent\.txt' \(TextFiles\.heldout\)"):
        prepare(dataclasses.replace(config, heldout=("absent.txt",)), "out")


def test_a_single_string_is_not_a_tuple_of_paths(config):
    with fails(r'train=\("text/a\.txt",\)'):
        dataclasses.replace(config, train="text/a.txt")


def test_no_context_is_refused(config):
    with fails("context_length is 0"):
        dataclasses.replace(config, context_length=0)


def test_text_must_be_utf8(config):
    Path("text/b.txt").write_bytes(b"caf\xe9 and more")
    with fails(r"text/b\.txt is not UTF-8 text \(byte 3\)"):
        prepare(config, "out")


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_empty_text_is_refused(config, split):
    Path("empty.txt").write_text("")
    for paths in [("empty.txt",), ()]:
        with fails(f"TextFiles.{split} holds no text"):
            prepare(dataclasses.replace(config, **{split: paths}), "out")


def test_text_must_fill_one_window(config):
    Path("short.txt").write_text("12345678")
    for length, refused in [(8, False), (9, True)]:
        short = dataclasses.replace(config, train=("short.txt",), context_length=length)
        if refused:
            with fails("has 9 tokens, one window needs 10"):
                prepare(short, "out")
        else:
            assert len(prepare(short, "out").train) == 9


def test_heldout_text_must_not_be_trained_on(config):
    Path("text/copy.txt").write_bytes(Path("held.txt").read_bytes())
    with fails("held.txt is held out but its text is also trained on"):
        prepare(config, "out")


def test_the_directory_must_be_writable(config):
    Path("file").write_text("in the way")
    with fails("cannot write prepared data to file/out: Not a directory"):
        prepare(config, "file/out")


def test_a_batch_must_fit_the_windows():
    data.train_batches(counting(33), batch_size=4, seed=0)
    with fails("only 4 windows of 8 tokens"):
        data.train_batches(counting(33), batch_size=5, seed=0)


@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_batch_must_fit_the_shards(batch_size):
    with fails(f"batch_size={batch_size} cannot be split evenly over 2 shards"):
        data.train_batches(counting(97), batch_size=batch_size, seed=0, shard_count=2)
    with fails(f"batch_size={batch_size} cannot be split evenly over 2 shards"):
        data.heldout_batches(counting(97), batch_size, shard_count=2)


def test_a_shard_must_exist():
    with pytest.raises(ValueError, match="shard_index 2"):
        data.heldout_batches(counting(97), 4, shard_index=2, shard_count=2)


def test_a_limit_must_leave_a_window():
    with fails("limit=0 leaves no held-out window"):
        data.heldout_batches(counting(97), 4, limit=0)


def test_errors_are_one_line(config):
    with pytest.raises(UserError) as caught:
        prepare(dataclasses.replace(config, train=("nothing",)), "out")
    assert "\n" not in str(caught.value)


def test_vendored_text_is_whole():
    sums = dict(
        reversed(line.split("  "))
        for line in (AUSTEN / "SHA256SUMS").read_text().splitlines()
    )
    assert {path.name for path in AUSTEN.glob("*.txt")} == set(sums)
    assert len(sums) == 6
    readme = (AUSTEN / "README.md").read_text()
    for name, digest in sums.items():
        content = (AUSTEN / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest
        assert content.isascii()
        row = next(line for line in readme.splitlines() if f"`{name}` |" in line)
        assert digest in row
        assert f" {len(content):,} |" in row
        assert f" {len(content.split()):,} |" in row
