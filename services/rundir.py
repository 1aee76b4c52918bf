"""Folder of one attempt of a job: the channel from the driver to the API, and all that a job leaves behind.

    <runs>/<job id>/spec.json                  resolved spec, written by the API before anything starts
    <runs>/<job id>/attempt-<n>/
        events.jsonl                           {"seq", "time", "kind", "message", "data"}, seq gap-free from 1
        metrics.jsonl                          {"time", "stage", "step", "values"}
        status.json                            phase, progress and heartbeat, replaced atomically every few seconds
        result.json                            terminal record, written once and last
        driver.log                             what the driver and its workers print
        control.json                           what the service wants of a running stage, replaced atomically by the API
        report.html
        stages/<stage>/checkpoints/step-<n>/   MANIFEST.json, weights, tokenizer
        stages/<stage>/*.json                  tables and samples of the stage
        stages/<stage>/rollouts/*.parquet      rollouts of an rl stage, see services.rollout_record

One process, the driver, writes all but spec.json and control.json; any number read. The API can be down meanwhile: it reads on
from where it stopped.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

RESTARTED = "stage_restarted"
"""Kind of the event with which a stage starts again; its data hold the `failure`."""


@dataclass(frozen=True)
class Progress:
    """How far a job is: `step` of `steps` in stage number `stage_index` (from 0) of `num_stages`."""

    stage: str = ""
    stage_index: int = 0
    num_stages: int = 1
    phase: str = "starting"
    step: int = 0
    steps: int = 0
    completed: int = 0
    """Newest step of the stage whose figures were written."""
    engines: dict[str, int] | None = None
    """Rollout engines `wanted`, `alive` and `ready`; None where there are none."""


@dataclass(frozen=True)
class Failure:
    """What a job recovered from, or not: `cause` is a code, `stage` the number of the stage and `step` its newest one done."""

    cause: str
    stage: int
    step: int


@dataclass(frozen=True)
class Control:
    """How many rollout workers a stage is to have; `seq` grows with every wish."""

    seq: int
    stage: str
    rollout_workers: int


@dataclass(frozen=True)
class StatusReason:
    """Why a job ended: stable code, message that says what was expected, what came and what to do."""

    code: str
    message: str


@dataclass(frozen=True)
class CheckpointRecord:
    """A published checkpoint, as the API lists it."""

    stage: str
    step: int
    path: str
    manifest_sha256: str


@dataclass(frozen=True)
class Result:
    """Terminal record of an attempt."""

    status: Literal["succeeded", "failed", "cancelled"]
    reason: StatusReason | None = None
    checkpoints: tuple[CheckpointRecord, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)


def attempts_of(run_folder: Path) -> list[Path]:
    """Folders of the attempts of a job up to that of `run_folder`, in order."""
    numbered = {int(folder.name.rpartition("-")[2]): folder for folder in run_folder.parent.glob("attempt-*")}
    own = int(run_folder.name.rpartition("-")[2])
    return [numbered[number] for number in sorted(numbered) if number <= own]


def superseded(run_folder: Path) -> bool:
    """True once a later attempt of the job exists: this one must write no more."""
    own = int(run_folder.name.rpartition("-")[2])
    return any(int(folder.name.rpartition("-")[2]) > own for folder in run_folder.parent.glob("attempt-*"))


def failures_before(run_folder: Path) -> list[Failure]:
    """What the job has recovered from so far, oldest first: stages started again, and drivers of earlier attempts that died."""
    failures = []
    for attempt in attempts_of(run_folder):
        events = read_lines(attempt / "events.jsonl")
        failures += [Failure(**event["data"]["failure"]) for event, _ in events if event["kind"] == RESTARTED]
        if attempt != run_folder:
            failures.append(death_of(attempt))
    return failures


def death_of(run_folder: Path) -> Failure:
    """The failure that the end of an attempt without a result is."""
    status = read_status(run_folder)
    progress = status[0] if status else Progress(stage_index=-1)
    return Failure("driver_died", progress.stage_index, progress.completed)


def write_control(run_folder: Path, control: Control) -> None:
    """The API's side: say what is wanted of a running stage."""
    write_atomically(run_folder / "control.json", json.dumps(asdict(control)))


def read_control(run_folder: Path) -> Control | None:
    """The newest wish; None where there is none."""
    try:
        return Control(**json.loads((run_folder / "control.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def write_atomically(path: Path, text: str) -> None:
    """Replace `path` so that a reader sees the old or the new content, never a part."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class RunWriter:
    """The driver's side. Safe to call from several threads of one process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._events = (folder / "events.jsonl").open("a", encoding="utf-8")
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._seq = sum(1 for _ in read_lines(folder / "events.jsonl"))

    def event(self, kind: str, message: str, /, **data: Any) -> None:
        """Append one event; on disk when this returns."""
        with self._lock:
            self._seq += 1
            record = {"seq": self._seq, "time": time.time(), "kind": kind, "message": message, "data": data}
            self._events.write(json.dumps(record) + "\n")
            self._events.flush()
            os.fsync(self._events.fileno())

    def metrics(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Append the figures of one step."""
        with self._lock:
            self._metrics.write(json.dumps({"time": time.time(), "stage": stage, "step": step, "values": values}) + "\n")
            self._metrics.flush()

    def status(self, progress: Progress) -> None:
        """Publish progress; its `heartbeat` tells that the driver lives."""
        record = {"heartbeat": time.time(), "pid": os.getpid(), "progress": asdict(progress)}
        write_atomically(self.folder / "status.json", json.dumps(record))

    def result(self, result: Result) -> None:
        """Write the terminal record, once."""
        path = self.folder / "result.json"
        if path.exists():
            raise RuntimeError(f"expected one terminal record per attempt, {path} exists")
        write_atomically(path, json.dumps(asdict(result), indent=1))

    def close(self) -> None:
        """Close the files."""
        self._events.close()
        self._metrics.close()


def read_lines(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Complete JSON lines from byte `offset` on, each with the offset after it; an unfinished last line is left for later."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield json.loads(line), offset


def read_status(folder: Path) -> tuple[Progress, float] | None:
    """Progress and the time of the last heartbeat; None before the first."""
    try:
        record = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Progress(**record["progress"]), float(record["heartbeat"])


def read_result(folder: Path) -> Result | None:
    """The terminal record; None while the attempt has not ended by itself."""
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    reason = record["reason"]
    return Result(
        status=record["status"],
        reason=StatusReason(**reason) if reason else None,
        checkpoints=tuple(CheckpointRecord(**c) for c in record["checkpoints"]),
        stage_seconds=record["stage_seconds"],
    )
