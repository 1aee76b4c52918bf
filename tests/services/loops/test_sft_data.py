"""Rows of the stage on disk: the split, what resuming compares, and what the run tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sedsft.data import DataRowsError, EncoderDied
from sedsft.data.store import ExampleStore
from services.errors import DataError, WorkerDied
from services.jobspec import SFTStage
from services.loops import sft_data
from services.loops.resume import identity_of
from services.loops.sft_data import sft_examples
from services.run import Run
from services.rundir import read_lines
from tests.services.loops.test_sft import attempt, make_spec


def write_rows(path: Path, *numbers: int) -> None:
    rows = [{"prompt": f"w{i}", "completion": f"w{i} w{i + 1}" if i < 60 else "w1 " * 30} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stage_of(folder: Path, *numbers: int, **settings: Any) -> SFTStage:
    stage = make_spec(folder, **settings)
    write_rows(folder / "rows.jsonl", *numbers)
    return stage


def examples(job: Path, stage: SFTStage) -> tuple[Run, ExampleStore, ExampleStore]:
    run = attempt(job, len(list(job.glob("attempt-*"))) + 1, stage)
    try:
        folder = run.folder / "stages" / "sft"
        folder.mkdir(parents=True)
        return run, *sft_examples(run, stage.sft, folder, run.model_path(stage.model))
    finally:
        run.finish("succeeded", None)


def lines(store: ExampleStore) -> list[int]:
    return [row.line for row in store]


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (19, 1), (20, 2), (1010, 100)])
def test_the_last_tenth_is_held_out(tmp_path: Path, rows: int, held_out: int) -> None:
    run, training, kept = examples(tmp_path / "job", stage_of(tmp_path, *(i % 50 for i in range(rows))))
    assert lines(training) == list(range(1, rows - held_out + 1))
    assert lines(kept) == list(range(rows - held_out + 1, rows + 1))
    assert [path.name for path in (run.folder / "stages" / "sft" / "data").iterdir()] == ["training.arrow"]


def test_held_out_rows_of_their_own(tmp_path: Path) -> None:
    write_rows(tmp_path / "other.jsonl", 4, 5, 6)
    stage = stage_of(tmp_path, *range(5), held_out={"path": str(tmp_path / "other.jsonl")})
    run, training, held_out = examples(tmp_path / "job", stage)
    assert (len(training), len(held_out)) == (5, 3)
    assert sorted(path.name for path in (run.folder / "stages" / "sft" / "data").iterdir()) == [
        "held_out.arrow",
        "training.arrow",
    ]
    assert held_out[0].input_ids_T.tolist() == training[4].input_ids_T.tolist()


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected at least 2 rows in .*rows\.jsonl to hold one out, got 1"):
        examples(tmp_path / "job", stage_of(tmp_path, 1))


def test_what_resuming_compares(tmp_path: Path) -> None:
    def identity(*numbers: int, **settings: Any) -> dict[str, Any]:
        stage = stage_of(tmp_path, *numbers, **settings)
        _, training, held_out = examples(tmp_path / "job", stage)
        return identity_of(stage, tmp_path / "model", training, held_out)

    first = identity(*range(30))
    assert identity(*range(30), checkpoints={"every_steps": 2}) == first
    # Rows of attempts that are over are in nobody's way.
    assert [path.parent.parent.parent.parent.name for path in (tmp_path / "job").rglob("*.arrow")] == ["attempt-2"]
    for changed in (identity(*range(29), 31), identity(*range(31)), identity(1, 0, *range(2, 30))):
        assert changed["stage"] == first["stage"]
        assert changed["data_sha256"] != first["data_sha256"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_processes_make_the_same_identity(tmp_path: Path) -> None:
    stages = [stage_of(tmp_path, *range(40), encode_processes=processes) for processes in (1, 2)]
    found = [(stage, *examples(tmp_path / "job", stage)[1:]) for stage in stages]
    one, two = (identity_of(stage, tmp_path / "model", *stores) for stage, *stores in found)
    assert one == two


def test_left_out_rows_are_counted_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft_data, "LISTED_ROWS", 3)
    monkeypatch.setattr("sedsft.data.encoding.CHUNK_ROWS", 10)
    stage = stage_of(tmp_path, *range(20), *range(61, 66), max_length=16, on_too_long="drop")
    phases: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Run, "phase", lambda run, *progress: phases.append(progress))
    run, training, held_out = examples(tmp_path / "job", stage)
    assert (len(training), len(held_out)) == (18, 2)
    assert phases[:3] == [("data", 10, 0), ("data", 20, 0), ("data", 25, 0)]
    [event] = [event for event, _ in read_lines(run.folder / "events.jsonl") if event["kind"] == "rows_dropped"]
    assert event["message"] == f"5 rows of {tmp_path / 'rows.jsonl'} are too long"
    assert event["data"]["kinds"] == {"too_long": 5}
    assert [row["line"] for row in event["data"]["first"]] == [21, 22, 23]
    assert {row["length"] for row in event["data"]["first"]} == {35}


def test_errors_leave_no_file_and_a_dead_process_is_a_dead_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataRowsError, match="at most max_length=16 tokens, got 1 bad row"):
        examples(tmp_path / "job", stage_of(tmp_path, 1, 2, 61, max_length=16))
    assert list((tmp_path / "job").rglob("*.arrow*")) == []

    def die(*_: Any) -> None:
        raise EncoderDied("expected 2 processes, got the death of one")

    monkeypatch.setattr(sft_data, "store_rows", die)
    with pytest.raises(WorkerDied, match="expected 2 processes, got the death of one"):
        examples(tmp_path / "job", stage_of(tmp_path, 1, 2))
