"""Text from a trained model, one token at a time, from a cache of constant size.

A prompt is read in pieces of `PIECE` tokens and what is left of it one by one, with
the very function that decodes. So there are two programs to compile whatever the
prompt, and a single one for a short prompt. Of several prompts that are read together
the longer ones are still read, token by token, while the shorter ones are answered.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.errors import UserError
from miras_jax.export import Trained
from miras_jax.training.tokenizer import StreamDecoder, Tokenizer

PIECE = 64
"""Tokens of the prompt that are read at once."""


def generate(
    trained: Trained,
    prompt: str,
    *,
    length: int,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the text that continues `prompt`, in pieces as it is made.

    At most `length` tokens; the end-of-text token ends it before. Temperature 0 takes
    the likeliest token each time; otherwise a token is drawn from the likeliest ones
    whose probabilities make up `top_p`. The same seed gives the same text. The prompt
    follows an end-of-text token, as documents do in training. A cut-off character at
    the end becomes U+FFFD.

    UserError: a setting out of its range, or a prompt that is no text.
    """
    draw = _draw(length, temperature, top_p, seed)
    document = _document(trained.tokenizer, prompt)
    return _stream(trained, document, length, draw)


def complete(
    trained: Trained,
    prompts: Sequence[str],
    *,
    length: int,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    rows: int = 8,
    limit: int | None = None,
) -> list[str]:
    """The texts that continue `prompts`, in their order, `rows` of them at a time.

    What holds for `generate` holds for each. A text also ends before the first of
    `stop` that comes up in it. limit: of a prompt only its last tokens are read, so
    that with `length` more they are at most so many; None: all are.

    UserError: as for `generate`, a limit that leaves no room, or an empty `stop`.
    """
    draw = _draw(length, temperature, top_p, seed)
    if limit is not None and limit <= length:
        raise UserError(
            f"{length} tokens to write leave no room for a prompt in {limit}; "
            "write fewer or read more"
        )
    if not all(stop):
        raise UserError("one of the strings to stop at is empty; leave it out")
    documents = [_document(trained.tokenizer, prompt) for prompt in prompts]
    if limit is not None:
        documents = [document[-(limit - length) :] for document in documents]
    # Prompts of like length together: the fewer tokens are read one by one.
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    texts = [""] * len(documents)
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        # Whole batches only, so that there is one program for all of them.
        filled = [documents[i] for i in batch + batch[-1:] * (rows - len(batch))]
        written = [_Written(trained.tokenizer, length, stop) for _ in batch]
        shortest = min(map(len, filled))
        for at, drawn in enumerate(_drawn(trained, filled, length, draw), shortest):
            for i, text, token in zip(batch, written, drawn, strict=False):
                if at >= len(documents[i]):
                    text.feed(int(token))
            if all(text.finished for text in written):
                break
        for i, text in zip(batch, written, strict=True):
            texts[i] = text.text()
    return texts


class _Written:
    """The text of one prompt as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, length: int, stop: Sequence[str]):
        self._end_of_text, self._stop = tokenizer.end_of_text, stop
        self._decoder = StreamDecoder(tokenizer)
        self._text, self._left = "", length
        self.finished = False

    def feed(self, token: int) -> None:
        if self.finished:
            return
        self._left -= 1
        if token != self._end_of_text:
            self._text += self._decoder.feed(token)
        stopped = any(stop in self._text for stop in self._stop)
        self.finished = stopped or token == self._end_of_text or not self._left

    def text(self) -> str:
        whole = self._text + self._decoder.finish()
        ends = [whole.find(stop) for stop in self._stop if stop in whole]
        return whole[: min(ends, default=None)]


def _draw(length, temperature, top_p, seed) -> tuple[jax.Array, ...]:
    """Key, temperature and nucleus; UserError for what is out of range."""
    if length < 1:
        raise UserError(f"length is {length}; generate at least 1 token")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}; give 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(
            f"top_p is {top_p}; give more than 0 and at most 1 (all tokens)"
        )
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; give a number from 0 to {2**32 - 1}")
    return jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p)


def _document(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    try:
        return np.append(np.int32(tokenizer.end_of_text), tokenizer.encode(prompt))
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not valid text; give it in UTF-8") from error


def _stream(trained, document, length, draw) -> Iterator[str]:
    end_of_text = trained.tokenizer.end_of_text
    decoder = StreamDecoder(trained.tokenizer)
    for (token,) in _drawn(trained, [document], length, draw):
        if token == end_of_text:
            break
        if text := decoder.feed(token):
            yield text
    if text := decoder.finish():
        yield text


def _drawn(trained, documents, length, draw) -> Iterator[np.ndarray]:
    """The tokens `[B]` drawn to follow token n, n + 1 ... of every document.

    n is the shortest one's last token. A document that goes on is read on, whatever was
    drawn; one that does not is continued by what was. Until the longest one has been
    followed by `length` tokens.
    """
    model, parameters, _, _ = trained
    lengths = [len(document) for document in documents]
    shortest, end = min(lengths), max(lengths) + length
    # Only full attention has a cache of this size: rounded, to be compiled less often.
    cache = _start(model, parameters, len(documents), -(-end // PIECE) * PIECE)
    known = np.stack([d[:shortest] for d in documents])
    whole = shortest // PIECE * PIECE
    pieces = [known[:, i : i + PIECE] for i in range(0, whole, PIECE)]
    pieces += [known[:, i : i + 1] for i in range(whole, shortest)]
    for piece in pieces:
        tokens, cache = _read(model, parameters, cache, piece, 0, draw)
    for at in range(shortest, end):
        drawn = np.asarray(tokens)[:, 0]
        yield drawn
        if at + 1 < end:
            if at < max(lengths):
                tokens = np.array(
                    [
                        [document[at] if at < len(document) else token]
                        for document, token in zip(documents, drawn, strict=True)
                    ],
                    np.int32,
                )
            count = at - shortest + 1
            tokens, cache = _read(model, parameters, cache, tokens, count, draw)


@partial(jax.jit, static_argnames=("model", "rows", "size"))
def _start(model, parameters, rows, size):
    return model.start(parameters, rows, size)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(model, parameters, cache, tokens, count, draw):
    """Read tokens `[B, n]`; those drawn to follow them, `[B, 1]`, and the cache."""
    logits, cache = model.apply(parameters, tokens, cache)
    key, temperature, top_p = draw
    # Every row of every step has a number of its own.
    numbers = count * len(tokens) + jnp.arange(len(tokens))
    keys = jax.vmap(partial(jax.random.fold_in, key))(numbers)
    each = jax.vmap(sample, in_axes=(0, 0, None, None))
    return each(logits[:, -1], keys, temperature, top_p)[:, None], cache


def sample(logits: jax.Array, key: jax.Array, temperature, top_p) -> jax.Array:
    """One token id drawn from logits `[vocab]`; the likeliest at temperature 0."""
    greedy = temperature == 0
    # From the largest: a small temperature must not turn logits into infinities.
    scaled = (logits - jnp.max(logits)) / jnp.where(greedy, 1.0, temperature)
    drawn = jax.random.categorical(key, nucleus(scaled, top_p))
    return jnp.where(greedy, jnp.argmax(logits), drawn)


def nucleus(logits: jax.Array, top_p) -> jax.Array:
    """Logits `[vocab]`, -inf except of the fewest tokens that make up `top_p`."""
    order = jnp.argsort(-logits)
    probabilities = jax.nn.softmax(logits)[order]
    likelier = jnp.cumsum(probabilities) - probabilities
    # At 1 rounding must not cut the tail.
    kept = (likelier < top_p) | (top_p >= 1)
    return (
        jnp.full_like(logits, -jnp.inf)
        .at[order]
        .set(jnp.where(kept, logits[order], -jnp.inf))
    )
