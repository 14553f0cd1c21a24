"""What general compressors make of the same text: a reference for bits per byte.

A compressor that has seen the training text is a language model too: what the held-out
text adds to the compressed training text is what it needed to predict it.
"""

import gzip
import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from miras_jax.training.data import Prepared
from miras_jax.training.tokenizer import Tokenizer

MEMORY = 64 << 20
"""Bytes that xz -9 looks back, and gzip far less: older text is of no use to them."""

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda text: gzip.compress(text, 9, mtime=0),
    "xz -9e": lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME),
}


def bits_per_byte(train: bytes, heldout: bytes) -> dict[str, float]:
    """Bits per held-out byte by compressor, each having read `train` before.

    Of `train` the last `MEMORY` bytes count. Takes about a second per megabyte.
    """
    train = train[-MEMORY:]
    texts = (train, train + heldout)
    # The compressors let go of the interpreter: threads are enough.
    with ThreadPoolExecutor() as threads:
        sizes = {
            name: threads.map(lambda text, run=run: len(run(text)), texts)
            for name, run in COMPRESSORS.items()
        }
        return {
            name: 8 * (both - before) / len(heldout)
            for name, (before, both) in sizes.items()
        }


def reference(prepared: Prepared) -> dict[str, float]:
    """`bits_per_byte` of a prepared corpus, from its tokens: no source text is read."""
    tokenizer = prepared.tokenizer
    # A large corpus is not decoded for the sake of its end.
    recent = -(-MEMORY * len(prepared.train) // prepared.train_bytes)
    train = source(tokenizer, prepared.train[-recent:])
    return bits_per_byte(train, source(tokenizer, prepared.heldout))


def source(tokenizer: Tokenizer, tokens: np.ndarray) -> bytes:
    """The UTF-8 bytes of token ids; documents follow each other without a mark."""
    return b"".join(map(tokenizer.token_bytes, tokens.tolist()))
