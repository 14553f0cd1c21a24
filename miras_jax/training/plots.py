"""Plots of a run: its losses, and the loss by position in the context.

matplotlib is slow to import: import this module where a plot is drawn. Figures are
made without pyplot and leave matplotlib's global settings alone.
"""

import os
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from miras_jax.errors import UserError
from miras_jax.training.metrics import HELDOUT_TABLE, TRAIN_TABLE, read_table

INK, FAINT = "#333333", "#e4e4e4"
# Okabe and Ito's palette: told apart by every kind of colour vision.
BLUE, ORANGE = "#0072b2", "#d55e00"
COLOURS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def plot_losses(
    workdir: str | os.PathLike,
    path: str | os.PathLike | None = None,
    title: str | None = None,
    *,
    references: Mapping[str, float] | None = None,
) -> Path:
    """Draw the training and held-out loss of the run in `workdir` against the step.

    `references` are losses in nats per token, by name, drawn as horizontal lines: a
    baseline, say. The held-out points are left out when the run has not been
    evaluated. Writes a PNG of 800 x 500 pixels to `path` (`workdir/loss.png` by
    default) and returns its path. Raises `UserError` without training metrics.
    """
    workdir = Path(workdir)
    step, loss = _losses(workdir / TRAIN_TABLE)
    figure, axes = _figure(title)
    axes.plot(step, loss, color=BLUE, alpha=0.35, linewidth=0.8, label="training")
    axes.plot(
        *_smoothed(step, loss),
        color=BLUE,
        linewidth=1.8,
        marker="." if step.size == 1 else "",
        label="training, smoothed",
    )
    if (workdir / HELDOUT_TABLE).exists():
        axes.plot(
            *_losses(workdir / HELDOUT_TABLE),
            color=ORANGE,
            linewidth=1.2,
            marker="o",
            markersize=5,
            markeredgecolor="white",
            label="held out",
        )
    for (name, value), colour in zip(
        (references or {}).items(), cycle(COLOURS[2:]), strict=False
    ):
        axes.axhline(value, color=colour, linewidth=1.3, linestyle="--", label=name)
    axes.set_xlabel("step")
    last = max(step[-1], 1)
    axes.set_xlim(-0.02 * last, 1.02 * last)
    axes.xaxis.set_major_locator(
        MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)
    )
    return _save(figure, axes, Path(path or workdir / "loss.png"))


def plot_by_position(
    curves: Mapping[str, np.ndarray],
    path: str | os.PathLike,
    title: str | None = None,
) -> Path:
    """Draw the loss by position in the context, one curve per model.

    `curves[name][i]` is the mean loss in nats of the token with `i + 1` tokens before
    it in the context, `[L]`, NaN for none; lengths may differ. The position axis is
    logarithmic, and the strong line is the mean over each of its small equal parts: an
    eighth of an octave, or half of one with more than three curves, which are then
    named beside the plot, highest end first. Writes a PNG of 800 x 500 pixels to `path`
    and returns it.
    """
    if not curves:
        raise UserError("there is no curve to plot: give at least one model's losses")
    figure, axes = _figure(title)
    few = len(curves) <= 3
    styles = cycle([(line, c) for line in ("-", "--") for c in COLOURS])
    for (name, curve), (line, colour) in zip(curves.items(), styles, strict=False):
        curve = np.asarray(curve, np.float64)
        if curve.ndim != 1 or not curve.size:
            raise UserError(
                f"the losses of {name!r} have shape {list(curve.shape)}: "
                "give one loss per position"
            )
        position = np.arange(1, curve.size + 1)[~np.isnan(curve)]
        curve = curve[~np.isnan(curve)]
        if few:
            axes.plot(
                position, curve, color=colour, alpha=0.15, linewidth=0.8, zorder=1
            )
        axes.plot(
            *_log_binned(position, curve, parts=8 if few else 2),
            line,
            color=colour,
            linewidth=1.8,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("position in the context (tokens)")
    axes.margins(x=0.02)
    return _save(figure, axes, Path(path), legend_beside=not few)


def _losses(table: Path) -> tuple[np.ndarray, np.ndarray]:
    columns = read_table(table)
    if "loss" not in columns:
        raise UserError(f"{table} has no column 'loss': it is not a training run's")
    return columns["step"], columns["loss"]


def _smoothed(step: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over about 5 % of the rows around each, and fewer at the start.

    Row i looks at most i / 4 rows back and forth: a steep start stays steep.
    """
    finite = np.isfinite(loss)
    step, loss = step[finite], loss[finite]
    row = np.arange(loss.size)
    reach = np.minimum(row // 4, max(2, loss.size // 40))
    first, end = row - reach, np.minimum(row + reach + 1, loss.size)
    total = np.concatenate([[0.0], np.cumsum(loss)])
    return step, (total[end] - total[first]) / (end - first)


def _log_binned(
    position: np.ndarray, curve: np.ndarray, parts: int
) -> tuple[np.ndarray, np.ndarray]:
    """Means over so many parts of each octave; the first positions stand alone."""
    # Half a token earlier, so that a power of two ends a part instead of starting one.
    part = np.floor(parts * np.log2(position - 0.5)).astype(int)
    _, part, count = np.unique(part, return_inverse=True, return_counts=True)
    centre = np.exp(np.bincount(part, np.log(position)) / count)
    return centre, np.bincount(part, curve) / count


def _figure(title: str | None) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # inches
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        axes.set_title(title, loc="left", fontsize=13, color=INK, pad=12)
    axes.set_ylabel("loss (nats per token)")
    return figure, axes


def _save(
    figure: Figure, axes: Axes, path: Path, *, legend_beside: bool = False
) -> Path:
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=10)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=11, color=INK)
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    look = {"fontsize": 10, "labelcolor": INK, "edgecolor": "white"}
    if legend_beside:
        lines = sorted(axes.get_lines(), key=lambda line: -line.get_ydata()[-1])
        axes.legend(handles=lines, loc="upper left", bbox_to_anchor=(1, 1), **look)
    else:
        axes.legend(framealpha=0.9, **look)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
