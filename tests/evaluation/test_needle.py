"""Needles: what is asked, that it fits and can be found, and what counts as found."""

import re

import numpy as np
import pytest
from matplotlib.image import imread

from miras_jax.errors import UserError
from miras_jax.evaluation import needle
from miras_jax.evaluation.needle import KINDS, NOISE, Sample, Score, Task
from miras_jax.evaluation.needle_plot import by_depth, plot
from miras_jax.training.tokenizer import BPE, ByteTokenizer

SENTENCES = [
    f"Sentence number {word} is {'very ' * i}short!"
    for i, word in enumerate("one two three four five six seven".split())
]
PROSE = "\n ".join(SENTENCES)
WORDS = BPE(400).train([PROSE * 30])
VALUES = {
    "noise": r"\d{7}",
    "number": r"\d{7}",
    "uuid": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}",
}


def task(kind, length=700, answer=40):
    return Task(kind, length, answer, prose=PROSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), WORDS])
def test_the_prompt_fits_and_no_more_hay_would(kind, tokenizer):
    asked = task(kind, 1500)
    for sample in needle.samples(asked, tokenizer, 3, seed=0):
        used = 1 + len(tokenizer.encode(sample.prompt)) + asked.answer
        # A line of noise, or the longest word that comes next.
        unit = f"{NOISE}\n" if kind == "noise" else " Sentence"
        assert used <= 1500 < used + len(tokenizer.encode(unit)) + 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_needle_is_inside_once_and_asked_for_at_the_end(kind):
    for sample in needle.samples(task(kind), WORDS, 5, seed=3):
        (key,) = set(re.findall(r" for (\w+-\w+) ", sample.prompt))
        one = "uuid" if kind == "uuid" else "number"
        said = f"One of the special magic {one}s for {key} is: {sample.value}."
        assert sample.prompt.count(said) == sample.prompt.count(sample.value) == 1
        assert sample.prompt.endswith(
            f"\nWhat is the special magic {one} for {key} mentioned in the provided "
            f"text? The special magic {one} for {key} mentioned in the provided text is"
        )
        assert re.match(f"^{VALUES[kind]}", sample.value)


def hay(sample):
    """What is before and what is behind the needle, without the question."""
    whole = sample.prompt.split("afterwards.\n")[1].split("\nWhat is the")[0]
    return re.split(r"One of the special magic \w+ for [^.]*\.", whole)


@pytest.mark.parametrize(("kind", "reach"), [("noise", 0.15), ("number", 0.15)])
def test_needles_are_between_sentences_where_they_are_asked_to_be(kind, reach):
    samples = needle.samples(task(kind, 900), WORDS, 9, seed=0)
    for i, sample in enumerate(samples):
        before, behind = (part.split() for part in hay(sample))
        depth = len(before) / len(before + behind)
        assert depth == pytest.approx(sample.depth, abs=1e-6)
        assert depth == pytest.approx(i / 8, abs=reach)
        # The end of the hay may be inside a sentence.
        assert not before or not behind or before[-1].endswith((".", "!"))
    assert (samples[0].depth, samples[-1].depth) == (0, 1)
    assert needle.samples(task("noise", 900), WORDS, 1, 0)[0].depth == pytest.approx(
        0.5, abs=reach
    )


def test_the_hay_is_noise_or_the_prose_said_again():
    noise = "".join(hay(needle.samples(task("noise"), WORDS, 1, 0)[0]))
    assert set(filter(None, noise.split("\n"))) == {NOISE}
    prose = " ".join(hay(needle.samples(task("uuid", 3000), WORDS, 1, 0)[0])).split()
    again = (PROSE.split() * (1 + len(prose) // len(PROSE.split())))[: len(prose)]
    assert len(prose) > len(PROSE.split()) and prose == again


def test_the_seed_decides_what_is_asked():
    first, same, other = (
        needle.samples(task("uuid"), WORDS, 4, seed) for seed in (1, 1, 2)
    )
    assert first == same
    assert not {s.value for s in first} & {s.value for s in other}
    assert len({s.value for s in first}) == 4


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(UserError, match="200 tokens do not hold the question and 40"):
        needle.samples(task("noise", 200), ByteTokenizer(), 1, 0)
    with pytest.raises(UserError, match="noise, number, uuid; got 'fork'"):
        task("fork")
    with pytest.raises(UserError, match="haystack of 'uuid' is prose; give a text"):
        Task("uuid", 700, prose=" ")
    with pytest.raises(UserError, match="0 samples; ask for at least 1"):
        needle.samples(task("noise"), WORDS, 0, 0)


def reader(reach):
    """Copies the value of a needle in the last `reach` characters, in capitals."""

    def write(prompts):
        found = [
            re.search(r"magic \w+ for [\w-]+ is: ([\w-]+)\.", prompt[-reach:])
            for prompt in prompts
        ]
        return [f" so: {m[1].upper()}." if m else " 1234567." for m in found]

    return write


@pytest.mark.parametrize("kind", KINDS)
def test_who_reads_all_finds_all_and_who_reads_the_end_what_is_there(kind):
    asked = task(kind, 2000)
    samples = needle.samples(asked, WORDS, 8, seed=0)
    whole = needle.scores(samples, reader(10**6))
    assert needle.accuracy(whole) == 1
    near = needle.scores(samples, reader(len(samples[0].prompt) // 2))
    assert [score.found for score in near] == sorted(score.found for score in near)
    assert 0 < needle.accuracy(near) < 1
    assert [score.depth for score in near] == [sample.depth for sample in samples]


def test_a_value_must_be_written_whole():
    samples = [Sample("", "1234567", 0.0)] * 3
    texts = [" it is 1234567 or so", " 123456", ""]
    found = needle.scores(samples, lambda _: texts)
    assert [score.found for score in found] == [True, False, False]


FOUND = {
    "noise": {1024: [Score(0.0, True), Score(1.0, True)], 2048: [Score(0.5, False)]},
    "uuid": {1024: [Score(0.1, True)] * 2 + [Score(0.1, False)]},
}


def test_the_table_tells_the_share_by_length():
    assert needle.table(FOUND) == [
        "found, %   1,024   2,048",
        "noise      100.0     0.0",
        "uuid        66.7       -",
    ]


def test_the_picture_tells_depths_apart(tmp_path):
    scores = [Score(0.0, True), Score(0.1, False), Score(0.2, True), Score(1.0, False)]
    np.testing.assert_array_equal(by_depth(scores), [0.5, 1, np.nan, np.nan, 0])
    path = plot(FOUND, tmp_path / "folder" / "needle.png")
    height, width, _ = imread(path).shape
    assert height == 340 and width >= 450
