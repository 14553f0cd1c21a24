"""sha256 of files, and which of them need not be read again."""

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

# A clock may stand still for so long, in which a change leaves no other time: that of
# some file systems counts in steps of two seconds.
_RESOLUTION_NS = 2_000_000_000


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(record: dict) -> str:
    """The hash of all of `record` but its entry "seal"."""
    body = {name: value for name, value in record.items() if name != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Hashes:
    """The sha256 of files, remembered between starts in the file `path`.

    A file is read again unless its size and modification time (ns) are those that it
    was hashed with, as in the index of git. Hashes of files that were just written are
    not remembered, as the next change may have the same time.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known = _read(path)
        self._is_new = False

    def of(self, path: Path) -> str:
        """The hash of one file, from memory if it has not changed since."""
        name, begun, stat = os.path.abspath(path), time.time_ns(), _stat(path)
        if self._known.get(name, [])[:2] == stat:
            return self._known[name][2]
        digest = sha256(path)
        if stat[1] + _RESOLUTION_NS < begun:
            self._known[name] = [*stat, digest]
            self._is_new = True
        return digest

    def save(self) -> None:
        """Remember what was hashed, if the folder can be written."""
        if not self._is_new:
            return
        record = {"files": self._known}
        text = json.dumps({**record, "seal": seal(record)}, indent=1)
        with contextlib.suppress(OSError):
            # Of a name of its own: several processes may do this at a time.
            handle, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=".stats")
            with open(handle, "w") as file:
                file.write(text)
            os.replace(temporary, self._path)


def _stat(path: Path) -> list[int]:
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def _read(path: Path) -> dict[str, list]:
    """Nothing if it is missing or damaged."""
    try:
        record = json.loads(path.read_bytes())
        return record["files"] if record["seal"] == seal(record) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
