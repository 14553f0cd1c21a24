"""Tokenizers lose nothing, survive saving, and stream whole characters."""

import random
import re

import numpy as np
import pytest

from miras_jax.errors import UserError
from miras_jax.training import bpe
from miras_jax.training import tokenizer as tokenizers
from miras_jax.training.tokenizer import BPE, Bytes, StreamDecoder

PROSE = (
    "It is a truth universally acknowledged, that a single man in possession of a "
    "good fortune, must be in want of a wife. However little known the feelings or "
    "views of such a man may be, this truth is so well fixed. Voil\u00e0, na\u00efve!\n"
) * 3


def random_text(seed: int, length: int = 400) -> str:
    """Characters of every UTF-8 length, controls included, surrogates left out."""
    draw = random.Random(seed)
    limits = [0x80, 0x800, 0xD800, 0x110000]
    points = [draw.randrange(draw.choice(limits)) for _ in range(length)]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


TEXTS = {
    "empty": "",
    "prose": PROSE,
    "spaces": "  two  spaces\n\n\tand tabs \r\n trailing  ",
    "emoji": "\U0001f600 family \U0001f468\u200d\U0001f469\u200d\U0001f467, "
    "flag \U0001f1eb\U0001f1f7",
    "cjk": "\u541b\u5b50\u52a1\u672c\uff0c\u672c\u7acb\u800c\u9053\u751f\u3002",
    "marker": "a<|endoftext|>b",
    "bytes": bytes(range(256)).decode("latin-1"),
    "random": random_text(0),
    "random too": random_text(1),
}


@pytest.fixture(scope="module", params=[Bytes(), BPE(vocab_size=320)], ids=repr)
def tokenizer(request):
    return request.param.train([PROSE])


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_decode_undoes_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert ids.shape == (len(ids),)
    assert tokenizer.end_of_text not in ids
    assert np.all((0 <= ids) & (ids < tokenizer.vocab_size))
    assert tokenizer.decode(ids) == text


def test_one_lost_token_is_noticed(tokenizer):
    assert tokenizer.decode(tokenizer.encode(PROSE)[1:]) != PROSE


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_save_and_load(tokenizer, text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert type(loaded) is type(tokenizer)
    assert loaded.vocab_size == tokenizer.vocab_size
    assert loaded.end_of_text == tokenizer.end_of_text
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


@pytest.mark.parametrize("group", [1, 7, 10**6])
def test_many_texts_have_the_ids_of_each(tokenizer, group, monkeypatch):
    monkeypatch.setattr(bpe, "_GROUP_CHARACTERS", group)
    monkeypatch.setattr(bpe, "_PIECE_CHARACTERS", 9)
    texts = [*TEXTS.values(), "", "", PROSE]
    found = list(tokenizer.encode_each(iter(texts)))
    assert len(found) == len(texts)
    for ids, text in zip(found, texts, strict=True):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert list(tokenizer.encode_each([])) == []


def test_no_more_texts_are_read_than_are_encoded_together(monkeypatch):
    monkeypatch.setattr(bpe, "_GROUP_CHARACTERS", 20)
    read = []
    texts = (read.append(i) or "four" for i in range(100))
    encoded = BPE(vocab_size=257).train([]).encode_each(texts)
    assert len(next(encoded)) == 4
    assert len(read) == 4


def test_byte_ids_are_utf8():
    byte = Bytes().train([])
    assert byte.encode("A\u00e9").tolist() == [0x41, 0xC3, 0xA9]
    assert (byte.vocab_size, byte.end_of_text) == (257, 256)


def test_bpe_learns_merges_from_its_text():
    trained = BPE(vocab_size=320).train([PROSE])
    assert trained.vocab_size == 320
    assert len(trained.encode(PROSE)) < len(PROSE.encode()) / 2
    tiny = BPE(vocab_size=320).train(["ab"])
    assert tiny.vocab_size < 320
    assert len(tiny.encode(PROSE)) == len(PROSE.encode())


def test_bpe_training_repeats_exactly(tmp_path):
    for name in ("first", "second"):
        trained = BPE(vocab_size=400).train([PROSE, TEXTS["random"]])
        (tmp_path / name).write_text(trained.to_json())
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


# A tokenizer trained on this has tokens of several spaces and of several newlines.
INDENTED = "Chapter  the first\n\n\n    It is a truth   universally\n\n" * 20


@pytest.mark.parametrize("text", [INDENTED, *TEXTS.values()], ids=["indented", *TEXTS])
def test_bpe_pieces_do_not_change_the_ids(text, monkeypatch):
    trained = BPE(vocab_size=320).train([PROSE, INDENTED])
    whole = trained.encode(text)
    monkeypatch.setattr(bpe, "_PIECE_CHARACTERS", 5)
    monkeypatch.setattr(bpe, "_GROUP_CHARACTERS", 12)
    np.testing.assert_array_equal(trained.encode(text), whole)


@pytest.mark.parametrize("wrong_cut", ["[a-z]", "[ \n]"])
def test_cutting_pieces_elsewhere_would_change_the_ids(wrong_cut, monkeypatch):
    trained = BPE(vocab_size=320).train([PROSE, INDENTED])
    whole = trained.encode(INDENTED)
    monkeypatch.setattr(bpe, "_PIECE_CHARACTERS", 5)
    monkeypatch.setattr(bpe, "_WORD_END", re.compile(wrong_cut))
    assert trained.encode(INDENTED).tolist() != whole.tolist()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_stream_emits_only_whole_characters(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    parts = [stream.feed(token) for token in tokenizer.encode(text)]
    assert "".join(parts) == text
    assert stream.finish() == ""


def test_stream_waits_for_the_last_byte():
    byte = Bytes().train([])
    stream = StreamDecoder(byte)
    parts = [stream.feed(token) for token in byte.encode("\U0001f600!")]
    assert parts == ["", "", "", "\U0001f600", "!"]


def test_unfinished_character_becomes_one_replacement():
    byte = Bytes().train([])
    stream = StreamDecoder(byte)
    assert [stream.feed(t) for t in byte.encode("\u5b50")[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("seed", range(5))
def test_stream_of_random_ids_equals_decode(tokenizer, seed):
    ids = np.random.default_rng(seed).integers(0, tokenizer.vocab_size, 500)
    stream = StreamDecoder(tokenizer)
    streamed = "".join([stream.feed(token) for token in ids]) + stream.finish()
    assert streamed == tokenizer.decode(ids)
    assert "\ufffd" in streamed


def test_end_of_text_is_silent(tokenizer):
    end = tokenizer.end_of_text
    assert tokenizer.decode([end, *tokenizer.encode("a"), end]) == "a"
    assert StreamDecoder(tokenizer).feed(end) == ""


@pytest.mark.parametrize("token", [-1, 100_000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, token):
    with pytest.raises(ValueError):
        tokenizer.decode([token])


def test_too_small_a_vocabulary_is_refused():
    BPE(vocab_size=257)
    with pytest.raises(UserError, match="at least 257"):
        BPE(vocab_size=256)


def test_load_refuses_what_is_not_a_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        tokenizers.load(path)
    broken = ["", "not json", "[]", '{"model": {"type": "WordLevel"}}', "\udcff"]
    for content in broken:
        path.write_text(content, errors="surrogateescape")
        with pytest.raises(UserError, match="is not a tokenizer") as caught:
            tokenizers.load(path)
        assert "\n" not in str(caught.value)


def test_load_refuses_a_bpe_without_end_of_text(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(BPE(vocab_size=257).train([]).to_json())
    path.write_text(path.read_text().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(UserError, match="endoftext"):
        tokenizers.load(path)
