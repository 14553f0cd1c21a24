"""The reference of compressors, against the programs of that name where there are."""

import random
import shutil
import subprocess

import numpy as np
import pytest

from miras_jax.evaluation import compression
from miras_jax.evaluation.compression import COMPRESSORS, bits_per_byte, reference
from miras_jax.training.data import TextFiles
from miras_jax.training.prepare import prepare
from miras_jax.training.tokenizer import BPE


def prose(words, seed):
    random.seed(seed)
    vocabulary = ["memory", "the", "retains", "and", "forgets", "keys", "über", "\n"]
    return " ".join(random.choices(vocabulary, k=words)).encode()


TRAIN, HELDOUT = prose(6000, 1), prose(2000, 2)


def size_of(name, text):
    program, *flags = name.split()
    if shutil.which(program) is None:
        return len(COMPRESSORS[name](text))
    command = [program, *flags, "--stdout"]
    return len(subprocess.run(command, input=text, capture_output=True).stdout)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_bits_are_those_of_the_program(name):
    added = size_of(name, TRAIN + HELDOUT) - size_of(name, TRAIN)
    ours = bits_per_byte(TRAIN, HELDOUT)[name]
    # Implementations of one format differ by a few bytes.
    assert ours == pytest.approx(8 * added / len(HELDOUT), rel=0.01)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_what_was_read_before_is_nearly_free_and_noise_is_not(name):
    noise = np.random.default_rng(0).bytes(4000)
    assert bits_per_byte(noise, noise)[name] < 0.5
    assert bits_per_byte(TRAIN, noise)[name] > 7.9


def test_only_as_much_training_text_as_is_looked_back_to_counts(monkeypatch):
    monkeypatch.setattr(compression, "MEMORY", 5000)
    expected = bits_per_byte(TRAIN[-5000:], HELDOUT)
    assert bits_per_byte(TRAIN, HELDOUT) == expected
    monkeypatch.undo()
    assert bits_per_byte(TRAIN, HELDOUT) != expected


def test_the_reference_is_of_the_source_texts_bytes(tmp_path):
    for name, text in (("a", TRAIN[:9000]), ("b", TRAIN[9000:]), ("c", HELDOUT)):
        (tmp_path / name).write_bytes(text)
    files = TextFiles(
        (f"{tmp_path}/a", f"{tmp_path}/b"), (f"{tmp_path}/c",), 32, BPE(300)
    )
    prepared = prepare(files, tmp_path / "data")
    assert reference(prepared) == bits_per_byte(TRAIN, HELDOUT)
