"""The units of the loss, against computations by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from miras_jax.evaluation.perplexity import Span, by_position, quality, spans
from miras_jax.evaluation.report import quality_table
from miras_jax.training.run import Totals


def prepared(tokens, size, words):
    return SimpleNamespace(
        heldout=np.zeros(tokens + 1), heldout_bytes=size, heldout_words=words
    )


# Two windows of three tokens and one of two: 8 predicted tokens and 8 * 1.5 nats.
WHOLE = Totals(np.array([6.0, 4.5, 1.5]), np.array([3.0, 3.0, 2.0]))


def test_every_unit_by_hand():
    result = quality(WHOLE, prepared(tokens=8, size=20, words=4))
    assert result.nats_per_token == 1.5
    assert result.token_perplexity == pytest.approx(4.4816890703)  # e^1.5
    assert result.bits_per_byte == pytest.approx(12 * 1.4426950409 / 20)  # log2(e)
    assert result.word_perplexity == pytest.approx(20.0855369232)  # e^3
    assert result.share == 1


def test_a_uniform_guess_over_bytes_costs_eight_bits_each():
    totals = Totals(np.array([100 * math.log(256)]), np.array([100.0]))
    result = quality(totals, prepared(tokens=100, size=100, words=10))
    assert result.bits_per_byte == pytest.approx(8)
    assert result.word_perplexity == pytest.approx(256.0**10)


def test_part_of_the_windows_estimates_the_whole():
    part = Totals(np.array([1.5, 1.5]), np.array([1.0, 1.0]))
    result = quality(part, prepared(tokens=8, size=20, words=4))
    whole = quality(WHOLE, prepared(tokens=8, size=20, words=4))
    assert result.share == 0.25
    assert result.bits_per_byte == pytest.approx(whole.bits_per_byte)
    assert result.word_perplexity == pytest.approx(whole.word_perplexity)


@pytest.mark.parametrize("words", [0, 1])
def test_text_that_is_one_long_word_has_no_finite_word_perplexity(words):
    totals = Totals(np.array([5000.0]), np.array([1000.0]))
    result = quality(totals, prepared(tokens=1000, size=1000, words=words))
    assert result.word_perplexity == math.inf


def test_spans_double_and_weigh_tokens_equally():
    counts = np.array([4.0, 4, 4, 2, 2, 2])
    totals = Totals(np.array([3.0, 2, 1, 5, 4, 0]) * counts, counts)
    assert spans(totals) == [
        Span(1, 1, 3.0),
        Span(2, 2, 2.0),
        Span(3, 4, pytest.approx((4 * 1 + 2 * 5) / 6)),
        Span(5, 6, 2.0),
    ]
    np.testing.assert_allclose(by_position(totals), [3, 2, 1, 5, 4, 0])


def test_positions_that_no_token_has_are_left_out():
    totals = Totals(np.array([2.0, 1.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0]))
    assert spans(totals) == [Span(1, 1, 2.0), Span(2, 2, 1.0)]
    np.testing.assert_array_equal(by_position(totals), [2, 1])
    gap = Totals(np.array([2.0, 0, 0, 0, 3]), np.array([1.0, 0, 0, 0, 2]))
    assert spans(gap) == [Span(1, 1, 2.0), Span(5, 5, 1.5)]
    np.testing.assert_array_equal(by_position(gap), [2, np.nan, np.nan, np.nan, 1.5])


def test_the_table_says_what_is_beaten_and_what_is_estimated():
    result = quality(WHOLE, prepared(tokens=8, size=20, words=4))
    text = "\n".join(quality_table(result, {"worse": 0.87, "better": 0.86}))
    assert "bits per byte" in text and "0.866" in text and "estimated" not in text
    verdicts = [line.split()[-2:] for line in text.splitlines()[1:3]]
    assert verdicts == [["0.870", "beaten"], ["not", "beaten"]]
    part = Totals(np.array([1.5]), np.array([1.0]))
    text = "\n".join(quality_table(quality(part, prepared(8, 20, 4))))
    assert text.count("estimated") == 2
