"""Rows come in the same order and with the same places from every kind of file, and damage is told."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.data import DataFileError, files
from sedsft.data.files import count_rows, find_files, read_values, split_pattern
from sedsft.data.values import Malformed

ROWS = [{"a": index, "b": "ä\n" * index} for index in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
LIST = json.dumps(ROWS).encode()


def zst(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", LINES),
        ("x.jsonl.gz", gzip.compress(LINES)),
        ("x.jsonl.zst", zst(LINES)),
        ("x.jsonl.zst", b"".join(zst(line) for line in LINES.splitlines(keepends=True))),
        ("x.json", json.dumps(ROWS).encode()),
        ("x.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode() + b"\r\n"),
        ("x.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        ("x.json.zst", zst(json.dumps(ROWS).encode())),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    read = list(read_values(str(tmp_path / name), None))
    assert [placed.value for placed in read] == ROWS
    assert [(placed.line, placed.file) for placed in read] == [(line, "") for line in range(1, 6)]


def test_parquet_batches_keep_the_order(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": range(3000), "none": pa.nulls(3000)}), tmp_path / "x.parquet", row_group_size=1300)
    read = list(read_values(str(tmp_path / "x.parquet"), None))
    assert [placed.value for placed in read] == [{"a": index, "none": None} for index in range(3000)]
    assert read[-1].line == 3000


def tree(root: Path) -> None:
    names = ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz", ".hidden.jsonl", ".git/d.jsonl", "README.md")
    for number, name in enumerate(names):
        (root / name).parent.mkdir(exist_ok=True)
        content = b'{"n": %d}\n' % number * 2
        (root / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)


def test_a_folder_is_read_in_sorted_order_and_max_rows_counts_over_all(tmp_path: Path) -> None:
    tree(tmp_path)
    read = [(placed.file, placed.line, placed.value) for placed in read_values(str(tmp_path), 5)]
    assert read == [
        ("a.jsonl", 1, {"n": 1}),
        ("a.jsonl", 2, {"n": 1}),
        ("b.jsonl", 1, {"n": 0}),
        ("b.jsonl", 2, {"n": 0}),
        ("sub/c.jsonl.gz", 1, {"n": 2}),
    ]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[b-z].jsonl", ["b.jsonl"]),
        ("*/c*", ["sub/c.jsonl.gz"]),
        ("**/?.jsonl*", [".git/d.jsonl", "a.jsonl", "b.jsonl", "sub/c.jsonl.gz"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, names: list[str]) -> None:
    tree(tmp_path)
    assert [str(file.relative_to(tmp_path)) for file in find_files(str(tmp_path / pattern))] == names


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    (tmp_path / "x[1].jsonl").write_bytes(LINES)
    path = str(tmp_path / "x[1].jsonl")
    assert split_pattern(path) == (path, "")
    assert len(list(read_values(path, None))) == 5
    assert split_pattern("/a/b*/c/d?.json") == ("/a", "b*/c/d?.json")
    assert split_pattern("*.json") == (".", "*.json")


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("*.jsonl", "ending in .jsonl, .jsonl.gz, .jsonl.zst, .json"),
        ("*.md", "expected a file ending in"),
        ("*/../x.jsonl", "expected no .. behind a wildcard"),
        ("**x", "expected a pattern"),
        ("p*", "is no file"),
    ],
)
def test_patterns_that_match_no_data_file(tmp_path: Path, pattern: str, said: str) -> None:
    (tmp_path / "README.md").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataFileError) as caught:
        find_files(str(tmp_path / pattern))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.jsonl.gz", gzip.compress(LINES)[:-9], "whose rows end behind line "),
        ("x.jsonl.gz", LINES, "expected a readable file"),
        ("x.jsonl.zst", zst(LINES)[:-9], "expected a readable file"),
        ("x.jsonl.zst", LINES, "expected a readable file"),
        ("x.jsonl.gz", gzip.compress(b""), "got an empty file"),
        ("x.json", b'[{"a": 1} {"a": 2}]', "expected JSON, got Expecting ',' or ']'"),
        ("x.json", b'[{"a": 1}, ]', "expected JSON, got"),
        ("x.json", b'[{"a": 1}', "expected JSON, got"),
        ("x.json", b'[{"a": 1}] 2', "expected JSON, got Extra data"),
        ("x.json", b'[{"a": "\xff"}]', "expected UTF-8 in"),
        ("x.json", b"[" * 100_000, "expected JSON, got"),
        ("x.json", b'"a"', "expected a list of rows"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataFileError) as caught:
        list(read_values(str(tmp_path / name), None))
    assert said in str(caught.value)
    assert name in str(caught.value)


def test_a_flipped_byte_in_a_gzip_file_is_told(tmp_path: Path) -> None:
    content = bytearray(gzip.compress(os.urandom(4096)))
    content[2000] ^= 0xFF
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(DataFileError, match="expected a readable file"):
        list(read_values(str(tmp_path / "x.jsonl.gz"), None))


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def test_a_list_that_is_too_large_is_told_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, content in (("x.json", LIST), ("x.json.gz", gzip.compress(LIST)), ("x.json.zst", zst(LIST))):
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr(files, "_MAX_JSON_BYTES", len(LIST))
        assert len(list(read_values(str(tmp_path / name), None))) == 5
        monkeypatch.setattr(files, "_MAX_JSON_BYTES", len(LIST) - 1)
        with pytest.raises(
            DataFileError, match=rf"{name}, since it is held in memory as a whole, got more; convert it to .jsonl"
        ):
            list(read_values(str(tmp_path / name), None))


def test_rows_are_counted_where_the_files_tell(tmp_path: Path) -> None:
    for name, rows in (("a.parquet", 7), ("b.parquet", 4)):
        pq.write_table(pa.table({"a": range(rows)}), tmp_path / name)
    assert [count_rows(str(tmp_path), most) for most in (None, 5, 20)] == [11, 5, 11]
    (tmp_path / "b.parquet").write_bytes(b"damaged")
    assert count_rows(str(tmp_path), None) is None
    (tmp_path / "b.parquet").unlink()
    (tmp_path / "c.jsonl").write_bytes(LINES)
    assert count_rows(str(tmp_path), None) is None


@settings(deadline=None, max_examples=50)
@given(values=st.lists(_VALUES, min_size=1, max_size=6), indent=st.sampled_from([None, 0, 3]))
def test_json_lists_come_back_item_by_item(tmp_path_factory: pytest.TempPathFactory, values: list[object], indent: int) -> None:
    file = tmp_path_factory.getbasetemp() / "items.json"
    file.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    assert [placed.value for placed in read_values(str(file), None)] == values


@settings(deadline=None, max_examples=50)
@given(content=st.binary(min_size=1, max_size=60))
def test_any_bytes_give_one_value_or_reason_a_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.jsonl"
    file.write_bytes(content)
    read = list(read_values(str(file), None))
    assert [placed.line for placed in read] == list(range(1, len(content.removesuffix(b"\n").split(b"\n")) + 1))
    assert all(isinstance(placed.value, Malformed | dict | list | str | int | float | None) for placed in read)
