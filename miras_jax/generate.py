"""Text from a trained model, one token at a time, from a cache of constant size.

The prompt is read in pieces of `PIECE` tokens and what is left of it one by one, with
the very function that decodes. So there are two programs to compile whatever the
prompt, and a single one for a short prompt.
"""

import math
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from miras_jax.errors import UserError
from miras_jax.export import Trained
from miras_jax.training.tokenizer import StreamDecoder

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
    tokenizer = trained.tokenizer
    try:
        ids = np.append(np.int32(tokenizer.end_of_text), tokenizer.encode(prompt))
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not valid text; give it in UTF-8") from error
    draw = (jax.random.key(seed), jnp.float32(temperature), jnp.float32(top_p))
    return _stream(trained, ids, length, draw)


def _stream(trained, ids, length, draw) -> Iterator[str]:
    model, parameters, tokenizer, _ = trained
    # Only full attention has a cache of this size: rounded, to be compiled less often.
    size = -(-(len(ids) + length) // PIECE) * PIECE
    cache = _start(model, parameters, size)
    whole = len(ids) // PIECE * PIECE
    pieces = [ids[i : i + PIECE] for i in range(0, whole, PIECE)]
    pieces += [ids[i : i + 1] for i in range(whole, len(ids))]
    for piece in pieces:
        token, cache = _read(model, parameters, cache, piece[None], 0, draw)

    decoder = StreamDecoder(tokenizer)
    for count in range(1, length + 1):
        if (last := token.item()) == tokenizer.end_of_text:
            break
        if text := decoder.feed(last):
            yield text
        if count < length:
            token, cache = _read(model, parameters, cache, token, count, draw)
    if text := decoder.finish():
        yield text


@partial(jax.jit, static_argnames=("model", "size"))
def _start(model, parameters, size):
    return model.start(parameters, 1, size)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(model, parameters, cache, tokens, count, draw):
    """Read tokens `[1, n]`; the one drawn to follow them, `[1, 1]`, and the cache."""
    logits, cache = model.apply(parameters, tokens, cache)
    key, temperature, top_p = draw
    token = sample(logits[0, -1], jax.random.fold_in(key, count), temperature, top_p)
    return token[None, None], cache


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
