"""The page of `miras inspect`: one HTML file that needs nothing beside itself.

The text and the numbers are put into `inspect_page.html`, whose script draws them.
"""

import html
import json
import math
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import NamedTuple

import numpy as np

from miras_jax.evaluation.inspect import Reading

TEMPLATE = resources.files("miras_jax.evaluation") / "inspect_page.html"


class Lens(NamedTuple):
    """One way to look at the tokens: a field of `Info`, or the model's own loss."""

    name: str
    field: str | None  # None: the model's loss, the same for every memory
    about: str  # what it is, with its unit
    ranked: str  # heading of the list of extreme tokens
    colours: tuple[str, ...]  # from low to high
    factor: float = 1.0
    unit: str = ""
    digits: int | None = None  # after the point; None: as many as the size asks for
    least: bool = False  # whether the smallest values are the remarkable ones

    @property
    def between(self) -> tuple[float, float]:
        """The quantiles at the ends of the ramp; an unremarkable quarter is beyond."""
        return (0.01, 0.75) if self.least else (0.25, 0.99)

    @property
    def line(self) -> str:
        """The colour of a curve."""
        return self.colours[1 if self.least else -2]


# Single-hue ramps from near white, ordered by lightness: read alike by everyone.
LENSES = (
    Lens(
        "Surprise",
        "loss",
        "inner loss of the token's key and value before it is written (no unit)",
        "Most surprising",
        ("#fffaf3", "#fee0b8", "#fdb46a", "#e8702a", "#a63603", "#5c1a02"),
    ),
    Lens(
        "Learned",
        "step",
        "length of the token's own write, % of the memory's norm",
        "Most was learned from",
        ("#f7fbff", "#d3e4f3", "#92c2de", "#3f8fc4", "#0b559f", "#08306b"),
        factor=100,
        unit=" %",
    ),
    Lens(
        "Kept",
        "kept",
        "norm that is left after forgetting, % of the memory's norm",
        "Least was kept at",
        ("#00441b", "#1b7837", "#5aae61", "#a6dba0", "#d9f0d3", "#f7fcf5"),
        factor=100,
        unit=" %",
        digits=2,
        least=True,
    ),
    Lens(
        "Norm",
        "norm",
        "Frobenius norm of the memory's weights (no unit)",
        "The memory is largest at",
        ("#fcfbfd", "#dfdeed", "#b6b6d8", "#8683bd", "#61409b", "#3f007d"),
    ),
    Lens(
        "Model loss",
        None,
        "loss of the whole model when it predicts the token, nats",
        "Hardest to predict",
        ("#ffffff", "#dddddd", "#b0b0b0", "#7c7c7c", "#4a4a4a", "#1a1a1a"),
        unit=" nats",
        digits=2,
    ),
)


def page(reading: Reading, title: str, source: str) -> str:
    """The page as text. `source` says, in one sentence, which model read which text."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        about=html.escape(source),
        text="".join(f"<span>{html.escape(piece)}</span>" for piece in reading.pieces),
        # Inside a script element only "</" could be taken for markup.
        data=json.dumps(_data(reading), separators=(",", ":")).replace("<", "\\u003c"),
    )


def ends(values: np.ndarray, lens: Lens) -> tuple[float, float]:
    """The values at the ends of the lens' ramp."""
    finite = values[np.isfinite(values)]
    return tuple(np.quantile(finite, lens.between)) if finite.size else (0.0, 1.0)


def start_row(reading: Reading) -> tuple[int, int]:
    """(memory, head) whose surprise stands out most: its range over its ramp."""
    best, place = -math.inf, (0, 0)
    for i, memory in enumerate(reading.memories):
        for head, loss in enumerate(memory.info.loss):
            low, high = ends(loss, LENSES[0])
            finite = loss[np.isfinite(loss)]
            if high > low and np.ptp(finite) / (high - low) > best:
                best, place = np.ptp(finite) / (high - low), (i, head)
    return place


def _data(reading: Reading) -> dict:
    rows = [
        {
            "layer": memory.layer,
            "name": f"layer {memory.layer}, head {head + 1}",
            "rule": _brief(memory.rule),
            "values": [
                None if lens.field is None else _numbers(values[head])
                for lens in LENSES
                for values in [getattr(memory.info, lens.field or "loss")]
            ],
        }
        for memory in reading.memories
        for head in range(len(memory.info.loss))
    ]
    memory, head = start_row(reading)
    before = sum(len(m.info.loss) for m in reading.memories[:memory])
    return {
        "length": len(reading.pieces),
        "lenses": [_lens(lens) for lens in LENSES],
        "rows": rows,
        "shared": _numbers(reading.losses),
        "start": before + head,
    }


def _lens(lens: Lens) -> dict:
    described = {
        name: getattr(lens, name)
        for name in ("name", "about", "ranked", "factor", "unit", "digits", "least")
        + ("between", "line")
    }
    stops = [list(bytes.fromhex(colour[1:])) for colour in lens.colours]
    return {**described, "stops": stops, "shared": lens.field is None}


def _brief(rule) -> str:
    """The names of a rule's four choices."""
    axes = (rule.memory, rule.bias, rule.retention, rule.algorithm)
    return ", ".join(type(axis).__name__ for axis in axes)


def _numbers(values: Sequence[float]) -> list[float | None]:
    """Six significant digits; None for what is not finite, which JSON lacks."""
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in values]
