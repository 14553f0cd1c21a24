"""Writes the example tasks for `miras harness`, from *Persuasion*, which is held out.

    python -m experiments.tasks.make

austen_last_word   the last word of a passage, as in LAMBADA
austen_next        which of four passages goes on with the one before
austen_text        bits per byte of eight stretches of text

One JSON object per line beside the YAML file of each task. The same text gives the same
files. Lines are broken as in the novel, which is what models here were trained on.
"""

import json
import random
import re
from pathlib import Path

FOLDER = Path(__file__).parent
NOVEL = FOLDER.parent / "data" / "austen" / "persuasion.txt"
EXAMPLES = 40


def paragraphs(novel: str) -> list[str]:
    """Paragraphs of plain prose of 60 to 140 words, in order."""
    found = (part.strip("\n") for part in re.split(r"\n{2,}", novel))
    return [part for part in found if 60 <= len(part.split()) <= 140]


def last_words(texts: list[str]) -> list[dict]:
    """Passages that end in a word of four letters or more, and that word."""
    made = []
    for text in texts:
        match = re.fullmatch(r"(.*\S)(\s+[A-Za-z]{4,})[.!?]", text, re.DOTALL)
        if match:
            made.append({"context": match[1], "word": match[2]})
    return _spread(made)


def next_passages(texts: list[str], draw: random.Random) -> list[dict]:
    """The first half of a paragraph; four second halves, of which one is its own."""
    halves = []
    for text in texts:
        cut = text.find(" ", len(text) // 2)
        if cut > 0:
            halves.append((text[:cut], " ".join(text[cut:].split()[:16])))
    made = []
    for context, own in _spread(halves):
        others = [other for _, other in halves if other != own]
        choices = [own, *draw.sample(others, 3)]
        draw.shuffle(choices)
        answer = choices.index(own)
        made.append({"context": context, "choices": choices, "answer": answer})
    return made


def stretches(novel: str) -> list[dict]:
    """Eight stretches of about 2,000 characters, from paragraph to paragraph."""
    made = []
    for part in range(1, 9):
        start = novel.index("\n\n", part * len(novel) // 9) + 2
        stop = novel.index("\n\n", start + 2000)
        made.append({"text": novel[start:stop]})
    return made


def _spread(items: list) -> list:
    return [items[i * len(items) // EXAMPLES] for i in range(EXAMPLES)]


def main() -> None:
    novel = NOVEL.read_text(encoding="utf-8")
    texts = paragraphs(novel)
    tasks = {
        "last_word": last_words(texts),
        "next": next_passages(texts, random.Random(0)),
        "text": stretches(novel),
    }
    for name, examples in tasks.items():
        path = FOLDER / f"austen_{name}.jsonl"
        lines = (json.dumps(example) + "\n" for example in examples)
        path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
