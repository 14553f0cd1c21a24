"""How well a model predicts held-out text, in the units that people compare.

Nats per token depend on the tokenizer; bits per byte and the perplexity per word do
not, and so compare models of any vocabulary, and compressors.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from miras_jax.training.data import Prepared
from miras_jax.training.run import Totals


@dataclass(frozen=True)
class Quality:
    """The loss on held-out text. Below `share` 1 the last two are estimates."""

    nats_per_token: float
    token_perplexity: float
    bits_per_byte: float
    word_perplexity: float  # exp(nats / words), as for PG-19; words end at whitespace
    share: float  # of the held-out tokens that were evaluated


class Span(NamedTuple):
    """Mean loss where `first` to `last` tokens of context were read before."""

    first: int
    last: int
    loss: float  # nats per token


def quality(totals: Totals, prepared: Prepared) -> Quality:
    """The loss in every unit.

    Over all windows each held-out byte is predicted exactly once. A part of the windows
    is taken to hold as many bytes and words per token as the whole text.
    """
    nats, tokens = float(totals.losses.sum()), float(totals.counts.sum())
    share = tokens / (len(prepared.heldout) - 1)
    return Quality(
        nats_per_token=nats / tokens,
        token_perplexity=_exp(nats / tokens),
        bits_per_byte=nats / math.log(2) / (share * prepared.heldout_bytes),
        word_perplexity=_exp(nats / (share * max(prepared.heldout_words, 1))),
        share=share,
    )


def _exp(x: float) -> float:
    # Text without whitespace is one word of any length.
    return math.exp(x) if x < 700 else math.inf


def by_position(totals: Totals) -> np.ndarray:
    """Nats per token `[L]`; entry i is of the token after i + 1 tokens of context.

    NaN where no row has a token, as between documents.
    """
    length = _reached(totals)
    losses, counts = totals.losses[:length], totals.counts[:length]
    return np.divide(losses, counts, out=np.full(length, np.nan), where=counts > 0)


def spans(totals: Totals) -> list[Span]:
    """The loss by position in parts that double: 1, 2, 3-4, 5-8, ..."""
    length = _reached(totals)
    result, end = [], 0
    while end < length:
        start, end = end, min(max(1, 2 * end), length)
        part = slice(start, end)
        if count := totals.counts[part].sum():
            loss = totals.losses[part].sum() / count
            result.append(Span(start + 1, end, float(loss)))
    return result


def _reached(totals: Totals) -> int:
    """Positions up to the last with a token: all, but of a text that is too short."""
    return int(np.flatnonzero(totals.counts)[-1]) + 1
