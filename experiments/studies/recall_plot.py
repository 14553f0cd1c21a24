"""The table of recall as a picture: a row for each layer, a colour for each number."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from miras_jax.training.plots import COLOURS, FAINT, INK


def plot(
    found: Mapping[str, Mapping[int, Sequence[float]]], values: int, path: Path
) -> Path:
    """Draw nats per value, a dot for each seed and a stroke at their mean.

    found: by layer, then by number of pairs, the seeds that did not diverge; values:
    how many there are, all as likely to who has stored nothing. Writes a PNG of 800
    pixels' width to `path` and returns it.
    """
    height = 1.2 + 0.34 * len(found)
    figure = Figure(figsize=(8, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    nothing = math.log(values)
    axes.axvline(nothing, color=INK, linewidth=1.2, linestyle="--")
    axes.annotate(
        "nothing stored",
        (nothing, -0.75),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
    pairs = list(next(iter(found.values())))
    for row, seeds in enumerate(found.values()):
        for i, (n, colour) in enumerate(zip(pairs, COLOURS, strict=False)):
            losses = seeds[n]
            place = row + 0.22 * (i - (len(pairs) - 1) / 2)
            label = f"{n} pairs" if row == 0 else None
            look = {"color": colour, "linestyle": "none"}
            heights = [place] * len(losses)
            axes.plot(losses, heights, "o", markersize=4, alpha=0.5, **look)
            mean = [sum(losses) / len(losses)] if losses else []
            axes.plot(mean, [place] * len(mean), "|", markersize=9, label=label, **look)
    axes.set_yticks(range(len(found)), found)
    axes.set_ylim(len(found) - 0.4, -1)
    axes.set_xlim(left=0)
    axes.set_xlabel("nats per value that was given before", fontsize=11, color=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=10, left=False)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), edgecolor="white", labelcolor=INK
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
