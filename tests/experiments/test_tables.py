"""What documents show of the code is what the code gives."""

import numpy as np
import pytest

from experiments import gallery, tables
from miras_jax import variants
from miras_jax.core import table


def test_the_table_of_the_readme_is_that_of_the_code():
    text = tables.README.read_text(encoding="utf-8")
    assert text == tables.updated(text), "run: python -m experiments.tables"


def test_a_table_without_its_marks_is_not_passed_over():
    text = tables.README.read_text(encoding="utf-8")
    with pytest.raises(SystemExit, match="lost its marks"):
        tables.updated(text.replace("<!-- end of variants -->", ""))


def test_the_gallery_has_a_picture_and_the_equation_of_every_rule():
    remedy = "run: python -m experiments.gallery"
    page = (gallery.DOCS / "gallery.md").read_text(encoding="utf-8")
    sections = dict(part.split("\n", 1) for part in page.split("\n## ")[1:])
    assert list(sections) == [make.__name__ for make in variants.ALL], remedy
    for make in variants.ALL:
        text = sections[make.__name__]
        assert " ".join(make.__doc__.split()) in text, remedy
        row = table.row(make(), variants.CHANNELWISE.get(make, ()))
        assert f"- write rule: {row.write}\n" in text, remedy
        picture = gallery.DOCS / "gallery" / f"{make.__name__}.png"
        assert 0 < picture.stat().st_size < 60_000


def test_softmax_attention_weighs_as_its_equation_says():
    weights = gallery.effective_attention(variants.softmax_attention())
    rng = np.random.default_rng(1)
    symbols = rng.integers(gallery.SYMBOLS, size=gallery.TOKENS)
    keys = gallery.unit(rng, gallery.SYMBOLS)[symbols] * gallery.DIM**0.5
    scores = np.exp(keys @ keys.T / gallery.DIM**0.5) * np.tri(gallery.TOKENS)
    scores /= scores.max(axis=1, keepdims=True)
    np.testing.assert_allclose(weights, scores, atol=1e-4)


def test_recall_of_an_orthogonal_stream_is_perfect(monkeypatch):
    """Keys of a delta rule that do not meet do not disturb each other."""
    monkeypatch.setattr(gallery, "DISTRACTORS", gallery.DIM - 1)
    monkeypatch.setattr(gallery, "STREAMS", 1)
    monkeypatch.setattr(gallery, "unit", lambda rng, n: np.eye(n))
    np.testing.assert_allclose(gallery.recall(variants.delta_net()), 1, atol=1e-5)


def test_a_memory_weighs_only_what_it_has_read():
    weights = gallery.effective_attention(gallery.small(variants.yaad()))
    assert not np.triu(weights, k=1).any()
    np.testing.assert_allclose(weights.max(axis=1), 1)
