"""Where every token stands in its document, when rows hold several documents.

`segment_ids` `[B, L]` name the document of each token, 0 for padding. A document is a
run of equal ids; padding comes before or after it. Mixers read each as if it were
alone, provided that documents start at multiples of `Model.alignment`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from miras_jax.core.types import Documents


class Last(NamedTuple):
    """Where a row was left: what the next tokens may continue."""

    segment: jax.Array  # [B] id of the last token, 0 before the first one
    index: jax.Array  # [B] tokens of the last document that have been read


class Places(NamedTuple):
    """Where tokens stand. Without segment ids all continue one document."""

    index: jax.Array  # [B, L] tokens of the same document before this one
    documents: Documents | None  # leaves [B, L]
    last: Last  # after these tokens
    read: jax.Array | None  # [B] tokens up to and including the last real one


def beginning(batch: int) -> Last:
    """Before the first token."""
    return Last(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32))


def locate(shape: tuple[int, int], last: Last, segment_ids: jax.Array | None) -> Places:
    """The places of tokens `[B, L]` that follow `last`."""
    batch, length = shape
    steps = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), shape)
    going_on = last.index[:, None] + steps
    if segment_ids is None:
        return Places(going_on, None, last._replace(index=last.index + length), None)
    before = jnp.concatenate([last.segment[:, None], segment_ids[:, :-1]], axis=1)
    real = segment_ids != 0
    starts = real & (segment_ids != before)
    start = jax.lax.cummax(jnp.where(starts, steps, -1), axis=1)
    index = jnp.where(start >= 0, steps - start, going_on)
    read = jnp.max(jnp.where(real, steps + 1, 0), axis=1)
    final = jnp.max(jnp.where(steps + 1 == read[:, None], index + 1, 0), axis=1)
    last = Last(
        segment_ids[:, -1].astype(jnp.int32), jnp.where(read > 0, final, last.index)
    )
    return Places(index, Documents(starts, real), last, read)
