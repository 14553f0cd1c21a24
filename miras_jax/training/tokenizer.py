"""Text to token ids and back: raw bytes, or byte-level BPE.

`Bytes` and `BPE` are the choice, made in an experiment file; `train` turns the choice
into a `Tokenizer`. Both kinds are lossless: `decode(encode(text)) == text`.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from miras_jax.errors import UserError

_END_OF_TEXT = "<|endoftext|>"
_WORD_END = re.compile(r"(?<=\S)[ \n]")
# A group of pieces keeps every core busy and is small enough to keep memory flat.
_PIECE_CHARACTERS = 65_536
_GROUP_PIECES = 64


class Tokenizer(Protocol):
    """What training, evaluation and generation need of a tokenizer."""

    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 ids `[length]` of `text`; never the end-of-text id."""
        ...

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one id, which may end inside a character."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text: nothing for end of text, U+FFFD for broken UTF-8."""
        ...

    def to_json(self) -> str:
        """Return the tokenizer as JSON, for `from_json` and, in a file, `load`."""
        ...


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes as ids 0 to 255, end of text as 256: nothing to train."""

    vocab_size = 257

    def train(self, texts: Iterable[str]) -> "ByteTokenizer":
        """Return the tokenizer; `texts` is not read."""
        return ByteTokenizer()


@dataclass(frozen=True)
class BPE:
    """Byte-level byte-pair encoding, learned from the training text.

    `vocab_size` counts the 256 bytes and end of text too. A text too small for that
    many merges gives a smaller vocabulary: read `vocab_size` off the tokenizer.
    """

    vocab_size: int = 4096

    def __post_init__(self):
        if self.vocab_size < 257:
            raise UserError(
                f"BPE(vocab_size={self.vocab_size}) has no room for the 256 bytes and "
                "end of text; use at least 257, or Bytes()"
            )

    def train(self, texts: Iterable[str]) -> "BPETokenizer":
        """Learn the merges from `texts`; the same texts give the same tokenizer."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[_END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in _pieces(text))
        backend.train_from_iterator(pieces, trainer)
        return BPETokenizer(backend)


class ByteTokenizer:
    """The tokenizer of `Bytes`."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == self.end_of_text else bytes([token])

    def decode(self, tokens: Iterable[int]) -> str:
        return _decode(self, tokens)

    def to_json(self) -> str:
        return '{"model": {"type": "Bytes"}}\n'


class BPETokenizer:
    """The tokenizer of `BPE`, around a byte-level `tokenizers.Tokenizer`."""

    def __init__(self, backend):
        # Text that happens to spell the end-of-text marker is still text.
        backend.encode_special_tokens = True
        byte_of = _byte_of_character()
        tokens = (backend.id_to_token(i) for i in range(backend.get_vocab_size()))
        self._backend = backend
        self._token_bytes = [bytes(map(byte_of.__getitem__, token)) for token in tokens]
        self.vocab_size = len(self._token_bytes)
        self.end_of_text = backend.token_to_id(_END_OF_TEXT)
        self._token_bytes[self.end_of_text] = b""

    def encode(self, text: str) -> np.ndarray:
        pieces = list(_pieces(text))
        ids = [np.zeros(0, np.int32)]
        for start in range(0, len(pieces), _GROUP_PIECES):
            group = pieces[start : start + _GROUP_PIECES]
            encoded = self._backend.encode_batch_fast(group)
            ids += [np.asarray(piece.ids, np.int32) for piece in encoded]
        return np.concatenate(ids)

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"id {token} is outside the vocabulary {self.vocab_size}")
        return self._token_bytes[token]

    def decode(self, tokens: Iterable[int]) -> str:
        return _decode(self, tokens)

    def to_json(self) -> str:
        return self._backend.to_str(pretty=True)


class StreamDecoder:
    """Turns ids into text one at a time, holding back unfinished characters.

    The pieces from `feed` and the one from `finish`, joined, are what `decode` returns.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """Return the characters that `token` completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.token_bytes(int(token)))

    def finish(self) -> str:
        """Return U+FFFD if the stream stopped inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def load(path: str | Path) -> Tokenizer:
    """Read a file of `to_json`, or any byte-level BPE `tokenizer.json` such as GPT-2's.

    UserError: the file cannot be read, or is not such a tokenizer.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer {path}: {error.strerror}; "
            "give the path of a saved tokenizer"
        ) from error
    except UnicodeDecodeError as error:
        raise _no_tokenizer(path, error) from error
    return from_json(text, path)


def from_json(text: str, source: str | Path) -> Tokenizer:
    """The tokenizer of `to_json`; `source`, for messages, is where the text is from.

    UserError: the text is not such a tokenizer.
    """
    try:
        kind = json.loads(text)["model"]["type"]
        if kind == "Bytes":
            return ByteTokenizer()
        from tokenizers import Tokenizer

        return BPETokenizer(Tokenizer.from_str(text))
    except Exception as error:  # `tokenizers` raises bare Exception for bad files.
        raise _no_tokenizer(source, error) from error


def _no_tokenizer(source: str | Path, error: Exception) -> UserError:
    return UserError(
        f"{source} is not a tokenizer saved by miras_jax or a byte-level BPE with "
        f"{_END_OF_TEXT} ({error!r}); prepare the data again"
    )


def _decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    parts = (tokenizer.token_bytes(int(token)) for token in tokens)
    return b"".join(parts).decode(errors="replace")


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` only where byte-level BPE always starts a new word.

    No word runs from a visible character into whitespace, so the ids are those of the
    uncut text, while pieces are encoded in parallel and in bounded memory.
    """
    start = 0
    while start < len(text):
        cut = _WORD_END.search(text, start + _PIECE_CHARACTERS)
        end = cut.start() if cut else len(text)
        yield text[start:end]
        start = end


def _byte_of_character() -> dict[str, int]:
    """The alphabet of byte-level BPE: one printable character for each byte.

    Printable Latin-1 bytes stand for themselves, the other 68 for U+0100 onwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}
