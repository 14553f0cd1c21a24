"""The pictures of `miras inspect`: the text coloured by surprise, and every curve.

matplotlib is slow to import: import this module where a picture is drawn.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from miras_jax.evaluation.inspect import Reading
from miras_jax.evaluation.inspect_page import LENSES, Lens, ends, start_row
from miras_jax.training.plots import FAINT, INK

FONT = FontProperties(family="DejaVu Serif", size=11)
WIDTH, LINE, LINES = 640, 21, 30  # of the text, in points, and how many lines
CAPTION = 570  # the least width, that of the legend
SOFT = "#5f6b7a"
OTHER = "#c9ced6"


def plot_text(reading: Reading, path: Path) -> Path:
    """The first lines of the text, coloured by the most telling memory's surprise."""
    memory, head = start_row(reading)
    losses = reading.memories[memory].info.loss[head]
    norm = Normalize(*ends(losses, LENSES[0]), clip=True)
    ramp = _ramp(LENSES[0])
    placed = list(_lay_out(reading.pieces))
    height = LINE * (1 + max(line for _, _, _, line in placed))
    width = max(CAPTION, *(x + _width(text) for _, text, x, _ in placed))
    margin, head_room, foot = 24, 46, 54
    size = width + 2 * margin, height + head_room + foot
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-margin, width + margin), ylim=(height + foot, -head_room))
    axes.axis("off")
    name = f"layer {reading.memories[memory].layer}, head {head + 1}"
    axes.text(0, -20, f"What surprised the memory of {name}", fontsize=13, color=INK)
    for index, text, x, line in placed:
        colour, box = ramp(norm(losses[index])), (_width(text), LINE - 2)
        axes.add_patch(Rectangle((x, line * LINE), *box, color=colour, linewidth=0))
        dark = np.dot(colour[:3], (0.299, 0.587, 0.114)) < 0.55
        ink = "white" if dark else INK
        baseline = (line + 0.7) * LINE
        axes.text(x, baseline, text, fontproperties=FONT, color=ink, parse_math=False)
    last = placed[-1][0] + 1
    shown = "" if last == len(reading.pieces) else f" · the first {last:,} tokens"
    bar = axes.inset_axes((46, height + 18, 140, 9), transform=axes.transData)
    colours = figure.colorbar(ScalarMappable(norm, ramp), bar, orientation="horizontal")
    colours.outline.set_visible(False)
    bar.set_xticks([])
    look = {"ha": "center", "fontsize": 9, "color": SOFT}
    axes.text(20, height + 26, f"≤ {norm.vmin:.3g}", **look)
    axes.text(212, height + 26, f"≥ {norm.vmax:.3g}", **look)
    axes.text(
        244,
        height + 26,
        f"inner loss before the token is written (no unit){shown}",
        fontsize=9,
        color=SOFT,
    )
    return _save(figure, path)


def _width(text: str) -> float:
    # Blanks at the ends have no outline: measure them between two letters.
    if not text:
        return 0.0
    ends = TextPath((0, 0), "||", prop=FONT).get_extents().width
    return TextPath((0, 0), f"|{text}|", prop=FONT).get_extents().width - ends


def _lay_out(pieces: Sequence[str]) -> Iterator[tuple[int, str, float, int]]:
    """(token, part of it, x, line): lines break at newlines and between words."""
    x, line = 0.0, 0
    for index, piece in enumerate(pieces):
        for part in re.findall(r"\n|[^\n]+", piece.replace("$", r"\$")):
            if part == "\n":
                # One empty line is enough between paragraphs.
                x, line = 0.0, line + (1 if x or line == 0 else 0)
                continue
            width = _width(part)
            if x and x + width > WIDTH:
                part, x, line = part.lstrip(" "), 0.0, line + 1
                width = _width(part)
            if line >= LINES:
                return
            if part:
                yield index, part, x, line
            x += width


def plot_curves(reading: Reading, path: Path) -> Path:
    """Every layer's measures over the text: surprise of all heads, then the curves."""
    fields = [lens for lens in LENSES if lens.field]
    layers = reading.memories
    figure = Figure(figsize=(10, 2.2 + 1.35 * len(fields)), dpi=110)
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08)
    FigureCanvasAgg(figure)
    rows = [loss for memory in layers for loss in memory.info.loss]
    heights = [0.35 + 0.13 * len(rows), *(1 for _ in fields)]
    grid = figure.subplots(1 + len(fields), 1, height_ratios=heights, squeeze=False)
    strips, *charts = grid[:, 0]
    _draw_strips(figure, strips, layers, rows)
    memory, head = start_row(reading)
    tokens = np.arange(1, len(reading.pieces) + 1)
    for axes, lens in zip(charts, fields, strict=True):
        values = lens.factor * getattr(layers[memory].info, lens.field)
        for other in np.delete(values, head, axis=0):
            axes.plot(tokens, other, color=OTHER, linewidth=0.8)
        axes.plot(tokens, values[head], color=lens.line, linewidth=1.1)
        axes.set_xlim(1, max(len(tokens), 2))
        _title(axes, lens.name, lens.about)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.tick_params(labelbottom=axes is charts[-1])
        axes.ticklabel_format(axis="y", useOffset=False)
    charts[-1].set_xlabel(
        f"token (curves: layer {layers[memory].layer}, head {head + 1}; its layer's "
        "other heads grey)",
        color=SOFT,
        fontsize=9,
    )
    for axes in (strips, *charts):
        axes.spines[:].set_visible(False)
        axes.tick_params(colors=SOFT, labelsize=8, length=0)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return _save(figure, path)


def _draw_strips(figure, axes, layers, rows):
    # Each memory between its own quantiles: heads differ in scale, not in rank.
    scaled = []
    for loss in rows:
        low, high = ends(loss, LENSES[0])
        scaled.append(np.clip((loss - low) / max(high - low, 1e-30), 0, 1))
    length = len(rows[0])
    image = axes.imshow(
        scaled,
        aspect="auto",
        cmap=_ramp(LENSES[0]),
        interpolation="none" if length < 2000 else "antialiased",
        extent=(0.5, length + 0.5, len(rows), 0),
    )
    names = [
        f"layer {memory.layer}, head {head + 1}"
        for memory in layers
        for head in range(len(memory.info.loss))
    ]
    axes.set_yticks(np.arange(len(rows)) + 0.5, names)
    edge = 0
    for memory in layers[:-1]:
        edge += len(memory.info.loss)
        axes.axhline(edge, color="white", linewidth=3)
    _title(axes, "Every memory", "surprise, between quantiles of the memory's own")
    bar = figure.colorbar(image, ax=axes, ticks=[0, 1], shrink=0.9, pad=0.01)
    quantiles = [f"{share:.0%}" for share in LENSES[0].between]
    bar.ax.set_yticklabels(quantiles, fontsize=8, color=SOFT)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)


def _title(axes, name: str, about: str) -> None:
    axes.set_title(name, loc="left", fontsize=10, color=INK, fontweight="bold")
    axes.set_title(about, loc="right", fontsize=9, color=SOFT)


def _ramp(lens: Lens) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list(lens.name, lens.colours)


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
