"""A needle in a haystack: is one sentence of a long text found again?

The single-needle tasks of RULER (arXiv 2404.06654), the S-NIAH of Titans and Miras:

noise   (their PK, RULER's niah_single_1) a number, in five sentences said over and over
number  (N, niah_single_2) a number, in prose
uuid    (W, niah_single_3) a UUID, in prose

A prompt is as long as the model's tokenizer and the tokens to write allow, and right
where the answer contains the value. The words of the keys are a list of our own.
"""

import random
import re
import uuid
from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from miras_jax.errors import UserError
from miras_jax.export import Trained
from miras_jax.generate import complete
from miras_jax.training.tokenizer import Tokenizer

NOISE = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. "
    "There and back again."
)
KINDS = ("noise", "number", "uuid")
ANSWER = 128
"""Tokens that a model may write; RULER's number for these tasks."""

ADJECTIVES = (
    "able ample brave brief broad calm clean clever cold curly damp dark deep dry "
    "eager early faint fair fast firm flat fond fresh gentle glad grand grave great "
    "happy heavy hollow honest humble idle keen kind large late light little lively "
    "lonely loud loyal lucky mellow mild modest narrow neat noble odd old pale "
    "patient plain polite proud quick quiet rapid rare ripe rough round royal sharp "
    "shy silent simple slow small smart smooth soft solid steady steep still strong "
    "sudden sunny sweet swift tall tame tender thin tidy tiny vast vivid warm weary "
    "wide wild wise young"
).split()
NOUNS = (
    "acorn anchor apple arrow autumn basket beach bell bird boat bottle branch bread "
    "bridge brook brush button candle canyon carpet castle cellar chair cherry clock "
    "cloud coast copper cottage cradle desert drum eagle ember falcon feather fence "
    "field flame forest fountain fox garden gate glove harbor hat hill honey horse "
    "island ivory kettle key kitten ladder lake lamp lantern leaf lemon letter meadow "
    "mirror moon mountain needle oak ocean orchard otter paper pearl pebble pepper "
    "piano pillow pond rabbit rain ribbon river road rope saddle shadow shell shore "
    "silver snow spoon stone storm straw thread tiger tower valley violin wagon water "
    "whale willow window winter wolf"
).split()


@dataclass(frozen=True)
class Task:
    """One kind of needle at one length.

    length: tokens of prompt and answer together, with the end-of-text token that the
    prompt follows; answer: those of them that the model may write; prose: the text of
    the haystack, said again where it is too short (not read by "noise").
    """

    kind: str
    length: int
    answer: int = ANSWER
    prose: str = ""

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"a needle is one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.kind != "noise" and not self.prose.strip():
            raise UserError(
                f"the haystack of {self.kind!r} is prose; give a text, or use 'noise'"
            )

    @property
    def values(self) -> str:
        """What the prompt calls the values."""
        return "uuids" if self.kind == "uuid" else "numbers"


class Sample(NamedTuple):
    """A prompt whose answer is known."""

    prompt: str
    value: str
    depth: float  # of the needle in the haystack, 0 to 1


class Score(NamedTuple):
    """Whether the value was in what the model wrote."""

    depth: float
    found: bool


def samples(task: Task, tokenizer: Tokenizer, number: int, seed: int) -> list[Sample]:
    """So many samples, their depths spread evenly from 0 to 1; one is in the middle.

    The same seed gives the same. UserError: the length does not hold even the question.
    """
    if number < 1:
        raise UserError(f"{number} samples; ask for at least 1")
    haystack = _Haystack(task, tokenizer)
    made = []
    for i in range(number):
        draw = random.Random(f"{seed} {task.kind} {task.length} {i}")
        depth = i / (number - 1) if number > 1 else 0.5
        made.append(_sample(haystack, draw, depth))
    return made


def scores(
    asked: Sequence[Sample], write: Callable[[Sequence[str]], list[str]]
) -> list[Score]:
    """Whether each value is in what `write` makes of the prompts, in any case."""
    answers = write([sample.prompt for sample in asked])
    return [
        Score(sample.depth, sample.value in answer.lower())
        for sample, answer in zip(asked, answers, strict=True)
    ]


def evaluate(trained: Trained, task: Task, number: int, seed: int) -> list[Score]:
    """Scores of so many samples, which the model answers greedily."""
    asked = samples(task, trained.tokenizer, number, seed)
    return scores(asked, partial(complete, trained, length=task.answer))


def accuracy(found: Sequence[Score]) -> float:
    """The share that was found."""
    return sum(score.found for score in found) / len(found)


def table(found: Mapping[str, Mapping[int, Sequence[Score]]]) -> list[str]:
    """Accuracy in percent by name and length in tokens, a line for each name."""
    lengths = dict.fromkeys(length for scores in found.values() for length in scores)
    lines = [["found, %", *(f"{length:,}" for length in lengths)]]
    for name, scores in found.items():
        shares = {length: 100 * accuracy(part) for length, part in scores.items()}
        cells = (f"{shares[n]:.1f}" if n in shares else "-" for n in lengths)
        lines.append([name, *cells])
    width = max(len(line[0]) for line in lines)
    return [
        "  ".join([f"{name:<{width}}", *(f"{cell:>6}" for cell in cells)])
        for name, *cells in lines
    ]


class _Haystack:
    """Prompts of one task: `units` of hay with the needle at one of its joints."""

    def __init__(self, task: Task, tokenizer: Tokenizer):
        self.task, self._tokenizer = task, tokenizer
        noise = task.kind == "noise"
        self._units = [NOISE] if noise else task.prose.split()
        self._joint = "\n" if noise else " "
        self._ends = [bool(re.search(r"[.!?][\"'’”)_]*$", u)) for u in self._units]

    def prompt(
        self, key: str, value: str, size: int, depth: float
    ) -> tuple[str, float]:
        """The prompt of `size` units and where the needle is, 0 to 1.

        A needle goes between sentences: to the joint that is nearest to `depth`.
        """
        place = self._place(size, depth)
        hay = [self._units[i % len(self._units)] for i in range(size)]
        values = self.task.values
        needle = f"One of the special magic {values} for {key} is: {value}."
        text = self._joint.join([*hay[:place], needle, *hay[place:]])
        one = values.removesuffix("s")
        prompt = (
            f"A special magic {one} is hidden within the following text. Make sure to "
            f"memorize it. I will quiz you about the {one} afterwards.\n{text}\n"
            f"What is the special magic {one} for {key} mentioned in the provided text?"
            f" The special magic {one} for {key} mentioned in the provided text is"
        )
        return prompt, place / max(size, 1)

    def _place(self, size: int, depth: float) -> int:
        joints = [0, size]
        joints += [i + 1 for i in range(size) if self._ends[i % len(self._ends)]]
        return min(joints, key=lambda joint: abs(joint - depth * size))

    def fits(self, prompt: str) -> bool:
        """Whether prompt, answer and the end-of-text token before them do."""
        tokens = 1 + len(self._tokenizer.encode(prompt)) + self.task.answer
        return tokens <= self.task.length


def _key_and_value(kind: str, draw: random.Random) -> tuple[str, str]:
    """What a needle says: an adjective and a noun, and a number or a UUID for them."""
    key = f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"
    if kind == "uuid":
        return key, str(uuid.UUID(int=draw.getrandbits(128), version=4))
    return key, str(draw.randint(1_000_000, 9_999_999))


def _sample(haystack: _Haystack, draw: random.Random, depth: float) -> Sample:
    key, value = _key_and_value(haystack.task.kind, draw)

    def made(size):
        return haystack.prompt(key, value, size, depth)

    if not haystack.fits(made(0)[0]):
        raise UserError(
            f"{haystack.task.length} tokens do not hold the question and "
            f"{haystack.task.answer} to answer in; use a greater length"
        )
    # Every unit has a token at least.
    sizes = range(1, haystack.task.length)
    fitting = bisect(sizes, False, key=lambda size: not haystack.fits(made(size)[0]))
    prompt, place = made(fitting)
    return Sample(prompt, value, place)
