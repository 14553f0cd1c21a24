"""The table of models in the README, made from the code.

python -m experiments.tables

Writes what `miras variants --markdown` prints between the two marks in README.md. A
test compares them, so that the table cannot fall behind.
"""

import re
from pathlib import Path

from miras_jax.core import table, variants

README = Path(__file__).parents[1] / "README.md"
MARKS = re.compile(r"(<!-- variants: .*? -->\n).*(<!-- end of variants -->)", re.S)


def updated(text: str) -> str:
    """The text of the README with the table that the code gives."""
    if not MARKS.search(text):
        raise SystemExit(f"{README} has lost its marks, <!-- variants: ... -->")
    made = table.markdown(variants.ALL, variants.CHANNELWISE)
    return MARKS.sub(lambda marks: f"{marks[1]}{made}\n{marks[2]}", text)


def main() -> None:
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
