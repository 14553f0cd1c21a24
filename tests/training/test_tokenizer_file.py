"""Given tokenizers load as their makers wrote them, and none changes a text silently.

The files here have the pre-tokenizers, normalizers and added tokens of published ones,
and merges that were learned from one novel.
"""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from miras_jax.errors import UserError
from miras_jax.training import bpe
from miras_jax.training import tokenizer as tokenizers
from miras_jax.training.tokenizer import BPE, TokenizerFile

AUSTEN = Path(__file__).parents[2] / "experiments" / "data" / "austen"
NOVEL = (AUSTEN / "persuasion.txt").read_text()[:60_000]
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
REGEXES = {
    "llama3": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINES,
    "qwen": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|" + LINES,
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + r"?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + LINES,
    "deepseek": r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + LINES,
}


def split_by(*regexes):
    parts = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*parts, level])


def make(pre_tokenizer, special=("<|endoftext|>",), added=(), normalizer=None):
    """A file's content; ids as published: merges first, then what was added."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(NOVEL.splitlines(keepends=True), trainer)
    backend.add_special_tokens(list(special))
    backend.add_tokens([AddedToken(token, normalized=False) for token in added])
    return backend


def gpt2():
    return make(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3():
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    backend = make(split_by(REGEXES["llama3"]), special)
    begin = ("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[begin]
    )
    return backend


def qwen():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    nfc = normalizers.NFC()
    return make(split_by(REGEXES["qwen"]), special, ("<think>",), nfc)


def deepseek():
    special = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    splits = split_by(
        r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u30ff]+", REGEXES["deepseek"]
    )
    nothing = normalizers.Sequence([])
    return make(splits, special, ("<｜User｜>",), nothing)


def neox():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return make(level, added=("  ", "    ", "        "), normalizer=normalizers.NFC())


def o200k():
    return make(split_by(REGEXES["o200k"]), ("</s>",))


KINDS = (gpt2, llama3, qwen, deepseek, neox, o200k)
ENDS = {llama3: "<|end_of_text|>", deepseek: "<｜end▁of▁sentence｜>", o200k: "</s>"}


@pytest.fixture(scope="module", params=KINDS, ids=lambda make: make.__name__)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def path(kind, tmp_path_factory):
    path = tmp_path_factory.mktemp(kind.__name__) / "tokenizer.json"
    kind().save(str(path))
    return path


def mixture(seed: int) -> str:
    """Words, marks, digits and whitespace in every order, punctuation before lines."""
    parts = (
        "the said 1234 7 ... ? .) 's \u541b\u5b50 \u3002 \u00e9t\u00e9 _ / \U0001f600 "
        "x\u0301 \u0663 <think> <|eot_id|> \u2029 \u3000 \x1c"
    ).split(" ")
    gaps = [" ", " ", " ", "", "\n", "\n\n", "  ", "\t", "\r\n", " \n", "\n ", "    "]
    draw = random.Random(seed)
    return "".join(draw.choice(parts) + draw.choice(gaps) for _ in range(3000))


def test_a_given_file_is_read_as_its_maker_wrote_it(kind, path):
    loaded, backend = tokenizers.load(path), Tokenizer.from_file(str(path))
    assert loaded.vocab_size == backend.get_vocab_size(with_added_tokens=True)
    assert TokenizerFile(str(path)).vocab_size == loaded.vocab_size
    assert loaded.end_of_text == backend.token_to_id(ENDS.get(kind, "<|endoftext|>"))
    expected = backend.encode(NOVEL[:5000], add_special_tokens=False).ids
    assert loaded.encode(NOVEL[:5000]).tolist() == expected
    assert loaded.decode(expected) == NOVEL[:5000]


def test_text_that_spells_a_token_comes_back(path):
    loaded = tokenizers.load(path)
    names = [token.content for token in added(path).values()]
    for name in names:
        ids = loaded.encode(f"a{name} b")
        assert loaded.decode(ids) == f"a{name} b"
        assert loaded.end_of_text not in ids
    silent = [n for n, token in added(path).items() if token.special]
    assert loaded.decode(silent) == ""


def added(path):
    return Tokenizer.from_file(str(path)).get_added_tokens_decoder()


@pytest.mark.parametrize("text", [NOVEL, mixture(0), mixture(1)], ids=["novel", 0, 1])
def test_pieces_do_not_change_the_ids(path, text, monkeypatch):
    loaded = tokenizers.load(path)
    whole = loaded.encode(text)
    counts, real = [], bpe.pieces

    def counted(text):
        found = list(real(text, 3))
        counts.append(len(found))
        return found

    monkeypatch.setattr(bpe, "pieces", counted)
    np.testing.assert_array_equal(loaded.encode(text), whole)
    assert counts[0] > len(text) / 40


def test_words_that_run_over_spaces_are_never_cut(tmp_path, monkeypatch):
    backend = make(split_by(r"[^\n]+|\n"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    tokens = b"\n".join(loaded.token_bytes(i) for i in range(1000))
    assert re.search(rb"\S \S", tokens)
    monkeypatch.setattr(bpe, "_PIECE_CHARACTERS", 3)
    expected = backend.encode(NOVEL[:5000], add_special_tokens=False).ids
    assert loaded.encode(NOVEL[:5000]).tolist() == expected


def test_truncation_and_padding_of_a_file_are_left_out(tmp_path):
    backend = gpt2()
    expected = backend.encode(NOVEL[:5000]).ids
    backend.enable_truncation(16)
    backend.enable_padding(length=4096)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert loaded.encode(NOVEL[:5000]).tolist() == expected


def test_ids_may_have_gaps(tmp_path):
    content = json.loads(gpt2().to_str())
    token = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"][token] = 1007
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == 1008
    assert loaded.decode([1007, 1006]) == token.replace("\u0120", " ")


def without_a_byte():
    content = json.loads(
        make(pre_tokenizers.ByteLevel(add_prefix_space=False)).to_str()
    )
    name = next(c for c, byte in bpe._byte_of_character().items() if byte == 0x9F)
    # Another token takes its id, so that the ids have no gap.
    content["model"]["vocab"]["zqzqzq"] = content["model"]["vocab"].pop(name)
    return Tokenizer.from_str(json.dumps(content))


def silent_end():
    return make(
        pre_tokenizers.ByteLevel(add_prefix_space=False), (), ("<|endoftext|>",)
    )


level = pre_tokenizers.ByteLevel
REFUSED = {
    "none of the tokens .*</s>": lambda: make(level(False), ("<|other|>",)),
    "does not give a text back": lambda: make(level(add_prefix_space=True)),
    "a text back as it was": lambda: make(level(False), normalizer=normalizers.NFKC()),
    "normalizer or": lambda: make(level(False), normalizer=normalizers.Lowercase()),
    "is not made of bytes": lambda: make(pre_tokenizers.Metaspace()),
    "no token for the byte 159": without_a_byte,
    r"its <\|endoftext\|> is no special token": silent_end,
}


@pytest.mark.parametrize("match", REFUSED)
def test_what_would_change_texts_is_refused(match, tmp_path):
    path = tmp_path / "tokenizer.json"
    REFUSED[match]().save(str(path))
    with pytest.raises(UserError, match=match) as caught:
        TokenizerFile(str(path)).train([])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer .*none.json"):
        TokenizerFile(str(tmp_path / "none.json")).identity()


def test_what_a_run_wrote_can_be_given(tmp_path):
    learned = BPE(vocab_size=400).train([NOVEL])
    (tmp_path / "tokenizer.json").write_text(learned.to_json())
    given = TokenizerFile(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(given.train([]).encode(NOVEL), learned.encode(NOVEL))
    assert given.train([]).to_json() == learned.to_json()


def test_the_content_is_the_identity(tmp_path):
    for name, size in (("a", 400), ("b", 400), ("c", 401)):
        (tmp_path / name).write_text(BPE(vocab_size=size).train([NOVEL]).to_json())
    a, b, c = (TokenizerFile(str(tmp_path / name)).identity() for name in "abc")
    assert a == b != c
