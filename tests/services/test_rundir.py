"""The channel from the driver to the API."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from services.rundir import (
    RESTARTED,
    Control,
    Failure,
    Progress,
    Result,
    RunWriter,
    StatusReason,
    failures_before,
    read_control,
    read_lines,
    read_result,
    read_status,
    superseded,
    write_control,
)


def test_events_are_numbered_without_gaps_also_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        writer = RunWriter(tmp_path)
        writer.event("a", "first", x=1)
        writer.event("b", "second")
        writer.close()
    records = [record for record, _ in read_lines(tmp_path / "events.jsonl")]
    assert [record["seq"] for record in records] == [1, 2, 3, 4]
    assert records[0]["data"] == {"x": 1}


def test_a_reader_goes_on_where_it_stopped_and_leaves_an_unfinished_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"n": 1}\n{"n": 2}\n{"n"')
    lines = list(read_lines(path))
    assert [record["n"] for record, _ in lines] == [1, 2]
    with path.open("ab") as file:
        file.write(b": 3}\n")
    assert [record["n"] for record, _ in read_lines(path, lines[-1][1])] == [3]


def test_nothing_is_read_before_anything_is_written(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    assert read_result(tmp_path) is None
    assert list(read_lines(tmp_path / "events.jsonl")) == []


def test_status_and_result_come_back_as_written(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path)
    progress = Progress("sft", 0, 2, "training", 3, 9)
    writer.status(progress)
    read = read_status(tmp_path)
    assert read is not None
    assert read[0] == progress
    result = Result("failed", StatusReason("worker_died", "trainer-1"), stage_seconds={"sft": 1.5})
    writer.result(result)
    assert read_result(tmp_path) == result
    with pytest.raises(RuntimeError, match="one terminal record"):
        writer.result(result)
    writer.close()


def test_failures_of_a_job_come_from_all_its_attempts_in_order(tmp_path: Path) -> None:
    """A rank died twice in the first attempt, then its driver; the second never showed a heartbeat; the third is under way."""
    ranks = [Failure("worker_died", 0, 4), Failure("phase_timeout", 1, 2)]
    folders = [tmp_path / f"attempt-{n}" for n in (1, 2, 3)]
    first, _, third = writers = [RunWriter(folder) for folder in folders]
    for failure in ranks:
        first.event(RESTARTED, "again", failure=asdict(failure), wait_s=1.0)
    first.event("checkpoint", "another kind")
    first.status(Progress("rl", 1, 2, "rollout", 4, 9, completed=3))
    third.event(RESTARTED, "again", failure=asdict(ranks[0]), wait_s=1.0)
    deaths = [Failure("driver_died", 1, 3), Failure("driver_died", -1, 0)]
    assert failures_before(folders[0]) == ranks
    assert failures_before(folders[2]) == [*ranks, *deaths, ranks[0]]
    assert [superseded(folder) for folder in folders] == [True, True, False]
    for writer in writers:
        writer.close()


def test_the_newest_wish_is_read(tmp_path: Path) -> None:
    assert read_control(tmp_path) is None
    for seq, workers in ((1, 4), (2, 2)):
        write_control(tmp_path, Control(seq, "rl", workers))
    assert read_control(tmp_path) == Control(2, "rl", 2)
