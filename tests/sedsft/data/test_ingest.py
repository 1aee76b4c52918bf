"""Every row of a file becomes an example or is told, and a file that memory could not hold as rows passes through."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sedsft.data
from sedsft.config import DataConfig
from sedsft.data import DataRowsError, LongRow
from sedsft.data.encoding import EncodeSettings, encode_sft
from sedsft.data.ingest import StoredRows, store_rows
from sedsft.data.lengths import LengthLimit, OnTooLong
from sedsft.data.sources import read_sft_rows
from sedsft.tasks.tiny_model import countdown_tokenizer

SHORT = {"prompt": "3 7 2>8", "completion": "7+3=10,10-2=8"}
LONG = {"prompt": "3 7 2 5>24", "completion": "7*3=21,5-2=3,21+3=24"}
LATE = {"prompt": "3 7 2 5 " * 5 + ">24", "completion": "7*3=21,5-2=3,21+3=24"}
REFUSED = {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "3>3"}], "completion": "3"}
EMPTY = {"prompt": "3>3", "completion": ""}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    countdown_tokenizer().save_pretrained(folder)
    return folder


def stored(model: Path, folder: Path, on_too_long: OnTooLong, *rows: Mapping[str, Any] | str, **settings: Any) -> StoredRows:
    """What becomes of `rows`, which may have 20 tokens."""
    (folder / "rows.jsonl").write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    data = DataConfig(path=str(folder / "rows.jsonl"), **settings)
    told: list[int] = []
    found = store_rows(folder / "out" / "rows.arrow", data, EncodeSettings(model, LengthLimit(20, on_too_long)), 1, told.append)
    assert told == [len(rows) - sum(row.kind != "template_refused" for row in found.skipped.first)]
    assert len(found.examples) + found.skipped.total + found.dropped.total == len(rows)
    return found


def test_every_row_is_an_example_or_told(model: Path, tmp_path: Path) -> None:
    rows = (SHORT, "{", LONG, REFUSED, EMPTY, LATE, SHORT)
    found = stored(model, tmp_path, "cut", *rows, on_bad_row="skip")
    assert [(row.line, len(row.input_ids_T)) for row in found.examples] == [(1, 19), (3, 20), (7, 19)]
    assert found.cut.first == [LongRow(3, "26 tokens", "", 26)]
    assert [(row.line, row.length) for row in found.dropped.first if isinstance(row, LongRow)] == [(6, 42)]
    assert sorted((row.line, row.kind) for row in found.skipped.first) == [
        (2, "invalid_json"), (4, "template_refused"), (5, "empty_text"),
    ]  # fmt: skip
    found = stored(model, tmp_path, "drop", *rows, on_bad_row="skip")
    assert [row.line for row in found.examples] == [1, 7]
    assert ([row.line for row in found.dropped.first], found.cut.total) == ([3, 6], 0)
    direct = encode_sft(read_sft_rows(found.data).rows[:1], countdown_tokenizer(), 20, "drop").examples
    assert found.examples[0].input_ids_T.tolist() == direct[0].input_ids_T.tolist()


@pytest.mark.parametrize(
    ("rows", "settings", "said"),
    [
        ((SHORT, REFUSED), {}, r"can render, got 1 bad row; mend or remove these rows, or set on_bad_row to skip:\n  line 2: "),
        ((REFUSED, REFUSED), {"on_bad_row": "skip"}, "can render, got 2 bad rows; mend or remove these rows:"),
        ((SHORT, EMPTY, REFUSED), {}, "expected SFT rows in .*, got 1 bad row; .*, or set on_bad_row to skip:\n  line 2: "),
        ((SHORT, LONG), {}, "at most max_length=20 tokens, got 1 bad row; .* or set on_too_long:\n  line 2: 26 tokens"),
    ],
)
def test_rows_are_refused_before_a_file_appears(
    model: Path, tmp_path: Path, rows: tuple[Any, ...], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataRowsError, match=said):
        stored(model, tmp_path, "error", *rows, **settings)
    assert list((tmp_path / "out").iterdir()) == []


def test_of_many_bad_rows_the_first_are_kept_and_all_are_counted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sedsft.data, "_KEPT_ROWS", 100)
    with pytest.raises(DataRowsError, match="got 250 bad rows") as caught:
        stored(model, tmp_path, "error", SHORT, *[EMPTY, "{"] * 125)
    assert [row.line for row in caught.value.bad] == list(range(2, 102))
    assert caught.value.tally.kinds == {"empty_text": 125, "invalid_json": 125}
    assert "and 230 more; all by reason:\n    125 x empty_text\n    125 x invalid_json" in str(caught.value)


MEASURED_IN_A_CHILD = """
import json, sys
from pathlib import Path
from sedsft.config import DataConfig
from sedsft.data.encoding import EncodeSettings
from sedsft.data.ingest import store_rows
from sedsft.data.lengths import LengthLimit

def peak_bytes(since_now=False):
    if since_now:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024

model, data, out = sys.argv[1:]
settings = EncodeSettings(Path(model), LengthLimit(64, "error"))
few = store_rows(Path(out) / "few.arrow", DataConfig(path=data, max_rows=4000), settings, 1, lambda done: None)
before = peak_bytes(since_now=True)
rows = store_rows(Path(out) / "all.arrow", DataConfig(path=data), settings, 1, lambda done: None).examples
shown = [[rows[i].line, rows[i].input_ids_T.tolist(), rows[i].trained_T.tolist()] for i in range(0, len(rows), 9973)]
grown, sample = peak_bytes() - before, rows[0]
held = len(rows) * sum(map(sys.getsizeof, (sample, sample.input_ids_T, sample.trained_T)))
print(json.dumps({"rows": len(rows), "grown": grown, "held": held, "shown": shown}))
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_memory_does_not_grow_with_the_file(model: Path, tmp_path: Path, ending: str) -> None:
    num_rows, length, path = 200_000, 24, tmp_path / f"rows.{ending}"
    ids = np.random.default_rng(0).integers(0, 12, (num_rows, length), np.int32)
    labels = np.where(np.arange(length) < 8, -100, ids).astype(np.int32)
    if ending == "parquet":
        offsets = np.arange(num_rows + 1, dtype=np.int32) * length
        columns = {name: pa.ListArray.from_arrays(offsets, v.ravel()) for name, v in (("input_ids", ids), ("labels", labels))}
        # One row group, as large files have it that were written at once.
        pq.write_table(pa.table(columns), path, row_group_size=num_rows)
    else:
        with path.open("w") as file:
            for row, row_labels in zip(ids.tolist(), labels.tolist(), strict=True):
                file.write(json.dumps({"input_ids": row, "labels": row_labels}) + "\n")
    command = [sys.executable, "-c", MEASURED_IN_A_CHILD, str(model), str(path), str(tmp_path)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{ending}: peak memory grew by {found['grown'] / 1e6:.1f} MB; a list would hold {found['held'] / 1e6:.1f} MB")
    assert found["rows"] == num_rows
    assert found["held"] > 60e6
    assert found["grown"] < found["held"] / 3
    for line, row, trained in found["shown"]:
        assert (row, trained) == (ids[line - 1].tolist(), [False] * 8 + [True] * 16)
