"""Tables of jobs and every statement on them. A job, its attempt and its first event appear in one transaction."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from sqlalchemy import JSON, ForeignKey, delete, func, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from api.db import Base, Database
from api.ids import new_id, run_name
from services.rundir import CheckpointRecord, Control, Progress

JobStatus = Literal["queued", "provisioning", "running", "cancelling", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
_ENDS: frozenset[JobStatus] = TERMINAL
NEXT: dict[JobStatus, frozenset[JobStatus]] = {
    "queued": _ENDS | {"provisioning", "cancelling"},
    "provisioning": _ENDS | {"running", "cancelling", "queued"},
    "running": _ENDS | {"cancelling", "queued"},
    "cancelling": _ENDS,
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
assert set(NEXT) == set(get_args(JobStatus))


class JobRow(Base):
    """One job as the user sees it."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    type: Mapped[str]
    spec: Mapped[dict[str, Any]] = mapped_column(JSON)
    job_metadata: Mapped[dict[str, str]] = mapped_column("metadata", JSON)
    resources: Mapped[dict[str, Any]] = mapped_column(JSON)
    resize: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Fields of the newest `services.rundir.Control`; None before the first."""
    deadline_s: Mapped[int]
    desired_state: Mapped[str]
    status: Mapped[JobStatus] = mapped_column(index=True)
    phase: Mapped[str]
    progress: Mapped[dict[str, Any]] = mapped_column(JSON)
    reason_code: Mapped[str | None]
    reason_message: Mapped[str | None]
    attempt: Mapped[int]
    stage_seconds: Mapped[dict[str, float]] = mapped_column(JSON)
    heartbeat_at: Mapped[float | None]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class AttemptRow(Base):
    """One run of a job at the backend."""

    __tablename__ = "attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    run_name: Mapped[str] = mapped_column(unique=True)
    observed: Mapped[bool]
    """The backend has known the run at least once."""
    submit_errors: Mapped[int]
    events_offset: Mapped[int]
    """Bytes of the driver's events.jsonl that are in the table of events."""
    cleaned: Mapped[bool] = mapped_column(index=True)
    """Nothing of the run is left at the backend."""


class EventRow(Base):
    """Something that happened to a job; `seq` counts from 1 without gaps."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[float]
    source: Mapped[str]
    kind: Mapped[str]
    message: Mapped[str]
    data: Mapped[dict[str, Any]] = mapped_column(JSON)


class CheckpointRow(Base):
    """A checkpoint that a driver published."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    stage: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    manifest_sha256: Mapped[str]
    created_at: Mapped[float]


class IdempotencyRow(Base):
    """A used Idempotency-Key and the job it made."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    body_sha256: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    created_at: Mapped[float]


@dataclass(frozen=True)
class NewJob:
    """What a submit stores."""

    name: str
    type: str
    spec: dict[str, Any]
    metadata: dict[str, str]
    resources: dict[str, Any]
    deadline_s: int
    num_stages: int


@dataclass(frozen=True)
class Active:
    """A job that the reconciler looks after, with its newest attempt."""

    job: JobRow
    attempt: AttemptRow


class IdempotencyConflict(Exception):
    """The key was used with another body."""


class JobStore:
    """All SQL about jobs."""

    def __init__(self, database: Database) -> None:
        self._db = database

    # ------------------------------------------------------------------------------------------- users' side

    def create(self, new: NewJob, idempotency: tuple[str, str] | None = None) -> tuple[JobRow, bool]:
        """Store a job, its attempt and its first event, or find the one that the same (key, body hash) made.

        Returns: the job, and whether it is new.
        """
        with self._db.write() as session:
            if idempotency and (found := _replayed(session, *idempotency)):
                return found, False
            now = time.time()
            job = JobRow(
                id=new_id("job"),
                name=new.name,
                type=new.type,
                spec=new.spec,
                job_metadata=new.metadata,
                resources=new.resources,
                deadline_s=new.deadline_s,
                desired_state="run",
                status="queued",
                phase="queued",
                progress=asdict(Progress(num_stages=new.num_stages, phase="queued")),
                attempt=1,
                stage_seconds={},
                created_at=now,
            )
            session.add(job)
            session.flush()
            session.add(_attempt(job.id, 1))
            _add_event(session, job.id, "created", f"job {job.name} was accepted", {})
            if idempotency:
                key, body_sha256 = idempotency
                session.add(IdempotencyRow(key=key, body_sha256=body_sha256, job_id=job.id, created_at=now))
            return job, True

    def replayed(self, key: str, body_sha256: str) -> JobRow | None:
        """The job that this key made before."""
        with self._db.read() as session:
            return _replayed(session, key, body_sha256)

    def get(self, job_id: str) -> JobRow | None:
        """One job."""
        with self._db.read() as session:
            return session.get(JobRow, job_id)

    def page(self, limit: int, after: str | None, status: JobStatus | None) -> Sequence[JobRow]:
        """Up to `limit` jobs, newest first, that are older than the job `after`."""
        query = select(JobRow).order_by(JobRow.id.desc()).limit(limit)
        if after is not None:
            query = query.where(JobRow.id < after)
        if status is not None:
            query = query.where(JobRow.status == status)
        with self._db.read() as session:
            return session.scalars(query).all()

    def request_cancel(self, job_id: str) -> JobRow | None:
        """Ask for the end of a job; a job that has ended stays as it is."""
        with self._db.write() as session:
            job = session.get(JobRow, job_id)
            if job is not None and job.status not in TERMINAL and job.desired_state != "cancel":
                job.desired_state = "cancel"
                job.status = "cancelling"
                _add_event(session, job_id, "cancel_requested", "cancellation was asked for", {})
            return job

    def resize(self, job_id: str, stage: str, rollout_workers: int, resources: dict[str, Any]) -> JobRow | None:
        """Want so many rollout workers of a running stage, and reserve `resources`; a job that has ended stays as it is."""
        with self._db.write() as session:
            job = session.get(JobRow, job_id)
            if job is None or job.status in TERMINAL:
                return job
            before = Control(**job.resize) if job.resize else Control(0, "", 0)
            if (stage, rollout_workers) != (before.stage, before.rollout_workers):
                control = Control(before.seq + 1, stage, rollout_workers)
                job.resize, job.resources = asdict(control), resources
                message = f"{rollout_workers} rollout workers of {stage} were asked for"
                _add_event(session, job_id, "resize_requested", message, asdict(control))
            return job

    def events(self, job_id: str, after: int, limit: int) -> Sequence[EventRow]:
        """Events with seq > `after`, oldest first."""
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.seq > after).order_by(EventRow.seq).limit(limit)
        with self._db.read() as session:
            return session.scalars(query).all()

    def checkpoints(self, job_id: str, stage: str | None = None) -> Sequence[CheckpointRow]:
        """Published checkpoints, oldest first."""
        query = select(CheckpointRow).where(CheckpointRow.job_id == job_id)
        if stage is not None:
            query = query.where(CheckpointRow.stage == stage)
        with self._db.read() as session:
            return session.scalars(query.order_by(CheckpointRow.created_at, CheckpointRow.step)).all()

    # -------------------------------------------------------------------------------------- reconciler's side

    def active(self) -> list[Active]:
        """Jobs that have not ended or whose run is not cleaned up, oldest first."""
        query = (
            select(JobRow, AttemptRow)
            .join(AttemptRow, (AttemptRow.job_id == JobRow.id) & (AttemptRow.number == JobRow.attempt))
            .where(JobRow.status.not_in(TERMINAL) | AttemptRow.cleaned.is_(False))
            .order_by(JobRow.id)
        )
        with self._db.read() as session:
            return [Active(job, attempt) for job, attempt in session.execute(query)]

    def transition(self, job_id: str, status: JobStatus, reason: tuple[str, str] | None = None) -> bool:
        """Move a job to `status` and record it. False when the job has ended already or is there already.

        Raises:
            ValueError: no such step exists in `NEXT`.
        """
        with self._db.write() as session:
            return _transition(session, job_id, status, reason)

    def finish(
        self,
        job_id: str,
        status: JobStatus,
        reason: tuple[str, str] | None,
        checkpoints: Sequence[CheckpointRecord] = (),
        stage_seconds: Mapping[str, float] | None = None,
    ) -> bool:
        """End a job, with what its driver left. A late end of an ended job changes nothing but leaves an event."""
        with self._db.write() as session:
            if not _transition(session, job_id, status, reason):
                data = {"status": status, "reason": list(reason) if reason else None}
                _add_event(session, job_id, "late_result", f"the job had ended when its run reported {status}", data)
                return False
            for record in checkpoints:
                _add_checkpoint(session, job_id, record, time.time())
            session.get_one(JobRow, job_id).stage_seconds = dict(stage_seconds or {})
            return True

    def observed(self, attempt: AttemptRow) -> None:
        """Note that the backend knows the run."""
        with self._db.write() as session:
            session.get_one(AttemptRow, (attempt.job_id, attempt.number)).observed = True

    def cleaned(self, attempt: AttemptRow) -> None:
        """Note that nothing of the run is left."""
        with self._db.write() as session:
            session.get_one(AttemptRow, (attempt.job_id, attempt.number)).cleaned = True

    def again(self, attempt: AttemptRow, message: str, **data: Any) -> None:
        """Queue a new attempt after `attempt`, of which nothing is left; once, and only while the job has not ended."""
        with self._db.write() as session:
            job = session.get_one(JobRow, attempt.job_id)
            if job.status in TERMINAL or job.desired_state == "cancel" or job.attempt != attempt.number:
                return
            session.get_one(AttemptRow, (attempt.job_id, attempt.number)).cleaned = True
            job.attempt += 1
            session.add(_attempt(job.id, job.attempt))
            _add_event(session, job.id, "attempt_started", message, {"attempt": job.attempt, **data})
            _transition(session, job.id, "queued", None)
            job.phase, job.heartbeat_at = "queued", None

    def submit_failed(self, attempt: AttemptRow, message: str) -> int:
        """Record a failed submit; how many there were."""
        with self._db.write() as session:
            row = session.get_one(AttemptRow, (attempt.job_id, attempt.number))
            row.submit_errors += 1
            _add_event(session, attempt.job_id, "submit_error", message, {"attempt": attempt.number})
            return row.submit_errors

    def ingest(self, attempt: AttemptRow, events: Sequence[dict[str, Any]], offset: int) -> None:
        """Append the driver's events that end at byte `offset` of its file, once."""
        with self._db.write() as session:
            row = session.get_one(AttemptRow, (attempt.job_id, attempt.number))
            if offset <= row.events_offset:
                return
            row.events_offset = offset
            for event in events:
                _add_event(session, attempt.job_id, event["kind"], event["message"], event["data"], event["time"])
                if event["kind"] == "checkpoint":
                    _add_checkpoint(session, attempt.job_id, CheckpointRecord(**event["data"]), event["time"])
                elif event["kind"] == "checkpoint_removed":
                    session.execute(
                        delete(CheckpointRow).where(
                            CheckpointRow.job_id == attempt.job_id, CheckpointRow.path == event["data"]["path"]
                        )
                    )

    def progress(self, job_id: str, progress: dict[str, Any], heartbeat_at: float) -> None:
        """Store the driver's progress; the job runs from the first one on."""
        with self._db.write() as session:
            job = session.get_one(JobRow, job_id)
            if job.status in TERMINAL:
                return
            job.progress, job.phase, job.heartbeat_at = progress, progress["phase"], heartbeat_at
            if job.status in ("queued", "provisioning"):
                _transition(session, job_id, "running", None)

    def phase(self, job_id: str, phase: str) -> None:
        """Say what a job waits for before it runs."""
        with self._db.write() as session:
            session.get_one(JobRow, job_id).phase = phase

    def event(self, job_id: str, kind: str, message: str, **data: Any) -> None:
        """Append an event of the service's own."""
        with self._db.write() as session:
            _add_event(session, job_id, kind, message, data)


def _add_checkpoint(session: Session, job_id: str, record: CheckpointRecord, created_at: float) -> None:
    """Add a checkpoint that is not known yet: each comes with its event and once more with the terminal record."""
    if session.get(CheckpointRow, (job_id, record.stage, record.step)) is None:
        session.add(CheckpointRow(job_id=job_id, created_at=created_at, **asdict(record)))


def _attempt(job_id: str, number: int) -> AttemptRow:
    counts = {"observed": False, "submit_errors": 0, "events_offset": 0, "cleaned": False}
    return AttemptRow(job_id=job_id, number=number, run_name=run_name(job_id, number), **counts)


def _replayed(session: Session, key: str, body_sha256: str) -> JobRow | None:
    row = session.get(IdempotencyRow, key)
    if row is None:
        return None
    if row.body_sha256 != body_sha256:
        raise IdempotencyConflict(key)
    return session.get_one(JobRow, row.job_id)


def _transition(session: Session, job_id: str, status: JobStatus, reason: tuple[str, str] | None) -> bool:
    job = session.get_one(JobRow, job_id)
    if job.status == status or job.status in TERMINAL:
        return False
    if job.status == "cancelling" and status in ("provisioning", "running"):
        return False
    if status == "running" and job.status == "queued":
        _transition(session, job_id, "provisioning", None)
    if status not in NEXT[job.status]:
        raise ValueError(f"expected one of {sorted(NEXT[job.status])} after {job.status}, got {status}")
    now = time.time()
    before, job.status = job.status, status
    if status == "running" and job.started_at is None:
        job.started_at = now
    if status in TERMINAL:
        job.finished_at, job.phase = now, "ended"
    if reason:
        job.reason_code, job.reason_message = reason
    message = f"{before} -> {status}" + (f": {reason[0]}: {reason[1]}" if reason else "")
    _add_event(session, job_id, "status", message, {"from": before, "to": status, "code": reason[0] if reason else None})
    return True


def _add_event(
    session: Session, job_id: str, kind: str, message: str, data: Mapping[str, Any], driver_time: float | None = None
) -> None:
    """Append an event: the driver's with the time it had there, else one of the service's own."""
    session.flush()
    last = session.scalar(select(func.max(EventRow.seq)).where(EventRow.job_id == job_id)) or 0
    source, at = ("service", time.time()) if driver_time is None else ("driver", driver_time)
    row = EventRow(job_id=job_id, seq=last + 1, time=at, source=source, kind=kind, message=message, data=dict(data))
    session.add(row)
