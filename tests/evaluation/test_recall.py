"""What is recalled: the rows that are read, and the losses that count."""

from types import SimpleNamespace

import numpy as np
import pytest

from miras_jax.errors import UserError
from miras_jax.evaluation.recall import PASSAGE, PASSAGES, recall
from miras_jax.evaluation.report import recall_table

# No two places of this text begin alike, so what is predicted has been read before.
TEXT = np.random.default_rng(0).permutation(1000).astype(np.uint16)


def reader(memory: int, rows_read: list, size: int = 24):
    """A run whose model loses 1 on what it has not read in its last `memory` tokens.

    Batches of 24 do not divide the 64 passages.
    """

    def evaluate_step(parameters, carry, tokens, weights, stop):
        assert (parameters, carry, tokens.shape[0]) == ("parameters", None, size)
        known = np.zeros(weights.shape)
        for row, column in np.ndindex(weights.shape):
            before = tokens[row, max(0, column + 1 - memory) : column + 1]
            known[row, column] = tokens[row, column + 1] in before
        rows_read.extend(tokens[weights.any(axis=1)])
        losses = weights * (1 - known)
        return losses.sum(axis=0), weights.sum(axis=0), False, None

    return SimpleNamespace(
        prepared=SimpleNamespace(heldout=TEXT),
        evaluation_rows=size,
        data_part=(0, 1),
        to_devices=lambda rows: rows,
        stop_flags=lambda requested: requested,
        evaluate_step=evaluate_step,
    )


def test_a_memory_of_so_many_tokens_recalls_what_is_as_near():
    rows = []
    fresh, found = recall(reader(64, rows), "parameters", 200)
    assert fresh == 1
    assert [(r.distance, r.loss) for r in found] == [(32, 0), (64, 0), (128, 1)]
    assert np.shape(rows) == (4 * PASSAGES, 200 + PASSAGE)
    once, *again = np.split(np.array(rows), 4)
    # The same passages, of the half that rows are not from.
    passages = once[:, -PASSAGE:]
    assert {tuple(p) for p in passages} == {tuple(r[-PASSAGE:]) for r in again[2]}
    assert np.isin(passages, TEXT[500:]).all()
    assert np.isin(once[:, :-PASSAGE], TEXT[:500]).all()
    np.testing.assert_array_equal(
        again[1][:, 200 - 64 : 200 - 32], passages
    )  # two passages back, and nothing else is changed
    assert (again[1] != once).sum() == passages.size


@pytest.mark.parametrize("furthest", [PASSAGE - 1, 500 - PASSAGE + 1])
def test_rows_must_hold_a_passage_twice_and_fit_into_half_of_the_text(furthest):
    with pytest.raises(UserError, match="use 32 to 468"):
        recall(reader(64, []), "parameters", furthest)


def test_the_table_says_how_much_is_recalled():
    fresh, found = recall(reader(64, []), "parameters", 128)
    assert recall_table(fresh, found)[1:] == [
        "read anew                         1.0000",
        "read 32 tokens ago                0.0000, 100.0% recalled",
        "read 64 tokens ago                0.0000, 100.0% recalled",
        "read 128 tokens ago               1.0000, 0.0% recalled",
    ]
