"""Examples on disk: written once as they come, then read from a memory map, so that any number fits.

The file is an Arrow IPC file, one record batch for each group of examples that was written together. A row has

    input_ids        list of int32    token ids
    trained          list of bool     which of them carry a loss
    line, file       int64, text      where the row was read

In memory are, for each row, its length, and for each record batch the number of its first row.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sedsft.records import Example

_SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "trained": pa.list_(pa.bool_()),
        "line": pa.int64(),
        "file": pa.string(),
    }
)


class ContentHash:
    """SHA-256 over tokens and loss masks of examples, in their order; where they stood does not count.

    sha256(sha256(lengths as int64) sha256(token ids as int32) sha256(masks, a byte per token))      all little-endian
    """

    def __init__(self) -> None:
        self._lengths, self._ids, self._trained = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()

    def update(self, examples: Sequence[Example]) -> None:
        """Add examples behind those before; it does not matter how many at once."""
        for example in examples:
            self._lengths.update(len(example.input_ids_T).to_bytes(8, "little"))
            self._ids.update(example.input_ids_T.astype("<i4").tobytes())
            self._trained.update(example.trained_T.astype("u1").tobytes())

    def hexdigest(self) -> str:
        """The hash of all examples so far."""
        parts = (self._lengths, self._ids, self._trained)
        return hashlib.sha256(b"".join(part.digest() for part in parts)).hexdigest()


class ExampleStore(Sequence[Example]):
    """Examples of a store's file, or of a slice of it. A slice costs nothing; an example is a copy, read when it is asked for.

    Pickled, it is the list of its examples, so that whoever is sent a slice needs no access to the file.
    """

    def __init__(self, file: _StoreFile, rows: range) -> None:
        self._file = file
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ExampleStore: ...
    def __getitem__(self, index: int | slice) -> Example | ExampleStore:
        if isinstance(index, slice):
            return ExampleStore(self._file, self._rows[index])
        return self._file.example(self._rows[index])

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    @property
    def sha256(self) -> str:
        """Equal for equal slices of equal content (`ContentHash`), whatever files the rows were read from."""
        if self._rows == range(len(self._file.lengths)):
            return self._file.sha256
        return hashlib.sha256(f"{self._file.sha256} {self._rows}".encode()).hexdigest()

    @property
    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each example; reads none of them."""
        rows = np.arange(self._rows.start, self._rows.stop, self._rows.step)
        lengths: npt.NDArray[np.int32] = self._file.lengths[rows]
        return lengths


def write_store(path: Path, groups: Iterable[Sequence[Example]]) -> ExampleStore:
    """Write examples to `path` as they come and open them. The file appears when it is complete, never a part of it."""
    temporary = path.with_name(f"{path.name}.tmp")
    content = ContentHash()
    lengths: list[npt.NDArray[np.int32]] = []
    try:
        with temporary.open("wb") as file:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                for examples in filter(len, groups):
                    lengths.append(np.array([len(example.input_ids_T) for example in examples], np.int32))
                    writer.write_batch(_record_batch(examples, lengths[-1]))
                    content.update(examples)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    stored = _StoreFile(path, content.hexdigest(), lengths)
    return ExampleStore(stored, range(len(stored.lengths)))


def _record_batch(examples: Sequence[Example], lengths: npt.NDArray[np.int32]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], lengths]).cumsum(dtype=np.int32)
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, np.concatenate([example.input_ids_T for example in examples])),
        "trained": pa.ListArray.from_arrays(offsets, np.concatenate([example.trained_T for example in examples])),
        "line": [example.line for example in examples],
        "file": [example.file for example in examples],
    }
    return pa.RecordBatch.from_pydict(columns, _SCHEMA)


class _StoreFile:
    """The memory map behind a store and its slices; `lengths` are those of the examples in each record batch."""

    def __init__(self, path: Path, sha256: str, lengths: Sequence[npt.NDArray[np.int32]]) -> None:
        self.sha256 = sha256
        self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
        self.lengths: npt.NDArray[np.int32] = np.concatenate([np.zeros(0, np.int32), *lengths])
        self._first_rows = np.cumsum([0, *map(len, lengths)])

    def example(self, row: int) -> Example:
        """Example number `row`, copied out of the map."""
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        batch, at = self._reader.get_batch(number), row - int(self._first_rows[number])
        ids, trained = (batch.column(name)[at].values for name in ("input_ids", "trained"))
        return Example(
            np.array(ids.to_numpy()),
            np.array(trained.to_numpy(zero_copy_only=False)),
            batch.column("line")[at].as_py(),
            batch.column("file")[at].as_py(),
        )
