"""The documents of a file, one after another: plain text, JSON lines, Parquet.

The suffix decides. `.jsonl` has a document per line, `.parquet` one per row (in row
groups, of which one at a time is in memory); whatever else is one document of plain
text. `.gz` may follow, but not on Parquet, which compresses its columns itself.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from miras_jax.errors import UserError

_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".gz")
_UNREAD = (".parquet.gz", ".zst", ".bz2", ".xz", ".zip")
_BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
_ROWS = 1024


def kind(path: Path) -> str:
    """The suffix that decides how a file is read; "" for plain text."""
    name = path.name.lower()
    return max((s for s in _SUFFIXES if name.endswith(s)), key=len, default="")


def documents(path: Path, field: str = "text") -> Iterator[str]:
    """The texts of a file; `field` names that of a JSON object, or a Parquet column.

    Lines and rows whose text is empty, and blank lines, are no documents. A file of
    plain text is one even if it is empty.

    UserError, with the line or row: broken files, no such field, a field that is no
    string, text that is not UTF-8; Parquet without pyarrow.
    """
    if path.name.lower().endswith(_UNREAD):
        raise UserError(
            f"{path} is compressed in a way that is not read; decompress it, or "
            "compress text and JSON lines with gzip"
        )
    suffix = kind(path)
    if suffix == ".parquet":
        return filter(None, _rows(path, field))
    if suffix.startswith(".jsonl"):
        return filter(None, _lines(path, field))
    return _plain(path)


def _plain(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            content = file.read()
    except _BROKEN_GZIP as error:
        raise _broken_gzip(path, error) from error
    try:
        yield content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, for example "
            "with iconv -f latin1 -t utf-8"
        ) from error


def _lines(path: Path, field: str) -> Iterator[str]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield _text_of(line, field, f"{path}, line {number}")
    except _BROKEN_GZIP as error:
        raise _broken_gzip(f"{path}, after line {number},", error) from error


def _text_of(line: bytes, field: str, where: str) -> str:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 (byte {error.start} of the line); write the file "
            "in UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON ({error.msg}, column {error.colno}); write one JSON "
            "object per line"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f'{where} holds no JSON object; write {{"{field}": "..."}} on each line'
        )
    if field not in value:
        raise _no_field(where, field, value)
    text = value[field]
    if not isinstance(text, str):
        raise _no_string(where, field, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {field!r} holds half of a surrogate pair (character "
            f"{error.start}), which is no text; replace it, for example by U+FFFD"
        ) from error
    return text


def _rows(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(
            f"reading {path} needs pyarrow; install it: pip install "
            "'miras-jax[parquet]'"
        ) from error
    number = 0
    try:
        # A buffer would hold all row groups that were read.
        with parquet.ParquetFile(path, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise _no_field(path, field, names)
            for batch in file.iter_batches(_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise _no_string(f"{path}, row {number}", field, text)
                    yield text
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read as Parquet after row {number} "
            f"({str(error).splitlines()[0]}); fetch or write the file again"
        ) from error


def _open(path: Path):
    return gzip.open(path) if kind(path).endswith(".gz") else open(path, "rb")


def _broken_gzip(where, error: Exception) -> UserError:
    return UserError(
        f"{where} is not whole gzip data ({error}); fetch or compress the file again"
    )


def _no_field(where, field: str, fields) -> UserError:
    found = ", ".join(map(repr, fields)) or "none"
    return UserError(
        f"{where} has no field {field!r} (it has {found}); name the one with the text: "
        "TextFiles(field=...)"
    )


def _no_string(where, field: str, value) -> UserError:
    return UserError(
        f"{where}: {field!r} is of type {type(value).__name__}, not a string; leave "
        "such documents out, or name another field: TextFiles(field=...)"
    )
