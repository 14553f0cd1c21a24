"""Text becomes tokens once, and nothing half-written or damaged is believed."""

import dataclasses
import hashlib
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
from miras_jax.training import prepare as module
from miras_jax.training.data import TextFiles
from miras_jax.training.prepare import prepare
from miras_jax.training.tokenizer import BPE, Bytes

AUSTEN = Path(__file__).parents[2] / "experiments" / "data" / "austen"
OUTPUTS = (
    "train.npy",
    "heldout.npy",
    "tokenizer.json",
    "train.starts.npy",
    "heldout.starts.npy",
    "prepared.json",
)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Two training documents and a held-out one, named relative to the directory."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text/a.txt").write_text("The first document, of little weight.\n" * 5)
    Path("text/b.txt").write_text("A second: \u541b\u5b50\u52a1\u672c.\n" * 9)
    Path("held.txt").write_text("Nobody has read this before.\n" * 3)
    return TextFiles(("text/*.txt",), ("held.txt",), 8, Bytes())


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


@pytest.mark.parametrize("moved", range(len(OUTPUTS) + 1))
def test_an_interrupted_preparation_is_not_believed(config, monkeypatch, moved):
    """Stop after some of the files were moved in, over an older preparation."""
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
    real_tokenise = module._tokenise
    monkeypatch.setattr(
        module, "_tokenise", lambda *args: (calls.append(1), real_tokenise(*args))
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
        "from miras_jax.training.data import Bytes, TextFiles\n"
        "from miras_jax.training.prepare import prepare\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "prepare(TextFiles(('text/*.txt',), ('held.txt',), 8, Bytes()), 'out')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert Path("out/.preparing/train.npy").exists()
    prepared = prepare(config, "out")
    assert prepared.heldout_words == 15
    assert not Path("out/.preparing").exists()


def test_processes_that_prepare_together_tokenise_once(config, monkeypatch):
    calls, results = [], []
    real = module._tokenise

    def slow(*args):
        calls.append(1)
        time.sleep(0.2)
        real(*args)

    monkeypatch.setattr(module, "_tokenise", slow)
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
