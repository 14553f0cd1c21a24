"""What a corpus is: the files it is made of, and what they were prepared into.

`prepare.prepare` tokenises once into memory-mapped files, which are read in windows of
`context_length + 1` tokens, the last token of a window being the first of the next, so
that each is predicted exactly once. Windows of packed documents also hold segment ids
(see `packing`). `batches` are made of them.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from miras_jax.errors import UserError
from miras_jax.training.packing import PackedWindows
from miras_jax.training.tokenizer import BPE, Bytes, Tokenizer, TokenizerFile
from miras_jax.training.windows import Windows


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 text, one document per file, line of a `.jsonl` or row of a `.parquet`.

    `train` and `heldout` are paths or globs (`**` included), relative to the working
    directory; text and JSON lines may end in `.gz`. Each document follows an
    end-of-text token, so that its first token is predicted too.

    field: of a JSON line, or the column of a Parquet file, that holds the text.
    shares: of the shuffled training windows that the files of each pattern in `train`
    give, repeated as often as that needs; () takes every window as often as any other.

    documents: "joined" reads a window as one text, whatever documents it is made of;
    "packed" reads each document as if it were alone, from a place on that suits the
    model's chunks.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    context_length: int
    tokenizer: Bytes | BPE | TokenizerFile
    documents: Literal["joined", "packed"] = "joined"
    field: str = "text"
    shares: tuple[float, ...] = ()

    def __post_init__(self):
        if self.documents not in ("joined", "packed"):
            raise UserError(
                f"TextFiles.documents is 'joined' or 'packed'; got {self.documents!r}"
            )
        for split in ("train", "heldout"):
            if isinstance(getattr(self, split), str):
                raise UserError(
                    f"TextFiles.{split} is one string; write a tuple of paths: "
                    f'{split}=("{getattr(self, split)}",)'
                )
        if self.context_length < 1:
            raise UserError(
                f"TextFiles.context_length is {self.context_length}; use at least 1"
            )
        self._check_shares()

    def _check_shares(self):
        if not self.shares:
            return
        if len(self.shares) != len(self.train):
            raise UserError(
                f"TextFiles.shares has {len(self.shares)} numbers for "
                f"{len(self.train)} patterns in train; give one for each"
            )
        if min(self.shares) <= 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise UserError(
                f"TextFiles.shares is {self.shares}; give positive numbers whose sum "
                "is 1, and leave out patterns that are to have none"
            )


class Part(NamedTuple):
    """Tokens of one train pattern, and its share of the training windows."""

    begin: int
    end: int
    share: float


@dataclass(frozen=True, eq=False)
class Prepared:
    """A tokenised corpus: `train` and `heldout` are 1-D memory maps of token ids.

    Bytes and words (separated by whitespace) are those of the documents' text. Equal
    fingerprints mean equal text, tokenizer and windows. Starts are where documents
    begin, `[documents]`; None where tokens tell. Parts are those of a mixture.
    """

    tokenizer: Tokenizer
    context_length: int
    train: np.ndarray
    heldout: np.ndarray
    train_bytes: int
    heldout_bytes: int
    heldout_words: int
    fingerprint: str
    documents: Literal["joined", "packed"] = "joined"
    train_starts: np.ndarray | None = None
    heldout_starts: np.ndarray | None = None
    parts: tuple[Part, ...] = ()

    def windows(
        self,
        split: Literal["train", "heldout"],
        alignment: int = 1,
        part: Part | None = None,
    ):
        """Random access to the windows of a split; documents at multiples of it.

        part: of the training text, to read nothing else.
        """
        tokens, starts = getattr(self, split), getattr(self, f"{split}_starts")
        if part is not None:
            first, last = np.searchsorted(starts, [part.begin, part.end])
            tokens = tokens[part.begin : part.end]
            starts = starts[first:last] - part.begin
        if self.documents == "joined":
            return Windows(tokens, self.context_length)
        end = self.tokenizer.end_of_text
        return PackedWindows(tokens, self.context_length, alignment, end, starts)
