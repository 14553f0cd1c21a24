"""Needles found, by length of the text and depth in it, as a picture.

matplotlib is slow to import: import this module where a picture is drawn.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from miras_jax.evaluation.needle import Score
from miras_jax.training.plots import INK

DEPTHS = 5
"""Parts of the haystack that a picture tells apart."""

# One hue from near white to dark: read alike by everyone.
FOUND = LinearSegmentedColormap.from_list(
    "found", ("#f7fbff", "#d3e4f3", "#92c2de", "#3f8fc4", "#0b559f")
)


def by_depth(scores: Sequence[Score]) -> np.ndarray:
    """The share found in every part of the depths, `[DEPTHS]`; NaN where none was."""
    depths = np.array([score.depth for score in scores])
    found = np.array([score.found for score in scores], float)
    part = np.minimum((depths * DEPTHS).astype(int), DEPTHS - 1)
    asked = np.bincount(part, minlength=DEPTHS)
    total = np.bincount(part, found, DEPTHS)
    return np.divide(total, asked, out=np.full(DEPTHS, np.nan), where=asked > 0)


def plot(found: Mapping[str, Mapping[int, Sequence[Score]]], path: Path) -> Path:
    """Draw a panel of length by depth for every name, with the shares in percent.

    found: by name, then by length in tokens. Writes a PNG to `path` and returns it.
    """
    width = 1.2 + sum(0.6 + 0.62 * len(lengths) for lengths in found.values())
    figure = Figure(figsize=(max(width, 4.5), 3.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, lengths) in zip(panels, found.items(), strict=True):
        shares = np.stack([by_depth(scores) for scores in lengths.values()], axis=1)
        axes.imshow(shares, cmap=FOUND, vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            if not np.isnan(share):
                colour = "white" if share > 0.6 else INK
                text = axes.text(column, row, f"{100 * share:.0f}", fontsize=9)
                text.set(color=colour, ha="center", va="center")
        axes.set_title(name, fontsize=11, color=INK)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=8)
        axes.tick_params(colors=INK, length=0)
        axes.spines[:].set_visible(False)
    edges = np.linspace(0, 100, DEPTHS + 1)
    names = [f"{a:.0f} to {b:.0f} %" for a, b in zip(edges, edges[1:], strict=False)]
    panels[0].set_yticks(range(DEPTHS), names, fontsize=9)
    panels[0].set_ylabel("depth of the needle", fontsize=10, color=INK)
    figure.supxlabel("tokens of prompt and answer", fontsize=10, color=INK)
    figure.suptitle("Needles found, %", x=0.01, ha="left", fontsize=12, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
