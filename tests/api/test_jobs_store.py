"""Transactions, transitions and sequences of the job store."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

import api.deployments.store  # noqa: F401 - its table belongs to the metadata that is compared
from api.db import Base, Database
from api.jobs.store import NEXT, TERMINAL, EventRow, IdempotencyConflict, JobStore, NewJob
from services.rundir import CheckpointRecord

NEW = NewJob("n", "sft", {"type": "sft"}, {}, {"peak": {"cpus": 1.0, "gpus": 0}}, 60, 1)
PATHS: dict[str, list[Any]] = {
    "queued": [],
    "provisioning": ["provisioning"],
    "running": ["provisioning", "running"],
    "cancelling": ["cancelling"],
    "succeeded": ["succeeded"],
    "failed": ["failed"],
    "cancelled": ["cancelled"],
}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(f"sqlite:///{tmp_path / 'db'}")
    database.upgrade()
    yield database
    database.close()


@pytest.fixture
def store(database: Database) -> JobStore:
    return JobStore(database)


def test_migrations_make_exactly_the_tables_of_the_stores(database: Database) -> None:
    database.upgrade()
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1


def test_job_attempt_and_event_come_together_or_not_at_all(database: Database, store: JobStore, monkeypatch: Any) -> None:
    job, created = store.create(NEW)
    assert created
    (active,) = store.active()
    assert active.attempt.run_name == job.id.replace("_", "-") + "-a1"
    assert [(e.seq, e.kind) for e in store.events(job.id, 0, 10)] == [(1, "created")]
    monkeypatch.setattr("api.jobs.store._add_event", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.create(NEW)
    assert len(store.page(10, None, None)) == 1
    assert len(store.active()) == 1


def test_events_of_no_job_are_refused_by_the_database(database: Database) -> None:
    with pytest.raises(IntegrityError), database.write() as session:
        session.add(EventRow(job_id="job_x", seq=1, time=0.0, source="service", kind="k", message="m", data={}))


@pytest.mark.parametrize(("before", "after"), list(itertools.product(NEXT, NEXT)))
def test_every_transition(store: JobStore, before: Any, after: Any) -> None:
    job, _ = store.create(NEW)
    for status in PATHS[before]:
        assert store.transition(job.id, status)
    jump = before == "queued" and after == "running"  # goes by way of provisioning
    if before in TERMINAL or before == after or (before == "cancelling" and after in ("provisioning", "running")):
        assert not store.transition(job.id, after)
        after = before
    elif after in NEXT[before] or jump:
        assert store.transition(job.id, after, ("code", "message"))
    else:
        with pytest.raises(ValueError, match=f"after {before}, got {after}"):
            store.transition(job.id, after)
        after = before
    stored = store.get(job.id)
    assert stored is not None
    assert stored.status == after
    assert (stored.finished_at is not None) == (after in TERMINAL)
    seqs = [event.seq for event in store.events(job.id, 0, 100)]
    assert seqs == list(range(1, len(seqs) + 1))


def test_a_late_end_changes_nothing_but_is_recorded(store: JobStore) -> None:
    job, _ = store.create(NEW)
    assert store.finish(job.id, "failed", ("deadline", "too long"))
    assert not store.finish(job.id, "succeeded", None, [CheckpointRecord("s", 1, "/p", "h")], {"s": 1.0})
    stored = store.get(job.id)
    assert stored is not None
    assert (stored.status, stored.reason_code, stored.stage_seconds) == ("failed", "deadline", {})
    assert store.checkpoints(job.id) == []
    assert store.events(job.id, 0, 10)[-1].kind == "late_result"


def test_cancel_of_an_ended_job_changes_nothing(store: JobStore) -> None:
    job, _ = store.create(NEW)
    store.finish(job.id, "succeeded", None)
    after = store.request_cancel(job.id)
    assert after is not None
    assert (after.status, after.desired_state) == ("succeeded", "run")
    assert store.request_cancel("job_x") is None


def test_driver_events_are_taken_once_and_sequences_have_no_gaps(store: JobStore) -> None:
    job, _ = store.create(NEW)
    attempt = store.active()[0].attempt
    events = [
        {"kind": "a", "message": "m", "data": {"x": 1}, "time": 5.0},
        {"kind": "b", "message": "m", "data": {}, "time": 6.0},
    ]
    store.ingest(attempt, events, 100)
    store.ingest(attempt, events, 100)
    store.event(job.id, "note", "own")
    store.ingest(attempt, events[:1], 150)
    rows = store.events(job.id, 0, 100)
    assert [(row.seq, row.kind, row.source) for row in rows] == [
        (1, "created", "service"),
        (2, "a", "driver"),
        (3, "b", "driver"),
        (4, "note", "service"),
        (5, "a", "driver"),
    ]
    assert store.active()[0].attempt.events_offset == 150


def test_a_checkpoint_that_the_job_removed_is_no_longer_listed(store: JobStore) -> None:
    job, _ = store.create(NEW)
    attempt = store.active()[0].attempt

    def published(step: int) -> dict[str, object]:
        data = {"stage": "sft", "step": step, "path": f"/runs/step-{step}", "manifest_sha256": "ab"}
        return {"kind": "checkpoint", "message": "m", "data": data, "time": 5.0}

    store.ingest(attempt, [published(1), published(2)], 100)
    store.ingest(attempt, [{"kind": "checkpoint_removed", "message": "m", "data": {"path": "/runs/step-1"}, "time": 6.0}], 200)
    assert [row.step for row in store.checkpoints(job.id)] == [2]


def test_idempotency_race_makes_one_job(store: JobStore) -> None:
    made: list[tuple[str, bool]] = []
    barrier = threading.Barrier(6)

    def post() -> None:
        barrier.wait()
        job, created = store.create(NEW, ("key", "hash"))
        made.append((job.id, created))

    threads = [threading.Thread(target=post) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job_id for job_id, _ in made}) == 1
    assert sum(created for _, created in made) == 1
    with pytest.raises(IdempotencyConflict):
        store.create(NEW, ("key", "other"))


def test_concurrent_writers_keep_the_sequence(store: JobStore) -> None:
    job, _ = store.create(NEW)
    threads = [threading.Thread(target=lambda: [store.event(job.id, "k", "m") for _ in range(10)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row.seq for row in store.events(job.id, 0, 100)] == list(range(1, 42))
