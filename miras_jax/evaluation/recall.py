"""What a model recalls of a passage that it has read before, by how long ago.

The loss by position tells little of a memory: most of a text is predicted from its last
few words. A passage that comes again is predicted by whoever has stored it.
"""

from typing import NamedTuple

import numpy as np

from miras_jax.errors import UserError
from miras_jax.nn.functional import Parameters
from miras_jax.training.run import Run

PASSAGE, PASSAGES = 32, 64


class Recall(NamedTuple):
    """Loss on a passage that was read before, `distance` tokens ago."""

    distance: int  # from a token to the same one of the earlier reading
    loss: float  # nats per token


def recall(
    run: Run, parameters: Parameters, furthest: int
) -> tuple[float, list[Recall]]:
    """Nats per token of passages read once, and read again after longer and longer.

    A row is `furthest` + PASSAGE tokens from the first half of the held-out text, the
    last PASSAGE of them replaced by a passage of the second half. Read again, that
    passage also replaces what was PASSAGE, 2 PASSAGE, 4 PASSAGE ... tokens earlier: all
    losses are of the same PASSAGES passages, after as many tokens.

    UserError: less than one passage, or rows beyond half of the text.
    """
    text = run.prepared.heldout
    half = len(text) // 2
    if not PASSAGE <= furthest <= half - PASSAGE:
        raise UserError(
            f"recall from up to {furthest} tokens ago: passages have {PASSAGE} tokens, "
            f"and the first half of this held-out text has {half:,}; use "
            f"{PASSAGE} to {max(PASSAGE, half - PASSAGE)}"
        )
    rows = _cut(text[:half], furthest + PASSAGE)
    passages = _cut(text[half:], PASSAGE)
    rows[:, furthest:] = passages
    fresh = _loss(run, parameters, rows)
    found, distance = [], PASSAGE
    while distance <= furthest:
        again = rows.copy()
        earlier = furthest - distance
        again[:, earlier : earlier + PASSAGE] = passages
        found.append(Recall(distance, _loss(run, parameters, again)))
        distance *= 2
    return fresh, found


def _cut(text: np.ndarray, size: int) -> np.ndarray:
    """`[PASSAGES, size]` tokens, evenly spread over the text."""
    starts = np.linspace(0, len(text) - size, PASSAGES, dtype=int)
    return text[starts[:, None] + np.arange(size)].astype(np.int32)


def _loss(run: Run, parameters: Parameters, rows: np.ndarray) -> float:
    """Nats per token of the last PASSAGE tokens of every row."""
    size = run.evaluation_rows
    part, parts = run.data_part
    total = 0.0
    for first in range(0, len(rows), size):
        batch = rows[first : first + size]
        missing = size - len(batch)
        batch = np.pad(batch, ((0, missing), (0, 0)))
        weights = np.zeros((size, batch.shape[1] - 1), np.float32)
        weights[: size - missing, -PASSAGE:] = 1
        here = (run.to_devices(x[part::parts]) for x in (batch, weights))
        losses, *_ = run.evaluate_step(parameters, None, *here, run.stop_flags(False))
        total += float(np.sum(losses))
    return total / (len(rows) * PASSAGE)
