"""What a checkpoint was when it was committed, to tell later whether it still is.

A manifest is a small JSON file with the sha256 of every file of a step, the step's loss
and a digest of the manifest itself.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from miras_jax.training.hashes import sha256


class Damage(Exception):
    """A step differs from what was saved; the message names the file."""


class Manifest(NamedTuple):
    """What a step was when it was committed: its loss, and sha256 by file name."""

    loss: float | None
    files: dict[str, str]

    def seal(self) -> str:
        """A digest of the manifest itself."""
        text = json.dumps([self.loss, self.files], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of all files below `folder` by their path in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def write(path: Path, manifest: Manifest) -> None:
    """Whole or not at all, also when the machine loses power."""
    partial = path.with_suffix(".partial")
    with open(partial, "w") as file:
        json.dump({**manifest._asdict(), "seal": manifest.seal()}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read(path: Path) -> Manifest:
    """Raises Damage if it is missing or not what was written."""
    try:
        stored = json.loads(path.read_bytes())
        manifest = Manifest(stored["loss"], stored["files"])
        if stored["seal"] == manifest.seal():
            return manifest
    except OSError as error:
        raise Damage(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        pass
    raise Damage(f"{path}: not the manifest that was written")


def verify(folder: Path, manifest: Manifest) -> None:
    """Raises Damage at the first file below `folder` that does not match."""
    for name, digest in manifest.files.items():
        try:
            found = sha256(folder / name)
        except OSError as error:
            raise Damage(f"{folder / name}: {error.strerror}") from error
        if found != digest:
            raise Damage(f"{folder / name}: not the bytes that were written")
