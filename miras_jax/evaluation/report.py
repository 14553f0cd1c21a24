"""A run in words: what `miras evaluate` and the end of `miras train` print."""

import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from miras_jax.evaluation import compression, perplexity
from miras_jax.evaluation.perplexity import Quality, Span
from miras_jax.evaluation.recall import PASSAGE, PASSAGES, Recall, recall
from miras_jax.export import of_run
from miras_jax.generate import generate
from miras_jax.training.checkpoint import Restored
from miras_jax.training.data import Prepared
from miras_jax.training.run import Run, Totals

SAMPLE_TOKENS = 80
PROMPT_WORDS = 6


def evaluation(
    run: Run,
    restored: Restored,
    windows: int | None,
    consecutive: bool | None = None,
    furthest: int | None = None,
) -> str:
    """Evaluate, write the plot by position; the tables that say what came out.

    consecutive: read each row on from window to window; None: as in training.
    furthest: how far back `recall` asks; None: leave that out.
    """
    parameters = restored.state.parameters
    recalled = []
    if furthest is not None:
        recalled = ["", *recall_table(*recall(run, parameters, furthest))]
    totals = run.evaluate(parameters, windows=windows, consecutive=consecutive)
    quality = perplexity.quality(totals, run.prepared)
    plot = plot_positions(run, totals)
    return "\n".join(
        [
            heading(run, restored, totals),
            "",
            *quality_table(quality),
            "",
            *span_table(perplexity.spans(totals)),
            *recalled,
            "",
            f"plot  {plot}",
        ]
    )


def summary(run: Run, restored: Restored, program: str = "miras") -> str:
    """How good a finished run is, beside what compressors reach, with a sample.

    program: what the commands to try next begin with.
    """
    totals = run.evaluate(restored.state.parameters)
    quality = perplexity.quality(totals, run.prepared)
    references = compression.reference(run.prepared)
    plot_positions(run, totals)
    _plot_losses(run, quality, references)
    prompt = opening_words(run.prepared)
    pieces = generate(of_run(run, restored), prompt, length=SAMPLE_TOKENS)
    sample = prompt + "".join(pieces)
    return "\n".join(
        [
            heading(run, restored, totals),
            "",
            *quality_table(quality, references),
            "",
            f"loss plot  {run.workdir / 'loss.png'}",
            "",
            f"{SAMPLE_TOKENS} tokens at temperature 0.8 that continue held-out words "
            f'"{prompt}":',
            "",
            textwrap.indent(sample.strip(), "    "),
            "",
            "next",
            f"    {shlex.join([program, 'generate', str(run.workdir), prompt])}",
            f"    {shlex.join([program, 'evaluate', str(run.workdir)])}",
            f"    {shlex.join([program, 'variants'])}",
        ]
    )


def heading(run: Run, restored: Restored, totals: Totals) -> str:
    """What was evaluated, in one line."""
    length = run.prepared.context_length
    what = f"{run.workdir}: best checkpoint, step {restored.step:,}, on"
    if len(totals.losses) > length:
        rows = int(totals.counts.max())
        return (
            f"{what} {int(totals.counts.sum()):,} held-out tokens, read on from window "
            f"to window of {length:,} in {rows:,} rows"
        )
    of = -(-(len(run.prepared.heldout) - 1) // length)
    evaluated = int(totals.counts[0])
    windows = f"all {of:,}" if evaluated == of else f"{evaluated:,} of {of:,}"
    return f"{what} {windows} held-out windows of {length:,} tokens"


def quality_table(
    quality: Quality, references: Mapping[str, float] | None = None
) -> list[str]:
    """One unit a line; `references` are other bits per byte, by name."""
    note = "" if quality.share == 1 else " (estimated from these windows)"
    lines = [("held-out bits per byte", f"{quality.bits_per_byte:.3f}", note)]
    for name, bits in (references or {}).items():
        verdict = "beaten" if quality.bits_per_byte < bits else "not beaten"
        lines.append(
            (f"  {name} after the training text", f"{bits:.3f}", f" {verdict}")
        )
    lines += [
        ("token perplexity", f"{quality.token_perplexity:,.2f}", ""),
        ("word perplexity", f"{quality.word_perplexity:,.1f}", note),
        ("nats per token", f"{quality.nats_per_token:.4f}", ""),
    ]
    return _aligned(lines)


def span_table(spans: Sequence[Span]) -> list[str]:
    """The loss by position, a line for each span."""
    lines = [("tokens of context", "nats per token", "")]
    for first, last, loss in spans:
        label = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        lines.append((label, f"{loss:.4f}", ""))
    return _aligned(lines)


def recall_table(fresh: float, found: Sequence[Recall]) -> list[str]:
    """What is recalled, a line for each distance: 0 % is a passage read anew."""
    lines = [
        (f"{PASSAGES} passages of {PASSAGE} tokens", "nats per token", ""),
        ("read anew", f"{fresh:.4f}", ""),
    ]
    for distance, loss in found:
        share = f", {1 - loss / fresh:.1%} recalled"
        lines.append((f"read {distance:,} tokens ago", f"{loss:.4f}", share))
    return _aligned(lines)


def _aligned(lines: Sequence[tuple[str, str, str]]) -> list[str]:
    """Names to the left, numbers to the right, notes after them."""
    name_width, number_width = (max(len(line[i]) for line in lines) for i in (0, 1))
    return [
        f"{name:<{name_width}}  {number:>{number_width}}{note}"
        for name, number, note in lines
    ]


def plot_positions(run: Run, totals: Totals) -> Path:
    """Write `loss_by_position.png` beside the run's other plot; its path."""
    from miras_jax.training.plots import plot_by_position  # slow to import

    return plot_by_position(
        {run.workdir.name: perplexity.by_position(totals)},
        run.workdir / "loss_by_position.png",
        title="Held-out loss by position in the context",
    )


def _plot_losses(run: Run, quality: Quality, references: Mapping[str, float]) -> None:
    """`loss.png` once more, with what the compressors need as lines across it."""
    from miras_jax.training.plots import plot_losses  # slow to import

    nats_per_bit = quality.nats_per_token / quality.bits_per_byte
    lines = {name: bits * nats_per_bit for name, bits in references.items()}
    plot_losses(run.workdir, title=run.workdir.name, references=lines)


def opening_words(prepared: Prepared) -> str:
    """A few words from the middle of the held-out text, plain ones for any shell."""
    middle = len(prepared.heldout) // 2
    tokens = prepared.heldout[middle : middle + 2048]
    text = prepared.tokenizer.decode(tokens)
    words = rf"\b\w+(?:,?\s+\w+){{{PROMPT_WORDS - 1}}}\b"
    sentence = re.search(rf"(?<=[.!?]\s){words}", text) or re.search(words, text)
    return " ".join((sentence.group() if sentence else text[:32]).split())
