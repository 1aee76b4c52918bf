"""What is written comes back from the memory map, slice by slice, and nobody sees a part of a file."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.data.store import ContentHash, ExampleStore, write_store
from sedsft.records import Example


def example(length: int, line: int, seed: int = 0) -> Example:
    chance = np.random.default_rng((seed, line))
    return Example(chance.integers(0, 2**31, length, np.int32), chance.random(length) < 0.5, line, f"f{line % 3}")


def fields(row: Example) -> tuple[object, ...]:
    assert (row.input_ids_T.dtype, row.trained_T.dtype) == (np.int32, np.bool_)
    return row.input_ids_T.tolist(), row.trained_T.tolist(), row.line, row.file


def same(store: ExampleStore, rows: list[Example]) -> bool:
    return [fields(row) for row in store] == [fields(row) for row in rows]


ROWS = [example(length, line) for line, length in enumerate((3, 9, 1, 17, 8, 64, 2, 5, 7, 11), start=1)]


@pytest.fixture
def store(tmp_path: Path) -> ExampleStore:
    return write_store(tmp_path / "rows.arrow", [ROWS[:4], [], ROWS[4:5], ROWS[5:]])


def test_rows_come_back(store: ExampleStore, tmp_path: Path) -> None:
    assert same(store, ROWS)
    assert store.lengths.tolist() == [3, 9, 1, 17, 8, 64, 2, 5, 7, 11]
    assert fields(store[-1]) == fields(ROWS[-1])
    assert fields(store[np.int64(4)]) == fields(ROWS[4])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]
    with pytest.raises(IndexError):
        store[10]
    row = store[3]
    row.input_ids_T[0] += 1
    assert fields(store[3]) == fields(ROWS[3])


def test_another_program_can_read_the_file(store: ExampleStore, tmp_path: Path) -> None:
    table = pa.ipc.open_file(tmp_path / "rows.arrow").read_all()
    assert table.to_pylist()[8] == {
        "input_ids": ROWS[8].input_ids_T.tolist(), "trained": ROWS[8].trained_T.tolist(), "line": 9, "file": "f0",
    }  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(cuts=st.lists(st.slices(10), min_size=1, max_size=3))
def test_slices_are_those_of_a_list(tmp_path_factory: pytest.TempPathFactory, cuts: list[slice]) -> None:
    path = tmp_path_factory.getbasetemp() / "slices.arrow"
    store, rows = write_store(path, [ROWS[:7], ROWS[7:]]), ROWS
    for cut in cuts:
        store, rows = store[cut], rows[cut]
    assert len(store) == len(rows)
    assert same(store, rows)
    assert store.lengths.tolist() == [len(row.input_ids_T) for row in rows]
    assert [fields(row) for row in pickle.loads(pickle.dumps(store))] == [fields(row) for row in rows]


def test_the_hash_tells_content_and_slice_and_nothing_else(store: ExampleStore, tmp_path: Path) -> None:
    def digest(rows: list[Example]) -> str:
        return write_store(tmp_path / "other.arrow", [rows]).sha256

    assert digest(ROWS) == store.sha256 == store[:].sha256
    direct = ContentHash()
    direct.update(ROWS)
    assert direct.hexdigest() == store.sha256
    assert digest([Example(row.input_ids_T, row.trained_T, 0, "moved") for row in ROWS]) == store.sha256
    flipped = ROWS[4].trained_T.copy()
    flipped[2] ^= True
    joined = Example(*(np.concatenate([getattr(row, n) for row in ROWS[:2]]) for n in ("input_ids_T", "trained_T")), 1, "")
    changed = [
        ROWS[:-1],
        [ROWS[1], ROWS[0], *ROWS[2:]],
        [*ROWS[:4], Example(ROWS[4].input_ids_T, flipped, 5, "f2"), *ROWS[5:]],
        [joined, *ROWS[2:]],
    ]
    hashes = {digest(rows) for rows in changed} | {store[:5].sha256, store[5:].sha256, store[::2].sha256, store.sha256}
    assert len(hashes) == len(changed) + 4
    assert store[5:][:2].sha256 == store[5:7].sha256


def test_a_file_that_breaks_off_leaves_nothing_and_keeps_the_one_before(store: ExampleStore, tmp_path: Path) -> None:
    def groups() -> Iterator[list[Example]]:
        yield ROWS[:2]
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["rows.arrow", "rows.arrow.tmp"]
        raise ValueError("broken off")

    with pytest.raises(ValueError, match="broken off"):
        write_store(tmp_path / "rows.arrow", groups())
    assert [path.name for path in tmp_path.iterdir()] == ["rows.arrow"]
    assert same(store, ROWS)


def test_no_row_makes_an_empty_store(tmp_path: Path) -> None:
    store = write_store(tmp_path / "none.arrow", [])
    assert (len(store), list(store), store.lengths.tolist()) == (0, [], [])
