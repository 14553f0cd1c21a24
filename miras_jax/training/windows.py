"""Windows of a text, and the two ways to read on from one to the next.

Shuffled windows stand alone. Consecutive ones follow one another along each row of the
batch, so that a model can carry its state over their borders.
"""

from collections.abc import Sequence

import numpy as np

from miras_jax.training.packing import PackedWindows


class Windows:
    """Random access to the full windows of `tokens`, int32 `[context_length + 1]`."""

    documents = 1  # whatever the text is made of

    def __init__(self, tokens: np.ndarray, context_length: int):
        self._tokens = tokens
        self._context_length = context_length

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._context_length

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self._context_length
        return self._tokens[start : start + self._context_length + 1].astype(np.int32)


class Walks:
    """What the rows of a batch read, step by step, when windows are consecutive.

    Row r of B begins at window r N / B of N, and goes on from the last window to the
    first; so every window is read once in N / B steps, each time by another row. Items
    are int32 `[2, context_length + 1]`, tokens and segment ids: with the first window a
    new document begins, even if the whole text is but one.

    Item k of step s is number s B + k. Of those, shard i of n reads the numbers i::n,
    its j-th item being for `rows[j]`, where that row's state is.
    """

    def __init__(
        self, windows: Windows | PackedWindows, batch_size: int, rows: Sequence[int]
    ):
        self._windows = windows
        self._batch_size = batch_size
        self._rows = rows

    def __len__(self) -> int:
        """Two passes: after an even number of them everything is as in the first."""
        return 2 * len(self._windows) * self._batch_size

    def __getitem__(self, number: int) -> np.ndarray:
        step, item = divmod(number, self._batch_size)
        row = self._rows[item * len(self._rows) // self._batch_size]
        count = len(self._windows)
        passes, place = divmod(row * count // self._batch_size + step, count)
        window = self._windows[place]
        if window.ndim == 1:
            window = np.stack([window, np.ones_like(window)])
        window[1, window[1] != 0] += passes % 2 * self._windows.documents
        return window


def heldout_plan(
    count: int, kept: int, batch_size: int, *, consecutive: bool
) -> np.ndarray:
    """Which of `count` windows each row reads, `[steps, batch_size]`, -1 for none.

    At most `kept` of them, each once: in order and spread evenly, or, consecutive, in
    rows that begin evenly spread.
    """
    if not consecutive:
        plan = np.full(-(-kept // batch_size) * batch_size, -1)
        plan[:kept] = np.arange(kept) * count // kept
        return plan.reshape(-1, batch_size)
    rows = min(batch_size, kept)
    starts = np.arange(rows + 1) * count // rows
    reads = np.diff(np.arange(rows + 1) * kept // rows)
    # Both differ by one at most from row to row, though not at the same rows.
    reads = np.minimum(reads, np.diff(starts))
    steps = np.arange(reads.max())[:, None]
    plan = np.where(steps < reads, starts[:-1] + steps, -1)
    return np.pad(plan, ((0, 0), (0, batch_size - rows)), constant_values=-1)
