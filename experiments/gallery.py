"""One picture and a few lines for every named rule: docs/gallery.md.

python -m experiments.gallery

All rules read the same small streams, untrained: a head of dimension 32, at the middle
of the rates that an untrained layer starts from, in chunks of at most 8 tokens. A few
minutes on two cores; pictures are below 60 KB.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

import miras_jax as miras
from experiments.untrained import rates
from miras_jax import variants
from miras_jax.core import table

DOCS = Path(__file__).parents[1] / "docs"
DIM, CHUNK = 32, 8
TOKENS, SYMBOLS = 32, 6
DISTRACTORS, STREAMS = 64, 16
INK, SOFT, FAINT, GREY, BLUE = "#1d232b", "#5f6b7a", "#e3e6ea", "#d3d7dd", "#0072b2"
RAMP = LinearSegmentedColormap.from_list(
    "weight", ["#ffffff", "#d3e4f3", "#92c2de", "#3f8fc4", "#0b559f", "#08306b"]
)

INTRODUCTION = f"""\
# Gallery

Every named rule on the same two small streams, untrained: a head of dimension {DIM}, at
the middle of the rates that an untrained layer starts from (`default_rates` in
`miras_jax/nn/defaults.py`; no rate differs between tokens), in chunks of
at most {CHUNK} tokens. Made by `python -m experiments.gallery`.

**Left: what a read weighs.** {TOKENS} tokens of {SYMBOLS} symbols; a symbol has one
key, of norm one, which is also its query, and every token a new value. Row t, column s:
by how much the read at token t changes with the value of token s (the Frobenius norm of
that block of the Jacobian), each row scaled by its largest entry. For softmax attention
these are the attention weights.

**Right: what is recalled.** A pair is written, then {DISTRACTORS} distractors, pairs of
random keys and values; after each the memory is asked for the first key. The curve is
the cosine between its answer and the value, both less the answer of the same memory had
it learned nothing, as a mean over {STREAMS} streams; the other rules in grey. An
untrained memory recalls by its start and its rates alone: this is the rules' character,
not their quality.

![All rules](gallery/all.png)
"""


class Portrait(NamedTuple):
    """What a rule's picture shows."""

    weights: np.ndarray  # [T, T], rows scaled to 1
    recall: np.ndarray  # [1 + distractors]


def small(rule: miras.Rule) -> miras.Rule:
    return dataclasses.replace(rule, chunk_size=min(rule.chunk_size, CHUNK))


def unit(rng, *shape) -> np.ndarray:
    x = rng.normal(size=(*shape, DIM))
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def stream(rule, queries, keys, values) -> miras.Tokens:
    """Tokens of these pairs; a rule of several per token learns each as often."""
    steps = rule.algorithm.steps
    if rule.keeps_tokens:
        queries, keys = (DIM**0.5 * x for x in (queries, keys))
    erase_keys = keys if rule.algorithm.erases else None
    if steps > 1:
        keys, values = (np.repeat(x[:, None], steps, axis=1) for x in (keys, values))
    tokens = (jnp.asarray(x, jnp.float32) for x in (queries, keys, values))
    read = miras.Tokens(*tokens, rates(rule, len(queries)))
    return read if erase_keys is None else read._replace(erase_keys=erase_keys)


def effective_attention(rule: miras.Rule) -> np.ndarray:
    """|d output_t / d value_s| `[T, T]`, the largest entry of each row 1."""
    rng = np.random.default_rng(1)
    symbols = rng.integers(SYMBOLS, size=TOKENS)
    keys = unit(rng, SYMBOLS)[symbols]
    params = rule.init(jax.random.key(0), DIM, DIM)
    tokens = stream(rule, keys, keys, unit(rng, TOKENS))

    @jax.jit
    @jax.jacrev
    def jacobian(values):
        read = tokens._replace(values=values)
        return miras.run(rule, params, rule.start(params), read)[0]

    found = np.asarray(jacobian(tokens.values), np.float64)  # [T, V, T, (steps,) V]
    found = found.reshape(TOKENS, DIM, TOKENS, -1)
    weights = np.sqrt(np.square(found).sum(axis=(1, 3)))
    return weights / np.maximum(weights.max(axis=1, keepdims=True), 1e-30)


def recall(rule: miras.Rule) -> np.ndarray:
    """Cosine of answer and value after 0, 1, ... distractors."""
    rng = np.random.default_rng(2)
    params = rule.init(jax.random.key(0), DIM, DIM)

    @jax.jit
    def answers(tokens):
        return miras.run(rule, params, rule.start(params), tokens)[0]

    found = []
    for _ in range(STREAMS):
        keys, values = unit(rng, 1 + DISTRACTORS), unit(rng, 1 + DISTRACTORS)
        tokens = stream(rule, np.repeat(keys[:1], len(keys), 0), keys, values)
        answer, nothing = np.asarray(answers(tokens)), 0.0
        if not rule.keeps_tokens:
            still = {"learn": 0 * tokens.rates.learn}
            if tokens.rates.erase is not None:
                still["erase"] = 0 * tokens.rates.erase
            unlearned = tokens._replace(rates=tokens.rates._replace(**still))
            nothing = np.asarray(answers(unlearned))
        change, target = answer - nothing, values[0] - nothing
        lengths = np.linalg.norm(change, axis=1) * np.linalg.norm(
            np.broadcast_to(target, change.shape), axis=1
        )
        found.append(np.sum(change * target, axis=1) / np.maximum(lengths, 1e-30))
    return np.mean(found, axis=0)


def draw(name: str, portraits: dict[str, Portrait], path: Path) -> None:
    """The picture of one rule, the others' curves in grey."""
    figure = Figure(figsize=(7.2, 3.1), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.06)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.08, 1.3))
    image = left.imshow(
        portraits[name].weights,
        cmap=RAMP,
        vmin=0,
        vmax=1,
        extent=(0.5, TOKENS + 0.5, TOKENS + 0.5, 0.5),
    )
    ticks = [1, *range(8, TOKENS + 1, 8)]
    left.set(xticks=ticks, yticks=ticks)
    left.set_xlabel("value of token s")
    left.set_ylabel("read at token t")
    bar = figure.colorbar(image, ax=left, ticks=[0, 1], shrink=0.92, pad=0.03)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=SOFT)
    bar.set_label("weight, of the row's largest", fontsize=8, color=SOFT, labelpad=-2)
    left.set_title("What a read weighs", loc="left", fontsize=10, color=INK)

    for other, portrait in portraits.items():
        if other != name:
            right.plot(portrait.recall, color=GREY, linewidth=0.8)
    right.plot(portraits[name].recall, color=BLUE, linewidth=2)
    right.set(xlim=(0, DISTRACTORS), ylim=(-0.05, 1.05), yticks=(0, 0.5, 1))
    right.set_xticks(range(0, DISTRACTORS + 1, 16))
    right.set_xlabel("distractors since the pair")
    right.set_ylabel("cosine to its value")
    right.grid(axis="y", color=FAINT, linewidth=0.8)
    right.set_axisbelow(True)
    right.set_title("What is recalled", loc="left", fontsize=10, color=INK)
    for axes in (left, right):
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, colors=SOFT)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(fontsize=8.5, color=SOFT)
    left.spines[:].set(visible=True, color=FAINT)
    save(figure, path)


def draw_all(portraits: dict[str, Portrait], path: Path) -> None:
    """Every rule's weights side by side."""
    columns = 6
    rows = -(-len(portraits) // columns)
    figure = Figure(figsize=(8.6, 0.35 + 1.52 * rows), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.05, h_pad=0.05)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, (name, portrait) in zip(grid, portraits.items(), strict=False):
        axes.axis("on")
        axes.imshow(portrait.weights, cmap=RAMP, vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color(FAINT)
        axes.set_title(name.replace("_", " "), fontsize=7.5, color=INK, pad=3)
    figure.supxlabel(
        "Columns: the value of a token; rows: the read at a token. Darker weighs more.",
        fontsize=8,
        color=SOFT,
    )
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """A PNG of 256 colours, a third of the size of one of all of them."""
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


def section(make: Callable[[], miras.Rule], portrait: Portrait) -> str:
    """The lines below a picture, from the rule, its docstring and what was drawn."""
    rule, name = make(), make.__name__
    row = table.row(rule, variants.CHANNELWISE.get(make, ()))
    after = ", ".join(f"{portrait.recall[n]:.2f}" for n in (0, 8, DISTRACTORS))
    return f"""
## {name}

![{name}](gallery/{name}.png)

{" ".join(make.__doc__.split())}

- write rule: {row.write}
- memory {row.memory}; bias {row.bias}
- retention {row.retention}; algorithm {row.algorithm}
- chunk: {row.chunk}; numbers in the state of a head of {table.HEAD_DIM}: {row.state}
- half of the last read's weight is on the newest {_half(portrait.weights[-1])} of \
{TOKENS} tokens; recall after 0, 8 and {DISTRACTORS} distractors: {after}
"""


def _half(weights: np.ndarray) -> int:
    """How many of the newest tokens carry half of a row's weight."""
    newest = np.cumsum(weights[::-1])
    return 1 + int(np.searchsorted(newest, newest[-1] / 2))


def main() -> None:
    folder = DOCS / "gallery"
    folder.mkdir(parents=True, exist_ok=True)
    portraits = {}
    for make in variants.ALL:
        rule = small(make())
        print(make.__name__, flush=True)
        portraits[make.__name__] = Portrait(effective_attention(rule), recall(rule))
        jax.clear_caches()
    for name in portraits:
        draw(name, portraits, folder / f"{name}.png")
    draw_all(portraits, folder / "all.png")
    sections = [section(make, portraits[make.__name__]) for make in variants.ALL]
    page = INTRODUCTION + "".join(sections)
    (DOCS / "gallery.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
