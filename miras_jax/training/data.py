"""Text files to batches of token windows.

`prepare` tokenises once into memory-mapped files; `train_batches` and
`heldout_batches` cut them into windows of `context_length + 1` tokens, the last token
of a window being the first of the next, so that each is predicted exactly once.
Windows of packed documents also hold segment ids (see `packing`).
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from miras_jax.errors import UserError
from miras_jax.training import tokenizer as tokenizers
from miras_jax.training.packing import PackedWindows
from miras_jax.training.tokenizer import BPE, Bytes, Tokenizer
from miras_jax.training.windows import Walks, Windows, heldout_plan

if TYPE_CHECKING:
    import grain

# Part of every fingerprint: raise it when the same files would give other tokens.
_FORMAT = 1
_OUTPUTS = ("train.npy", "heldout.npy", "tokenizer.json")


@dataclass(frozen=True)
class TextFiles:
    """UTF-8 text, one document per file.

    `train` and `heldout` are paths or globs (`**` included), relative to the working
    directory. Each document follows an end-of-text token, so that its first token is
    predicted too.

    documents: "joined" reads a window as one text, whatever documents it is made of;
    "packed" reads each document as if it were alone, from a place on that suits the
    model's chunks.
    """

    train: tuple[str, ...]
    heldout: tuple[str, ...]
    context_length: int
    tokenizer: Bytes | BPE
    documents: Literal["joined", "packed"] = "joined"

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


@dataclass(frozen=True, eq=False)
class Prepared:
    """A tokenised corpus: `train` and `heldout` are 1-D memory maps of token ids.

    Bytes and words (separated by whitespace) are those of the source text. Equal
    fingerprints mean equal text, tokenizer and windows.
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

    def windows(self, split: Literal["train", "heldout"], alignment: int = 1):
        """Random access to the windows of a split; documents at multiples of it."""
        tokens = getattr(self, split)
        if self.documents == "joined":
            return Windows(tokens, self.context_length)
        return PackedWindows(
            tokens, self.context_length, alignment, self.tokenizer.end_of_text
        )


def prepare(config: TextFiles, directory: str | Path) -> Prepared:
    """Tokenise into `directory`, or reuse what an equal preparation left there.

    What is there counts only if the hashes of all sources and of all outputs match its
    `prepared.json`, so an interrupted or damaged preparation is done again. Processes
    of one machine that prepare the same directory wait for the first of them. The
    tokenizer is trained on the train files alone.

    UserError: files that are missing, empty, not UTF-8 or in both splits, a training
    text shorter than one window, a directory that cannot be written.
    """
    sources = {split: _find(config, split) for split in ("train", "heldout")}
    hashes = {split: [_sha256(p) for p in paths] for split, paths in sources.items()}
    for path, digest in zip(sources["heldout"], hashes["heldout"], strict=True):
        if digest in hashes["train"]:
            raise UserError(
                f"{path} is held out but its text is also trained on; "
                "remove it from TextFiles.train"
            )
    choice = {"kind": type(config.tokenizer).__name__, **asdict(config.tokenizer)}
    identity = [_FORMAT, hashes, config.context_length, choice]
    if config.documents != "joined":
        identity.append(config.documents)
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    directory = Path(directory)
    record = _matching_record(directory, fingerprint)
    if record is None:
        with _locked(directory):
            # Another process may have done the work while this one waited.
            record = _matching_record(directory, fingerprint)
            if record is None:
                record = {
                    "fingerprint": fingerprint,
                    "config": {**asdict(config), "tokenizer": choice},
                    "sources": {
                        split: dict(zip(map(str, paths), hashes[split], strict=True))
                        for split, paths in sources.items()
                    },
                }
                _tokenise(config, sources, record, directory)
    return _open(directory, record)


def load(directory: str | Path) -> Prepared:
    """What `prepare` left in `directory`, without the texts that it came from.

    UserError if it is missing or damaged.
    """
    directory = Path(directory)
    record = _whole_record(directory)
    if record is None:
        raise UserError(
            f"{directory} holds no whole prepared text; miras train prepares it again"
        )
    return _open(directory, record)


def _open(directory: Path, record: dict) -> Prepared:
    return Prepared(
        tokenizer=tokenizers.load(directory / "tokenizer.json"),
        context_length=record["config"]["context_length"],
        train=np.load(directory / "train.npy", mmap_mode="r"),
        heldout=np.load(directory / "heldout.npy", mmap_mode="r"),
        train_bytes=record["train"]["bytes"],
        heldout_bytes=record["heldout"]["bytes"],
        heldout_words=record["heldout"]["words"],
        fingerprint=record["fingerprint"],
        documents=record["config"].get("documents", "joined"),
    )


def train_batches(
    prepared: Prepared,
    *,
    batch_size: int,
    seed: int,
    alignment: int = 1,
    shard_index: int = 0,
    shard_count: int = 1,
    walking: Sequence[int] | None = None,
) -> "grain.experimental.ElasticIterator":
    """Iterate without end over shuffled windows, in a new order each epoch.

    walking: the rows of the global batch that this shard reads, if windows are to be
    consecutive along each row (see `Walks`); those come with segment ids always, and
    `seed` has no part in their order.

    `batch_size` is the global batch; each step yields int32
    `[batch_size / shard_count, context_length + 1]`, rows `shard_index::shard_count` of
    that batch; of packed documents `[..., 2, context_length + 1]`, tokens and segment
    ids, with documents at multiples of `alignment`. `get_state()` is a small JSON dict,
    the same on every shard, from which `set_state` continues exactly under any
    `shard_count`. A last stretch of text shorter than a window is not trained on,
    unless documents are packed.

    UserError: `batch_size` does not fit the shards or exceeds the number of windows.
    """
    import grain  # Slow to import, and only training needs it.

    _rows_per_shard(batch_size, shard_index, shard_count)
    windows = prepared.windows("train", alignment)
    if batch_size > len(windows):
        raise UserError(
            f"batch_size={batch_size} but the training text has only {len(windows)} "
            f"windows of {prepared.context_length} tokens; lower batch_size or "
            "context_length, or add text"
        )
    if walking is None:
        order = grain.MapDataset.source(windows).seed(seed).shuffle()
    else:
        order = grain.MapDataset.source(Walks(windows, batch_size, walking))
    return grain.experimental.ElasticIterator(
        order.repeat(),
        batch_size,
        grain.sharding.ShardOptions(shard_index, shard_count),
        # The buffer counts whole batches; grain's default of 500 can exhaust memory.
        read_options=grain.ReadOptions(num_threads=2, prefetch_buffer_size=8),
    )


def heldout_batches(
    prepared: Prepared,
    batch_size: int,
    *,
    alignment: int = 1,
    shard_index: int = 0,
    shard_count: int = 1,
    limit: int | None = None,
    consecutive: bool = False,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Iterate once over the held-out windows.

    Yields tokens int32 `[rows, context_length + 1]` (of packed documents and of
    consecutive windows with segment ids, as in training) and the weights of the
    predicted tokens, float32 `[rows, context_length]`, with `rows = batch_size /
    shard_count`. All shapes are equal and all shards yield equally often: what a row is
    missing has weight 0. `limit` reads at most that many windows, spread evenly.

    consecutive: each row reads its share of the windows in order, where otherwise the
    rows of one batch after another do.

    UserError: `batch_size` does not fit the shards, or `limit` is below 1.
    """
    rows = _rows_per_shard(batch_size, shard_index, shard_count)
    length = prepared.context_length
    windows = prepared.windows("heldout", alignment)
    packed = prepared.documents == "packed"
    count = len(windows) if packed else -(-(len(prepared.heldout) - 1) // length)
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit} leaves no held-out window; use at least 1")
    kept = count if limit is None else min(limit, count)
    plan = heldout_plan(count, kept, batch_size, consecutive=consecutive)

    def batches():
        for step in plan:
            tokens = np.zeros((rows, 2, length + 1), np.int32)
            weights = np.zeros((rows, length), np.float32)
            for row, window in enumerate(step[shard_index::shard_count]):
                if window < 0:
                    continue
                if packed:
                    tokens[row] = windows[window]
                    weights[row] = windows.weights(tokens[row])
                    continue
                start = window * length
                ids = prepared.heldout[start : start + length + 1]
                tokens[row, 0, : len(ids)] = ids
                tokens[row, 1, : len(ids)] = 1
                weights[row, : len(ids) - 1] = 1
            yield tokens if packed or consecutive else tokens[:, 0], weights

    return batches()


def _rows_per_shard(batch_size: int, shard_index: int, shard_count: int) -> int:
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index {shard_index} is not in range({shard_count})")
    if batch_size < 1 or batch_size % shard_count:
        raise UserError(
            f"batch_size={batch_size} cannot be split evenly over {shard_count} "
            f"shards; use a positive multiple of {shard_count}"
        )
    return batch_size // shard_count


def _find(config: TextFiles, split: str) -> list[Path]:
    """The files of one split: patterns in the order given, sorted within a glob."""
    patterns = getattr(config, split)
    paths = []
    for pattern in patterns:
        exact = [pattern] if Path(pattern).is_file() else []
        matches = exact or sorted(glob.glob(pattern, recursive=True))
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise UserError(
                f"no file matches {pattern!r} (TextFiles.{split}) in {Path.cwd()}; "
                "correct the path or start from the directory it is relative to"
            )
        paths += found
    paths = list(dict.fromkeys(paths))
    if not any(path.stat().st_size for path in paths):
        raise UserError(
            f"TextFiles.{split} holds no text ({len(paths)} files, all empty); "
            "name at least one file that is not empty"
        )
    return paths


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for example "
            "with iconv -f latin1 -t utf-8"
        ) from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, which the system frees if its holder is killed."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = open(directory / ".lock", "w")
    except OSError as error:
        raise UserError(
            f"cannot write prepared data to {directory}: {error.strerror}; "
            "choose a directory that can be written"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _tokenise(
    config: TextFiles, sources: dict[str, list[Path]], record: dict, directory: Path
) -> None:
    """Write every output beside its place, then move all in; complete `record`."""
    staging = directory / ".preparing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    tokenizer = config.tokenizer.train(_read(path) for path in sources["train"])
    (staging / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for split, paths in sources.items():
        documents, words = [], 0
        for path in paths:
            text = _read(path)
            words += len(text.split())
            ids = np.append(np.int32(tokenizer.end_of_text), tokenizer.encode(text))
            documents.append(ids.astype(dtype))
        tokens = np.concatenate(documents)
        if split == "train" and len(tokens) <= config.context_length:
            raise UserError(
                f"the training text has {len(tokens)} tokens, one window needs "
                f"{config.context_length + 1}; lower context_length or add text"
            )
        np.save(staging / f"{split}.npy", tokens)
        record[split] = {
            "bytes": sum(path.stat().st_size for path in paths),
            "words": words,
            "tokens": len(tokens),
        }
    record["outputs"] = {name: _sha256(staging / name) for name in _OUTPUTS}
    record["seal"] = _seal(record)
    (staging / "prepared.json").write_text(json.dumps(record, indent=2) + "\n")
    for name in (*_OUTPUTS, "prepared.json"):
        os.replace(staging / name, directory / name)
    staging.rmdir()


def _matching_record(directory: Path, fingerprint: str) -> dict | None:
    """Return `prepared.json` if all there is whole and what `fingerprint` names."""
    record = _whole_record(directory)
    return record if record and record["fingerprint"] == fingerprint else None


def _whole_record(directory: Path) -> dict | None:
    """Return `prepared.json` if its seal and the hashes of all outputs are right."""
    try:
        record = json.loads((directory / "prepared.json").read_text())
        whole = record["seal"] == _seal(record) and all(
            record["outputs"][name] == _sha256(directory / name) for name in _OUTPUTS
        )
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _seal(record: dict) -> str:
    """The hash of all of `record` but its seal."""
    body = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
