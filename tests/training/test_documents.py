"""Every document of every kind of file comes out once, and no broken file goes by."""

import gzip
import json
import random
import sys
import tracemalloc

import pytest

from miras_jax.errors import UserError
from miras_jax.training.documents import documents, kind

TEXTS = ["One.", "Two\nlines \u541b\u5b50.", "\U0001f600", "  spaces\r\nkept  "]


def write(path, content: bytes):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def lines(texts, field="text") -> bytes:
    return "".join(json.dumps({"n": 1, field: t}) + "\n" for t in texts).encode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
def test_each_line_is_a_document(tmp_path, name):
    path = write(tmp_path / name, lines(TEXTS))
    assert list(documents(path)) == TEXTS
    path = write(tmp_path / name, lines(TEXTS, "content"))
    assert list(documents(path, "content")) == TEXTS


def test_lines_without_text_are_no_documents(tmp_path):
    content = b"\n" + lines(["One.", "", "Two."]) + b" \r\n" + lines(["Three."]).strip()
    path = write(tmp_path / "a.jsonl", content)
    assert list(documents(path)) == ["One.", "Two.", "Three."]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a", "a.gz", "a.json"])
@pytest.mark.parametrize("text", ["", "One.\r\n\n\u541b", "\ufeffmarked"])
def test_a_text_file_is_one_document(tmp_path, name, text):
    path = write(tmp_path / name, text.encode())
    assert list(documents(path)) == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_is_never_in_memory_as_a_whole(tmp_path, name):
    path = write(tmp_path / name, lines(["A thousand characters. " * 44] * 3000))
    tracemalloc.start()
    assert sum(1 for _ in documents(path)) == 3000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_the_suffix_tells_the_kind(tmp_path):
    names = [
        "a.txt",
        "a.jsonl",
        "b.x.JSONL.gz",
        "a.gz",
        "a.txt.gz",
        "a.parquet",
        "jsonl",
    ]
    kinds = ["", ".jsonl", ".jsonl.gz", ".gz", ".gz", ".parquet", ""]
    assert [kind(tmp_path / name) for name in names] == kinds


BROKEN = {
    "is not JSON": b'{"text": "cut',
    "is not UTF-8 .byte 10 of the line.": b'{"text": "\xe9"}',
    "holds no JSON object": b'["text"]',
    "has no field 'text' .it has 'body', 'id'.; .*field=": b'{"body": "a", "id": 1}',
    "has no field 'text' .it has none.": b"{}",
    "'text' is of type NoneType, not a string": b'{"text": null}',
    "'text' is of type list": b'{"text": ["a"]}',
    "half of a surrogate pair .character 1.": b'{"text": "a\\ud83d"}',
}


def fails(match):
    return pytest.raises(UserError, match=match)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("match", BROKEN)
def test_a_broken_line_is_named(tmp_path, name, match):
    path = write(tmp_path / name, lines(["fine"]) + b"\n" + BROKEN[match] + b"\n")
    with fails(match) as caught:
        list(documents(path))
    assert f"{path}, line 3" in str(caught.value)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)


def cut(content):
    return content[:-20]


def flipped(content):
    return content[:40] + bytes([content[40] ^ 255]) + content[41:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda _: b"plain text"])
@pytest.mark.parametrize(
    "name, where", [("a.jsonl.gz", "after line"), ("a.gz", "a.gz")]
)
def test_broken_gzip_is_named(tmp_path, damage, name, where):
    whole = gzip.compress(lines([str(i) for i in range(100)]))
    (tmp_path / name).write_bytes(damage(whole))
    with fails(f"{where}.* is not whole gzip data .*again") as caught:
        list(documents(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl.zst", ".txt.xz", ".parquet.gz", ".ZIP"])
def test_other_compression_is_refused(tmp_path, suffix):
    with fails("compressed in a way that is not read; decompress it"):
        documents(tmp_path / f"a{suffix}")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with fails(r"a\.parquet needs pyarrow.*pip install 'miras-jax\[parquet\]'"):
        list(documents(tmp_path / "a.parquet"))


@pytest.fixture
def table():
    """Writes a Parquet file of columns."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(path, **columns):
        parquet.write_table(pyarrow.table(columns), path, row_group_size=1000)
        return path

    return write


def test_each_row_is_a_document(tmp_path, table):
    texts = [f"{text} {i}" for i in range(700) for text in TEXTS]
    path = table(tmp_path / "a.parquet", n=list(range(2800)), text=texts)
    assert list(documents(path)) == texts
    path = table(tmp_path / "a.parquet", content=["One.", "", "Two."])
    assert list(documents(path, "content")) == ["One.", "Two."]


def test_row_groups_do_not_gather_in_memory(tmp_path, table):
    import pyarrow

    draw = random.Random(0)
    texts = [draw.randbytes(500).hex() for _ in range(10_000)]
    path = table(tmp_path / "a.parquet", text=texts)
    del texts
    before = pyarrow.total_allocated_bytes()
    held = [pyarrow.total_allocated_bytes() - before for _ in documents(path)]
    assert len(held) == 10_000
    assert max(held) < 5e6  # of 10 MB


def test_broken_parquet_is_named(tmp_path, table):
    path = table(tmp_path / "a.parquet", body=["a"], id=[1])
    with fails(r"a\.parquet has no field 'text' .it has 'body', 'id'."):
        list(documents(path))
    with fails("row 1: 'id' is of type int, not a string"):
        list(documents(path, "id"))
    path = table(tmp_path / "a.parquet", text=["a"] * 1500 + [None])
    with fails("row 1501: 'text' is of type NoneType"):
        list(documents(path))
    path.write_bytes(path.read_bytes()[:-9])
    with fails("cannot be read as Parquet after row 0 .*again") as caught:
        list(documents(path))
    assert "\n" not in str(caught.value)
