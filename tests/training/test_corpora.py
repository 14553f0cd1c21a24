"""Corpora of many documents: prepared in little memory, then ready at once."""

import dataclasses
import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from miras_jax.errors import UserError
from miras_jax.training import bpe, hashes
from miras_jax.training.data import TextFiles
from miras_jax.training.hashes import sha256
from miras_jax.training.prepare import load, prepare
from miras_jax.training.run import Run
from miras_jax.training.tokenizer import BPE, Bytes, TokenizerFile
from tests.training.runs import tiny

AUSTEN = Path(__file__).parents[2] / "experiments" / "data" / "austen"
TEXTS = ["The first document.\n", "A second: \u541b\u5b50.", "x", "Last one here. " * 9]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Four training documents in one file."""
    monkeypatch.chdir(tmp_path)
    Path("held.txt").write_text("Nobody has read this before.\n" * 3)
    write_lines("train.jsonl", TEXTS)
    return TextFiles(("train.jsonl",), ("held.txt",), 8, Bytes())


def write_lines(path, texts, field="text"):
    content = "".join(json.dumps({field: text}) + "\n" for text in texts).encode()
    Path(path).write_bytes(gzip.compress(content) if path.endswith("gz") else content)


# Of the files that the first version wrote: runs of it go on with the same tokens.
FIRST_VERSION = {
    "fingerprint": "7bd06698cac5e6bafd785b529b0efcc692b6cc7ae0c8f7e639d8512a0eaf2897",
    "train.npy": "44952eda1d82804a3a5892806d3dfa1b51a263a3462f4875919e27e134bc82fe",
    "heldout.npy": "465820bf43f0658514623c209e8276f1bce978c5e06c5e4c777f62e27200cefe",
}


def test_text_files_give_the_tokens_that_they_always_gave(tmp_path):
    files = [(str(AUSTEN / f"{name}.txt"),) for name in ("persuasion", "emma")]
    prepared = prepare(TextFiles(*files, 64, BPE(300)), tmp_path)
    found = {name: sha256(tmp_path / name) for name in ("train.npy", "heldout.npy")}
    assert {"fingerprint": prepared.fingerprint, **found} == FIRST_VERSION


@pytest.mark.parametrize("choice", [Bytes(), BPE(vocab_size=300)], ids=repr)
def test_each_line_becomes_a_document(config, choice):
    prepared = prepare(dataclasses.replace(config, tokenizer=choice), "out")
    end = prepared.tokenizer.end_of_text
    starts = np.flatnonzero(prepared.train == end)
    documents = np.split(prepared.train, starts[1:])
    assert [prepared.tokenizer.decode(ids) for ids in documents] == TEXTS
    np.testing.assert_array_equal(prepared.train_starts, starts)
    np.testing.assert_array_equal(prepared.heldout_starts, [0])
    assert prepared.train_bytes == len("".join(TEXTS).encode())
    assert prepared.heldout_words == 15


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.parquet"])
def test_the_container_does_not_matter(config, name):
    if name.endswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": TEXTS}), name)
    else:
        write_lines(name, TEXTS)
    plain = prepare(config, "plain")
    other = prepare(dataclasses.replace(config, train=(name,)), "other")
    np.testing.assert_array_equal(other.train, plain.train)
    assert other.train_bytes == plain.train_bytes
    assert other.fingerprint != plain.fingerprint


def test_the_suffix_is_part_of_the_fingerprint(config):
    """The same bytes under another suffix are another text."""
    lines = prepare(config, "out")
    Path("train.jsonl").rename("train.txt")
    text = prepare(dataclasses.replace(config, train=("train.txt",)), "out")
    assert text.fingerprint != lines.fingerprint
    assert len(text.train_starts) == 1


def test_the_field_is_part_of_the_fingerprint(config):
    content = [json.dumps({"text": f"text {i}", "title": f"{i}"}) for i in range(9)]
    Path("train.jsonl").write_text("\n".join(content))
    text = prepare(config, "out")
    title = prepare(dataclasses.replace(config, field="title"), "out")
    assert title.fingerprint != text.fingerprint
    assert title.train_bytes == 9


def test_many_small_files_are_encoded_together(config, monkeypatch):
    Path("many").mkdir()
    for i in range(50):
        Path(f"many/{i:02}.txt").write_text("" if i == 7 else f"Number {i}.")
    sizes, real = [], bpe._groups

    def groups(texts, cut):
        for group in real(texts, cut):
            sizes.append(len(group))
            yield group

    monkeypatch.setattr(bpe, "_groups", groups)
    given = dataclasses.replace(config, train=("many/*",), tokenizer=BPE(257))
    prepared = prepare(given, "out")
    assert 50 in sizes
    assert len(prepared.train_starts) == 50
    assert np.diff(prepared.train_starts)[7] == 1  # An empty file is a document.


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents_without_text_are_no_text(config, split):
    write_lines("empty.jsonl.gz", ["", ""])
    with pytest.raises(UserError, match=f"{split} holds no text .1 files, all empty"):
        prepare(dataclasses.replace(config, **{split: ("empty.jsonl.gz",)}), "out")


def test_a_broken_line_leaves_nothing_half_prepared(config):
    whole = prepare(config, "out")
    Path("train.jsonl").write_text(Path("train.jsonl").read_text() + "broken")
    with pytest.raises(UserError, match=r"train\.jsonl, line 5 is not JSON"):
        prepare(config, "out")
    assert load("out").fingerprint == whole.fingerprint


PEAK = """
from pathlib import Path
from miras_jax.training.data import TextFiles
from miras_jax.training.prepare import prepare
from miras_jax.training.tokenizer import Bytes
prepare(TextFiles(("train.jsonl",), ("held.txt",), 8, Bytes()), "out")
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(config):
    peaks = []
    for count in (2_000, 8_000):
        write_lines("train.jsonl", ["A thousand characters. " * 44] * count)
        command = [sys.executable, "-c", PEAK]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        peaks.append(int(done.stdout))
    assert Path("out/train.npy").stat().st_size > 16e6
    assert peaks[1] - peaks[0] < 3e6


def age():
    """Let all files have been written a minute ago."""
    then = time.time_ns() - 60 * 10**9
    for path in [*Path().glob("*.*"), *Path("out").glob("*.*")]:
        os.utime(path, ns=(then, then))


@pytest.fixture
def read(monkeypatch):
    """The names of files that were read to be hashed."""
    names, real = [], hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda p: (names.append(p.name), real(p))[1])
    return names


def test_later_starts_hash_nothing(config, read):
    first = prepare(config, "out")
    age()
    prepare(config, "out")
    read.clear()
    assert prepare(config, "out").fingerprint == first.fingerprint
    assert load("out").fingerprint == first.fingerprint
    assert read == []


def test_a_change_is_found_by_later_starts(config, read):
    first = prepare(config, "out")
    age()
    prepare(config, "out")
    write_lines("train.jsonl", [text.upper() for text in TEXTS])
    read.clear()
    assert prepare(config, "out").fingerprint != first.fingerprint
    assert "held.txt" not in read
    assert "train.jsonl" in read


@pytest.mark.parametrize("name", ["train.npy", "heldout.starts.npy", "tokenizer.json"])
def test_damage_is_found_by_later_starts(config, name):
    prepare(config, "out")
    age()
    prepare(config, "out")
    path = Path("out") / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="no whole prepared text"):
        load("out")
    prepare(config, "out")
    assert path.read_bytes() == whole


def test_starts_are_used_and_found_where_a_folder_has_none(config):
    packed = dataclasses.replace(config, documents="packed")
    new = prepare(packed, "out")

    def rows(prepared):
        windows = prepared.windows("train", 4)
        return np.stack([windows[i] for i in range(len(windows))])

    without = dataclasses.replace(new, train_starts=None)
    np.testing.assert_array_equal(rows(new), rows(without))
    other = dataclasses.replace(new, train_starts=new.train_starts[:2])
    assert rows(other).shape != rows(new).shape or np.any(rows(other) != rows(new))


def test_a_folder_of_the_first_version_is_used_as_it_is(config, monkeypatch):
    """It has neither starts nor hashes of them."""
    new = prepare(config, "out")
    record = json.loads(Path("out/prepared.json").read_text())
    for split in ("train", "heldout"):
        del record["outputs"][f"{split}.starts.npy"], record[split]["documents"]
        Path(f"out/{split}.starts.npy").unlink()
    record["seal"] = hashes.seal(record)
    Path("out/prepared.json").write_text(json.dumps(record))
    monkeypatch.setattr("miras_jax.training.prepare._tokenise", None)
    old = prepare(config, "out")
    assert old.fingerprint == new.fingerprint
    assert old.train_starts is None
    np.testing.assert_array_equal(old.train, new.train)


def given_tokenizer(size, path="given.json") -> TokenizerFile:
    Path(path).write_text(BPE(vocab_size=size).train(TEXTS).to_json())
    return TokenizerFile(path)


def test_a_given_tokenizer_is_used_and_kept(config):
    given = given_tokenizer(280)
    prepared = prepare(dataclasses.replace(config, tokenizer=given), "out")
    expected = given.train([]).encode(TEXTS[0])
    np.testing.assert_array_equal(prepared.train[1 : len(expected) + 1], expected)
    Path("given.json").unlink()
    assert load("out").tokenizer.vocab_size == prepared.tokenizer.vocab_size


def test_a_changed_tokenizer_file_is_prepared_again(config):
    given = dataclasses.replace(config, tokenizer=given_tokenizer(280))
    first = prepare(given, "out")
    moved = given_tokenizer(280, "moved.json")
    same = prepare(dataclasses.replace(config, tokenizer=moved), "out")
    assert same.fingerprint == first.fingerprint
    given_tokenizer(270)
    assert prepare(given, "out").fingerprint != first.fingerprint


def test_a_changed_tokenizer_file_does_not_continue_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = tiny(tmp_path)
    files = dataclasses.replace(experiment.data, tokenizer=given_tokenizer(280))
    experiment = dataclasses.replace(experiment, data=files)

    def identity():
        run = Run(experiment, "work")
        assert run.prepared
        return run.identity

    first = identity()
    assert identity() == first
    given_tokenizer(270)
    assert identity() != first
