"""Finds data files and reads their rows one at a time, each with the file and line it stands in.

| ending                            | a row is                                                                       |
|-----------------------------------|--------------------------------------------------------------------------------|
| .jsonl, .jsonl.gz, .jsonl.zst     | a line                                                                         |
| .json, .json.gz, .json.zst        | an item of the one list; its text, of 512 MiB at most, is held as a whole      |
| .parquet                          | a row; read through Arrow in batches                                           |

Files of lines and Parquet files may be larger than memory, a single line or a single value may not.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sedsft.data import DataFileError
from sedsft.data.values import Malformed, kind

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PARQUET_BATCH_ROWS = 1024
_PARQUET_BUFFER_BYTES = 1 << 20
"""Read of a column at once; without it, Arrow reads what a row group has of a column as a whole."""
_MAX_JSON_BYTES = 512 << 20
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Placed:
    """A value of a data file, or `Malformed` where there is none, and its place: `file` is set where there are several."""

    value: object
    line: int
    file: str


def split_pattern(path: str) -> tuple[str, str]:
    """The leading part of a path without wildcards, and the rest, which is empty if the path names one file or folder."""
    if os.path.exists(path):
        return path, ""
    parts = Path(path).parts
    wild = next((index for index, part in enumerate(parts) if _WILDCARDS & set(part)), len(parts))
    return str(Path(*parts[:wild])), str(Path(*parts[wild:])) if wild < len(parts) else ""


def find_files(path: str) -> tuple[Path, ...]:
    """Files that a path stands for, sorted: itself, those below a folder with a known ending, or matches of a pattern.

    Hidden files do not count; folders that are symbolic links are not entered. A pattern knows `*`, `?`, `[abc]` and `**`.

    Raises:
        DataFileError: no such file, or one that is no data file.
    """
    base, pattern = split_pattern(path)
    if pattern:
        files = _matches(Path(base), pattern)
    elif Path(base).is_dir():
        files = [file for file in _below(base) if _reader(file) is not None]
    else:
        files = [Path(base)]
    if not files:
        raise DataFileError(f"expected files ending in {', '.join(_READERS)} in {path}, got none")
    for file in files:
        if not file.is_file():
            state = "is no file" if os.path.exists(file) else "does not exist"
            raise DataFileError(f"expected a data file, got {file}, which {state}")
        if _reader(file) is None:
            raise DataFileError(f"expected a file ending in {', '.join(_READERS)}, got {file}")
    return tuple(sorted(files))


def read_values(path: str, max_rows: int | None) -> Iterator[Placed]:
    """Values of the first rows of all the files that `path` stands for, in their order.

    Raises:
        DataFileError: a file that is missing, empty, cut off or of another kind than its ending says.
    """
    files = find_files(path)
    folder = os.path.commonpath([file.parent for file in files])
    yield from islice((placed for file in files for placed in _values(file, folder if len(files) > 1 else None)), max_rows)


def count_rows(path: str, max_rows: int | None) -> int | None:
    """How many values `read_values` gives, as Parquet files tell; None where a file is of another kind or cannot be read."""
    files = find_files(path)
    if any(file.suffix != ".parquet" for file in files):
        return None
    try:
        total: int = sum(pq.read_metadata(file).num_rows for file in files)
    except (OSError, pa.ArrowException):
        return None
    return total if max_rows is None else min(total, max_rows)


def _matches(base: Path, pattern: str) -> list[Path]:
    if ".." in Path(pattern).parts:
        raise DataFileError(f"expected no .. behind a wildcard, got {pattern!r}; write the path without it")
    try:
        found = set(base.glob(pattern))
    except (ValueError, OSError) as error:
        raise DataFileError(f"expected a pattern of file names, got {pattern!r}: {error}") from error
    return [file for file in found if not file.is_dir() and not file.name.startswith(".")]


def _below(folder: str) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _values(file: Path, folder: str | None) -> Iterator[Placed]:
    name = "" if folder is None else str(file.relative_to(folder))
    read = cast(Callable[[Path], Iterator[object]], _reader(file))
    line = 0
    try:
        for line, value in enumerate(read(file), start=1):
            yield Placed(value, line, name)
    except (OSError, EOFError, zlib.error) as error:
        raise DataFileError(f"expected a readable file, got {file}, whose rows end behind line {line}: {error}") from error
    if line == 0:
        raise DataFileError(f"expected rows in {file}, got an empty file")


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return cast(BinaryIO, gzip.open(file, "rb"))
    if file.suffix == ".zst":
        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def _jsonl(file: Path) -> Iterator[object]:
    with _open(file) as stream:
        for number, line in enumerate(stream, start=1):
            yield _json_value(line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line)


def _json_value(line: bytes) -> object:
    if not line.strip():
        return Malformed("empty_line", "expected an object, got an empty line")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Malformed("invalid_utf8", f"expected UTF-8, got byte 0x{line[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return Malformed("invalid_json", f"expected JSON, got {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested thousands deep
        return Malformed("invalid_json", f"expected JSON that can be read, got: {error}")


def _json(file: Path) -> Iterator[object]:
    with _open(file) as stream:
        content = stream.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise DataFileError(
            f"expected a list of at most {_MAX_JSON_BYTES >> 20} MiB of JSON in {file}, since it is held in memory as a whole, "
            "got more; convert it to .jsonl (`jq -c '.[]'`) or .parquet, which are read bit by bit"
        )
    try:
        yield from _items(content.removeprefix(_BYTE_ORDER_MARK).decode("utf-8"), file)
    except UnicodeDecodeError as error:
        raise DataFileError(f"expected UTF-8 in {file}, got another byte at position {error.start + 1}") from error
    except DataFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataFileError(f"expected JSON, got {error} in {file}") from error


def _items(content: str, file: Path) -> Iterator[object]:
    """Items of a JSON list, decoded one by one."""
    decoder = json.JSONDecoder()
    at = _next(content, 0)
    if content[at : at + 1] != "[":
        value, _ = decoder.raw_decode(content, at)
        raise DataFileError(f"expected a list of rows in {file}, got {kind(value)}; use .jsonl for one object per line")
    at = _next(content, at + 1)
    if content[at : at + 1] == "]":
        return
    while True:
        value, end = decoder.raw_decode(content, at)
        yield value
        end = _next(content, end)
        mark = content[end : end + 1]
        if mark not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' or ']'", content, end)
        at = _next(content, end + 1)
        if mark == "]":
            break
    if at < len(content):
        raise json.JSONDecodeError("Extra data", content, at)


def _next(content: str, at: int) -> int:
    """Position of the next character that is no white space."""
    while content[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _parquet(file: Path) -> Iterator[object]:
    try:
        with pq.ParquetFile(file, buffer_size=_PARQUET_BUFFER_BYTES) as table:
            # Batches of all row groups at once would keep what was read of each in memory until the last.
            for group in range(table.num_row_groups):
                for batch in table.iter_batches(_PARQUET_BATCH_ROWS, row_groups=[group]):
                    yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataFileError(f"expected a readable parquet file, got {file}: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[object]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".jsonl.zst": _jsonl,
    ".json": _json,
    ".json.gz": _json,
    ".json.zst": _json,
    ".parquet": _parquet,
}
ENDINGS = tuple(_READERS)
"""How the names of data files end."""


def _reader(file: Path) -> Callable[[Path], Iterator[object]] | None:
    return next((read for ending, read in _READERS.items() if file.name.endswith(ending)), None)
