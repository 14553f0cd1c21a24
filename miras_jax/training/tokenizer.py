"""Text to token ids and back: raw bytes, or byte-level BPE.

`Bytes`, `BPE` and `TokenizerFile` are the choice, made in an experiment file; `train`
turns the choice into a `Tokenizer`. All are lossless: `decode(encode(text)) == text`,
but for a file that composes characters first (Unicode's NFC, as Qwen's does).
"""

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from miras_jax.errors import UserError
from miras_jax.training import bpe
from miras_jax.training.bpe import BPETokenizer


class Tokenizer(Protocol):
    """What training, evaluation and generation need of a tokenizer."""

    vocab_size: int
    end_of_text: int

    def encode(self, text: str) -> np.ndarray:
        """Return the int32 ids `[length]` of `text`; never the end-of-text id."""
        ...

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of each text in order: many short texts at a time."""
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

    def identity(self) -> dict:
        """JSON of what decides the ids of a text, beside the text to learn from."""
        return {"kind": "Bytes"}


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

    def train(self, texts: Iterable[str]) -> BPETokenizer:
        """Learn the merges from `texts`; the same texts give the same tokenizer."""
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[bpe.END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        pieces = (piece for text in texts for piece in bpe.pieces(text))
        backend.train_from_iterator(pieces, trainer)
        return BPETokenizer(backend)

    def identity(self) -> dict:
        """JSON of what decides the ids of a text, beside the text to learn from."""
        return {"kind": "BPE", "vocab_size": self.vocab_size}


@dataclass(frozen=True)
class TokenizerFile:
    """A given byte-level BPE: a `tokenizer.json`, of a published model or of a run.

    Its end of text is the first that it has of `<|endoftext|>`, `<|end_of_text|>`,
    `</s>` and DeepSeek's. Text that spells a special token is read as text.

    UserError, when it is first used: the file is missing or is no such tokenizer.
    """

    path: str

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return load(self.path).vocab_size

    def train(self, texts: Iterable[str]) -> Tokenizer:
        """Return the tokenizer; `texts` is not read."""
        return load(self.path)

    def identity(self) -> dict:
        """JSON of what decides the ids of a text: the content, not the place."""
        digest = hashlib.sha256(_read(self.path).encode()).hexdigest()
        return {"kind": "TokenizerFile", "sha256": digest}


class ByteTokenizer:
    """The tokenizer of `Bytes`."""

    vocab_size = 257
    end_of_text = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        return map(self.encode, texts)

    def token_bytes(self, token: int) -> bytes:
        return b"" if token == self.end_of_text else bytes([token])

    def decode(self, tokens: Iterable[int]) -> str:
        parts = (self.token_bytes(int(token)) for token in tokens)
        return b"".join(parts).decode(errors="replace")

    def to_json(self) -> str:
        return '{"model": {"type": "Bytes"}}\n'


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
    return from_json(_read(path), path)


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


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read the tokenizer {path}: {error.strerror}; "
            "give the path of a saved tokenizer"
        ) from error
    except UnicodeDecodeError as error:
        raise _no_tokenizer(path, error) from error


def _no_tokenizer(source: str | Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(
        f"{source} is not a tokenizer saved by miras_jax or another lossless "
        f"byte-level BPE ({type(error).__name__}: {reason}); give the tokenizer.json "
        "of such a tokenizer, or, of a run's own, prepare the data again"
    )
