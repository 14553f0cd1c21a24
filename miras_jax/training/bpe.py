"""Byte-level BPE, around a `tokenizers.Tokenizer` that was learned here or given.

Texts are cut into pieces and encoded many at a time, so that every core is busy and
memory stays flat, for one long text as for many short ones.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

END_OF_TEXT = "<|endoftext|>"
# What published tokenizers call it: GPT-2 and Qwen, Llama 3, RoBERTa, DeepSeek.
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<｜end▁of▁sentence｜>")
# Before a space that follows something visible, or after a single newline.
_WORD_END = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=[^\W_])")
_PIECE_CHARACTERS = 65_536
_GROUP_CHARACTERS = 64 * _PIECE_CHARACTERS
# Composed text with letters, digits, marks and whitespace on both sides of each other.
_PROBE = (
    "\n The \ufb01rst  of 1234 (or 56)? It's\t'na\u00efve' ... #7 _x_ A/B, \n\n"
    "\u541b\u5b50\u3002\n\u52a1 \u672c\uff0c \u3000\U0001f600 \u0661\u0662 so.\nIt 7\n8"
    " is\r\nof the\n of \nin - a\n\tb;\n/c _\nd \U0001f469\u200d\U0001f467\nand  "
)


class BPETokenizer:
    """The tokenizer of `BPE` and of `TokenizerFile`.

    Ids that have no token, and special tokens, stand for no bytes; of added tokens that
    are not special, such as GPT-NeoX's runs of spaces, text is made, as of any other.

    ValueError: the backend is no byte-level BPE, has no end of text, or loses text.
    """

    def __init__(self, backend):
        # Text that happens to spell a special token is still text.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        vocabulary = backend.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self._token_bytes = _bytes_of_ids(backend, vocabulary, self.vocab_size)
        ends = [vocabulary[name] for name in _ENDS if name in vocabulary]
        if not ends:
            raise ValueError(f"it has none of the tokens {', '.join(_ENDS)}")
        self.end_of_text = ends[0]
        self._token_bytes[self.end_of_text] = b""
        self._cut = _cuts_between_words(backend.pre_tokenizer)
        self._check()

    def _check(self) -> None:
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ValueError(
                "it does not give a text back as it was: its normalizer or "
                "pre-tokenizer changes it, or its vocabulary lacks bytes"
            )
        name = self._backend.id_to_token(self.end_of_text)
        if self.end_of_text in self.encode(name):
            raise ValueError(f"its {name} is no special token")

    def encode(self, text: str) -> np.ndarray:
        return next(self.encode_each([text]))

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        ids = []
        for group in _groups(texts, self._cut):
            pieces = [piece for piece, _ in group]
            encoded = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
            for (_, is_last), piece in zip(group, encoded, strict=True):
                ids.append(np.asarray(piece.ids, np.int32))
                if is_last:
                    yield np.concatenate(ids)
                    ids = []

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"id {token} is outside the vocabulary {self.vocab_size}")
        return self._token_bytes[token]

    def decode(self, tokens: Iterable[int]) -> str:
        parts = (self.token_bytes(int(token)) for token in tokens)
        return b"".join(parts).decode(errors="replace")

    def to_json(self) -> str:
        return self._backend.to_str(pretty=True)


def pieces(text: str, characters: int | None = None) -> Iterator[str]:
    """Cut `text`, after so many characters or more, where a new word starts.

    Words are what byte-level BPE merges inside of. Those of GPT-2, Llama 3, Qwen and
    DeepSeek never run from a visible character into a space (though some of them into
    newlines: "end.\\n\\n"), nor over a single newline into a letter or digit. So the
    ids are those of the uncut text.
    """
    start = 0
    while start < len(text):
        cut = _WORD_END.search(text, start + (characters or _PIECE_CHARACTERS))
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _groups(texts: Iterable[str], cut: bool) -> Iterator[list[tuple[str, bool]]]:
    """Pieces to be encoded together, each with whether it is the last of its text."""
    group, characters = [], 0
    for text in texts:
        parts = (list(pieces(text)) if cut else [text]) or [""]
        for number, part in enumerate(parts, 1):
            group.append((part, number == len(parts)))
            characters += len(part) + 1
            if characters >= _GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
    if group:
        yield group


def _cuts_between_words(pre_tokenizer) -> bool:
    """Whether `pieces` cuts only where this pre-tokenizer starts a new word."""
    if pre_tokenizer is None:
        return False

    def words(text: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    parts = [word for piece in pieces(_PROBE, 1) for word in words(piece)]
    return parts == words(_PROBE)


def _bytes_of_ids(backend, vocabulary: dict[str, int], size: int) -> list[bytes]:
    """What each id stands for: tokens are spelled in the alphabet, added ones as is."""
    byte_of, added = _byte_of_character(), backend.get_added_tokens_decoder()
    found = [b""] * size
    for token, number in vocabulary.items():
        if number in added:
            found[number] = b"" if added[number].special else token.encode()
            continue
        try:
            found[number] = bytes(map(byte_of.__getitem__, token))
        except KeyError as error:
            raise ValueError(f"its token {token!r} is not made of bytes") from error
    # Those that UTF-8 has a use for.
    needed = {*range(0xC0), *range(0xC2, 0xF5)}
    if missing := needed - {part[0] for part in found if len(part) == 1}:
        raise ValueError(f"it has no token for the byte {min(missing)}")
    return found


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: one printable character for each byte.

    Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
