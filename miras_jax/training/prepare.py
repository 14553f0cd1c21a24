"""Texts to memory-mapped tokens, once, in memory that does not grow with the texts.

train.npy, heldout.npy                  token ids, `[tokens]`
train.starts.npy, heldout.starts.npy    where documents begin, `[documents]`
tokenizer.json
prepared.json                           what they were made of, and their hashes
stats.json                              sizes and times of files that were hashed
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np

from miras_jax.errors import UserError
from miras_jax.training import tokenizer as tokenizers
from miras_jax.training.data import Part, Prepared, TextFiles
from miras_jax.training.documents import documents, kind
from miras_jax.training.hashes import Hashes, seal
from miras_jax.training.npy import NpyWriter
from miras_jax.training.sources import find, no_text
from miras_jax.training.tokenizer import Tokenizer

# Part of every fingerprint: raise it when the same files would give other tokens.
_FORMAT = 1
_SPLITS = ("train", "heldout")
_NEEDED = ("train.npy", "heldout.npy", "tokenizer.json")
# Folders that were prepared before these were written have none.
_STARTS = ("train.starts.npy", "heldout.starts.npy")


def prepare(config: TextFiles, directory: str | Path) -> Prepared:
    """Tokenise into `directory`, or reuse what an equal preparation left there.

    What is there counts only if the hashes of all sources and of all outputs match its
    `prepared.json`, so an interrupted or damaged preparation is done again. Files whose
    size and time are as they were when hashed are not hashed again. Processes of one
    machine that prepare the same directory wait for the first of them. A tokenizer is
    trained on the train files alone.

    UserError: files that are missing, empty, broken, not UTF-8 or in both splits, a
    training text shorter than one window, a directory that cannot be written.
    """
    directory = Path(directory)
    hashes = Hashes(directory / "stats.json")
    groups = {split: find(config, split) for split in _SPLITS}
    sources = {split: list(chain.from_iterable(groups[split])) for split in _SPLITS}
    digests = {
        split: [hashes.of(path) + kind(path) for path in paths]
        for split, paths in sources.items()
    }
    for path, digest in zip(sources["heldout"], digests["heldout"], strict=True):
        if digest in digests["train"]:
            raise UserError(
                f"{path} is held out but its text is also trained on; "
                "remove it from TextFiles.train"
            )
    choice = config.tokenizer.identity()
    fingerprint = _fingerprint(config, digests, choice)

    def usable() -> dict | None:
        record = _whole_record(directory, hashes)
        matches = record and record["fingerprint"] == fingerprint
        # Of an older one it is not known which file a document is from.
        is_told = not config.shares or (record and "documents" in record["train"])
        return record if matches and is_told else None

    record = usable()
    if record is None:
        with _locked(directory):
            # Another process may have done the work while this one waited.
            record = usable()
            if record is None:
                record = {
                    "fingerprint": fingerprint,
                    "config": {**asdict(config), "tokenizer": choice},
                    "sources": {
                        split: dict(zip(map(str, paths), digests[split], strict=True))
                        for split, paths in sources.items()
                    },
                }
                _tokenise(config, sources, record, directory, hashes)
    hashes.save()
    prepared = _open(directory, record)
    return replace(prepared, parts=_parts(config, groups["train"], record, prepared))


def load(directory: str | Path) -> Prepared:
    """What `prepare` left in `directory`, without the texts that it came from.

    UserError if it is missing or damaged.
    """
    directory = Path(directory)
    hashes = Hashes(directory / "stats.json")
    record = _whole_record(directory, hashes)
    if record is None:
        raise UserError(
            f"{directory} holds no whole prepared text; miras train prepares it again"
        )
    hashes.save()
    return _open(directory, record)


def _open(directory: Path, record: dict) -> Prepared:
    arrays = {
        Path(name).stem: np.load(directory / name, mmap_mode="r")
        for name in record["outputs"]
        if name.endswith(".npy")
    }
    return Prepared(
        tokenizer=tokenizers.load(directory / "tokenizer.json"),
        context_length=record["config"]["context_length"],
        train=arrays["train"],
        heldout=arrays["heldout"],
        train_bytes=record["train"]["bytes"],
        heldout_bytes=record["heldout"]["bytes"],
        heldout_words=record["heldout"]["words"],
        fingerprint=record["fingerprint"],
        documents=record["config"].get("documents", "joined"),
        train_starts=arrays.get("train.starts"),
        heldout_starts=arrays.get("heldout.starts"),
    )


def _parts(
    config: TextFiles, groups: list[list[Path]], record: dict, prepared: Prepared
) -> tuple[Part, ...]:
    """Which tokens the files of each train pattern became, if they have shares."""
    if not config.shares:
        return ()
    of_files = np.cumsum([0, *record["train"]["documents"]])
    borders = of_files[np.cumsum([0, *map(len, groups)])]
    starts, end = prepared.train_starts, len(prepared.train)
    bounds = [int(starts[i]) if i < len(starts) else end for i in borders]
    return tuple(map(Part, bounds[:-1], bounds[1:], config.shares))


def _fingerprint(config: TextFiles, digests: dict, choice: dict) -> str:
    """Of all that decides tokens and windows; fields that came later only if set."""
    identity = [_FORMAT, digests, config.context_length, choice]
    if config.documents != "joined":
        identity.append(config.documents)
    if config.field != "text":
        identity.append({"field": config.field})
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


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
    config: TextFiles,
    sources: dict[str, list[Path]],
    record: dict,
    directory: Path,
    hashes: Hashes,
) -> None:
    """Write every output beside its place, then move all in; complete `record`."""
    staging = directory / ".preparing"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    texts = (documents(path, config.field) for path in sources["train"])
    tokenizer = config.tokenizer.train(chain.from_iterable(texts))
    (staging / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for split, paths in sources.items():
        record[split] = _write_split(tokenizer, paths, config.field, staging, split)
        if not record[split]["bytes"]:
            raise no_text(split, len(paths))
        count = record[split]["tokens"]
        if split == "train" and count <= config.context_length:
            raise UserError(
                f"the training text has {count} tokens, one window needs "
                f"{config.context_length + 1}; lower context_length or add text"
            )
    outputs = (*_NEEDED, *_STARTS)
    for name in outputs:
        os.replace(staging / name, directory / name)
    record["outputs"] = {name: hashes.of(directory / name) for name in outputs}
    record["seal"] = seal(record)
    (staging / "prepared.json").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(staging / "prepared.json", directory / "prepared.json")
    staging.rmdir()


def _write_split(
    tokenizer: Tokenizer, paths: list[Path], field: str, folder: Path, split: str
) -> dict:
    """Write tokens and starts; return bytes, words, documents per file and tokens."""
    counts = {"bytes": 0, "words": 0, "documents": []}
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with (
        NpyWriter(folder / f"{split}.npy", dtype) as tokens,
        NpyWriter(folder / f"{split}.starts.npy", np.int64) as starts,
    ):
        for ids in tokenizer.encode_each(_counted(paths, field, counts)):
            starts.append([len(tokens)])
            tokens.append([tokenizer.end_of_text])
            tokens.append(ids)
    return {**counts, "tokens": len(tokens)}


def _counted(paths: list[Path], field: str, counts: dict) -> Iterator[str]:
    """The documents of all files, added to `counts` as they pass."""
    for path in paths:
        counts["documents"].append(0)
        for text in documents(path, field):
            counts["documents"][-1] += 1
            counts["bytes"] += len(text.encode())
            counts["words"] += len(text.split())
            yield text


def _whole_record(directory: Path, hashes: Hashes) -> dict | None:
    """Return `prepared.json` if its seal and the hashes of all outputs are right."""
    try:
        record = json.loads((directory / "prepared.json").read_text())
        outputs = record["outputs"]
        whole = (
            record["seal"] == seal(record)
            and outputs.keys() >= set(_NEEDED)
            and all(hashes.of(directory / name) == outputs[name] for name in outputs)
        )
        return record if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
