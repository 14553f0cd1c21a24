"""Batches of token windows: shuffled, consecutive or mixed, and the held-out ones once.

Each process reads its own rows of every batch; a place in the stream is one number.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from miras_jax.errors import UserError
from miras_jax.training.data import Prepared
from miras_jax.training.windows import Walks, heldout_plan

if TYPE_CHECKING:
    import grain


def train_batches(
    prepared: Prepared,
    *,
    batch_size: int,
    seed: int,
    alignment: int = 1,
    shard_index: int = 0,
    shard_count: int = 1,
    walking: Sequence[int] | None = None,
) -> "grain.experimental.ElasticIterator":
    """Iterate without end over shuffled windows, in a new order each epoch.

    A mixture takes windows of its parts in turn, by their shares (to within one percent
    of each), and each part has epochs of its own.

    walking: the rows of the global batch that this shard reads, if windows are to be
    consecutive along each row (see `Walks`); those come with segment ids always, and
    `seed` has no part in their order.

    `batch_size` is the global batch; each step yields int32
    `[batch_size / shard_count, context_length + 1]`, rows `shard_index::shard_count` of
    that batch; of packed documents `[..., 2, context_length + 1]`, tokens and segment
    ids, with documents at multiples of `alignment`. `get_state()` is a small JSON dict,
    the same on every shard, from which `set_state` continues exactly under any
    `shard_count`. A last stretch of text shorter than a window is not trained on,
    unless documents are packed.

    UserError: `batch_size` does not fit the shards or exceeds the number of windows; a
    part of a mixture has no window.
    """
    import grain  # Slow to import, and only training needs it.

    _rows_per_shard(batch_size, shard_index, shard_count)
    windows = prepared.windows("train", alignment)
    if batch_size > len(windows):
        raise UserError(
            f"batch_size={batch_size} but the training text has only {len(windows)} "
            f"windows of {prepared.context_length} tokens; lower batch_size or "
            "context_length, or add text"
        )
    if walking is not None:
        order = grain.MapDataset.source(Walks(windows, batch_size, walking)).repeat()
    elif prepared.parts:
        order = _mixture(prepared, alignment, seed)
    else:
        order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
    return grain.experimental.ElasticIterator(
        order,
        batch_size,
        grain.sharding.ShardOptions(shard_index, shard_count),
        # The buffer counts whole batches; grain's default of 500 can exhaust memory.
        read_options=grain.ReadOptions(num_threads=2, prefetch_buffer_size=8),
    )


def _mixture(prepared: Prepared, alignment: int, seed: int) -> "grain.MapDataset":
    import grain

    orders = []
    for number, part in enumerate(prepared.parts):
        windows = prepared.windows("train", alignment, part)
        if not len(windows):
            raise UserError(
                f"TextFiles.train[{number}] has a share of the training windows but "
                f"not one window of {prepared.context_length} tokens; add text to it, "
                "or leave it out"
            )
        source = grain.MapDataset.source(windows).seed(seed + number)
        orders.append(source.shuffle().repeat())
    return grain.MapDataset.mix(orders, [part.share for part in prepared.parts])


def heldout_batches(
    prepared: Prepared,
    batch_size: int,
    *,
    alignment: int = 1,
    shard_index: int = 0,
    shard_count: int = 1,
    limit: int | None = None,
    consecutive: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate once over the held-out windows.

    Yields tokens int32 `[rows, context_length + 1]` (of packed documents and of
    consecutive windows with segment ids, as in training) and the weights of the
    predicted tokens, float32 `[rows, context_length]`, with `rows = batch_size /
    shard_count`. All shapes are equal and all shards yield equally often: what a row is
    missing has weight 0. `limit` reads at most that many windows, spread evenly.

    consecutive: each row reads its share of the windows in order, where otherwise the
    rows of one batch after another do.

    UserError: `batch_size` does not fit the shards, or `limit` is below 1.
    """
    rows = _rows_per_shard(batch_size, shard_index, shard_count)
    length = prepared.context_length
    windows = prepared.windows("heldout", alignment)
    packed = prepared.documents == "packed"
    count = len(windows) if packed else -(-(len(prepared.heldout) - 1) // length)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no held-out window; use at least 1")
    kept = count if limit is None else min(limit, count)
    plan = heldout_plan(count, kept, batch_size, consecutive=consecutive)

    def batches():
        for step in plan:
            tokens = np.zeros((rows, 2, length + 1), np.int32)
            weights = np.zeros((rows, length), np.float32)
            for row, window in enumerate(step[shard_index::shard_count]):
                if window < 0:
                    continue
                if packed:
                    tokens[row] = windows[window]
                    weights[row] = windows.weights(tokens[row])
                    continue
                start = window * length
                ids = prepared.heldout[start : start + length + 1]
                tokens[row, 0, : len(ids)] = ids
                tokens[row, 1, : len(ids)] = 1
                weights[row, : len(ids) - 1] = 1
            yield tokens if packed or consecutive else tokens[:, 0], weights

    return batches()


def _rows_per_shard(batch_size: int, shard_index: int, shard_count: int) -> int:
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index {shard_index} is not in range({shard_count})")
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(
            f"batch_size={batch_size} cannot be split evenly over {shard_count} "
            f"shards; use a positive multiple of {shard_count}"
        )
    return batch_size // shard_count
