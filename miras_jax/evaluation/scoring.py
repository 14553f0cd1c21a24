"""How likely a model holds given continuations of given contexts.

What benchmarks of multiple choice, last words and perplexity are made of; it knows of
none of them. Rows are padded on the right, which a causal model cannot see, to a few
lengths, so that there are few programs to compile.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.errors import UserError
from miras_jax.export import Trained

SHORTEST = 32
"""Tokens of the shortest rows; longer ones have twice as many, and again."""

BATCH_TOKENS = 4096
"""Of a batch, whatever the length of its rows: what bounds the memory for logits."""


class Score(NamedTuple):
    """Of one continuation."""

    log_likelihood: float  # nats, summed over its tokens
    greedy: bool  # whether each of its tokens is the likeliest one


class Pair(NamedTuple):
    """Token ids of a context, which is not scored, and of what follows it."""

    context: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True)
class Scorer:
    """Scores with a trained model that reads at most `max_length` tokens at once."""

    trained: Trained
    max_length: int = 2048

    def __post_init__(self):
        if self.max_length < 1:
            raise UserError(
                f"max_length is {self.max_length}; let the model read at least 1 token"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self.trained.tokenizer.encode(text).tolist()

    def pair(self, context: str, continuation: str) -> Pair:
        """Both as one text, which follows an end-of-text token, as in training.

        Cut behind as many tokens as the context has alone. White space at the context's
        end goes to the continuation: tokens begin with theirs.
        """
        kept = context.rstrip()
        whole = self.encode(context + continuation)
        split = len(self.encode(kept))
        start = [self.trained.tokenizer.end_of_text]
        return Pair(start + whole[:split], whole[split:])

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """The scores of continuations, in their order.

        Of a context that does not fit into `max_length` with the continuation, the last
        tokens are read. UserError: a continuation that does not fit alone.
        """
        rows = [self._row(*pair) for pair in pairs]
        scores: list = [None] * len(rows)
        for length, batch in self._batches(rows):
            tokens = np.zeros((max(1, BATCH_TOKENS // length), length + 1), np.int32)
            for i, number in enumerate(batch):
                tokens[i, : len(rows[number])] = rows[number]
            model, parameters, *_ = self.trained
            losses, likeliest = map(np.asarray, _read(model, parameters, tokens))
            for i, number in enumerate(batch):
                stop = len(rows[number]) - 1
                scored = slice(stop - len(pairs[number].continuation), stop)
                nats = losses[i, scored].sum(dtype=np.float64)
                scores[number] = Score(-float(nats), bool(likeliest[i, scored].all()))
        return scores

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """What is read and the token after it: at most `max_length` + 1 tokens."""
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation of {len(continuation):,} tokens is to be scored, and "
                f"the model reads at most {self.max_length:,}; let it read more"
            )
        if not context:
            raise ValueError("nothing to predict the first token from")
        return [*context, *continuation][-(self.max_length + 1) :]

    def _batches(self, rows: Sequence[list[int]]) -> Iterator[tuple[int, list[int]]]:
        """(tokens of a row, numbers of the rows) for batches of rows of like length."""
        by_length: dict[int, list[int]] = {}
        for number, row in enumerate(rows):
            doubled = max(SHORTEST, 1 << (len(row) - 2).bit_length())
            by_length.setdefault(min(doubled, self.max_length), []).append(number)
        for length, numbers in sorted(by_length.items()):
            size = max(1, BATCH_TOKENS // length)
            for first in range(0, len(numbers), size):
                yield length, numbers[first : first + size]


@partial(jax.jit, static_argnames="model")
def _read(model, parameters, tokens):
    """Of tokens `[B, L + 1]` the loss of each but the first, and if it is likeliest."""
    logits, _ = model.apply(parameters, tokens[:, :-1])
    targets = tokens[:, 1:, None]
    chosen = jnp.take_along_axis(logits, targets, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - chosen
    return losses, jnp.argmax(logits, axis=-1) == targets[..., 0]
