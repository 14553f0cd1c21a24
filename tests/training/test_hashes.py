"""A file is hashed once, and again when anything tells that it may have changed."""

import os
import time

import pytest

from miras_jax.training import hashes as module
from miras_jax.training.hashes import Hashes, sha256


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    age(path)
    return path


def age(path, seconds=60):
    """Let it have been written so long ago."""
    then = time.time_ns() - int(seconds * 1e9)
    os.utime(path, ns=(then, then))


@pytest.fixture
def read(monkeypatch):
    """The files that were read to be hashed."""
    read, real = [], module.sha256
    monkeypatch.setattr(module, "sha256", lambda p: (read.append(p), real(p))[1])
    return read


def start(file) -> str:
    """What one start does."""
    hashes = Hashes(file.parent / "stats.json")
    digest = hashes.of(file)
    hashes.save()
    return digest


def test_an_unchanged_file_is_read_once(file, read):
    assert {start(file) for _ in range(3)} == {sha256(file)}
    assert read == [file]


def same_size(file):
    file.write_bytes(b"CONTENT")
    age(file, 30)


def same_time(file):
    then = file.stat().st_mtime_ns
    file.write_bytes(b"more content")
    os.utime(file, ns=(then, then))


def next_nanosecond(file):
    then = file.stat().st_mtime_ns + 1
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=(then, then))


@pytest.mark.parametrize("change", [same_size, same_time, next_nanosecond])
def test_a_changed_file_is_read_again(file, read, change):
    before = start(file)
    change(file)
    assert start(file) == sha256(file) != before
    assert start(file) == sha256(file)
    assert len(read) == 2


def test_a_file_that_was_just_written_is_read_again(file, read):
    age(file, 1)
    then = file.stat().st_mtime_ns
    before = start(file)
    # Another content at what such a clock calls the same time.
    file.write_bytes(b"CONTENT")
    os.utime(file, ns=(then, then))
    assert start(file) != before


def test_a_file_that_changes_while_it_is_hashed_is_read_again(file, monkeypatch):
    def slow(path):
        digest = sha256(path)
        same_size(path)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(module, "sha256", slow)
        start(file)
    assert start(file) == sha256(file)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"files": {}}', "null", "\udcff"])
def test_a_damaged_memory_is_not_believed(file, read, content):
    start(file)
    (file.parent / "stats.json").write_text(content, errors="surrogateescape")
    assert start(file) == sha256(file)
    assert len(read) == 2


def test_an_altered_hash_is_not_believed(file):
    digest = start(file)
    memory = file.parent / "stats.json"
    memory.write_text(memory.read_text().replace(digest, "0" * 64))
    assert start(file) == digest


def test_a_folder_that_cannot_be_written_is_no_error(file, tmp_path):
    hashes = Hashes(tmp_path / "absent" / "stats.json")
    assert hashes.of(file) == sha256(file)
    hashes.save()
