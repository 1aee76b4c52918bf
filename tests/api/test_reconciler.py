"""The reconciler against a cluster that goes wrong on command; runs, database and files are real."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from api.backends.base import AppState, BackendError, Observation
from api.db import Database
from api.deployments.store import DeploymentStore
from api.jobs.store import AttemptRow, JobRow, JobStore, NewJob
from api.reconciler import MAX_SUBMITS, Reconciler, Timing
from services.rundir import CheckpointRecord, Control, Progress, Result, RunWriter, StatusReason, read_control

NEW = NewJob("n", "sft", {"type": "sft", "recovery": {"restarts": 0}}, {}, {"peak": {"cpus": 1.0, "gpus": 0}}, 60, 1)


class Bench:
    """A reconciler with everything around it; `rounds()` turns it by hand."""

    def __init__(self, cluster: Any, folder: Path) -> None:
        self.database = Database(f"sqlite:///{folder / 'db'}")
        self.database.upgrade()
        self.cluster = cluster
        self.runs = folder / "runs"
        self.jobs = JobStore(self.database)
        self.deployments = DeploymentStore(self.database)
        self.timing = Timing(0.01, 60.0, 60.0)
        self.restart()

    def restart(self) -> None:
        """As after a restart of the service: all memory is gone."""
        self.reconciler = Reconciler(self.jobs, self.deployments, self.cluster, self.cluster, self.runs, self.timing)

    def rounds(self, count: int = 1) -> None:
        async def turn() -> None:
            for _ in range(count):
                await self.reconciler.round()

        asyncio.run(turn())

    def submit(self, **changes: Any) -> JobRow:
        return self.jobs.create(replace(NEW, **changes))[0]

    def job(self, job: JobRow) -> JobRow:
        found = self.jobs.get(job.id)
        assert found is not None
        return found

    def attempt(self, job: JobRow, number: int = 1) -> AttemptRow:
        with self.database.read() as session:
            return session.get_one(AttemptRow, (job.id, number))

    def run(self, job: JobRow, number: int = 1) -> str:
        return self.attempt(job, number).run_name

    def writer(self, job: JobRow, number: int = 1) -> RunWriter:
        return RunWriter(self.runs / job.id / f"attempt-{number}")

    def started(self, **changes: Any) -> JobRow:
        """A job that runs and has shown a heartbeat."""
        job = self.submit(**changes)
        self.rounds()
        self.cluster.runs[self.run(job)] = Observation("running")
        self.writer(job).status(Progress("sft", 0, 1, "training", 1, 2))
        self.rounds()
        assert self.job(job).status == "running"
        return job

    def kinds(self, job: JobRow) -> list[str]:
        return [event.kind for event in self.jobs.events(job.id, 0, 1000)]


@pytest.fixture
def bench(cluster: Any, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(cluster, tmp_path)
    yield bench
    bench.database.close()


def test_from_queued_to_succeeded(bench: Bench) -> None:
    job = bench.started()
    writer = bench.writer(job)
    writer.event("stage_ended", "done")
    writer.result(Result("succeeded", None, (CheckpointRecord("sft", 2, "/c", "h"),), {"sft": 2.0}))
    bench.rounds()
    end = bench.job(job)
    assert (end.status, end.phase, end.stage_seconds, end.reason_code) == ("succeeded", "ended", {"sft": 2.0}, None)
    assert [c.path for c in bench.jobs.checkpoints(job.id)] == ["/c"]
    assert "stage_ended" in bench.kinds(job)
    # The driver is given time to end by itself; then its run is clean.
    bench.rounds()
    assert bench.cluster.stopped == []
    assert not bench.attempt(job).cleaned
    bench.cluster.runs[bench.run(job)] = Observation("ended")
    bench.rounds()
    assert bench.attempt(job).cleaned
    assert bench.jobs.active() == []


def test_crash_between_commit_and_submit(bench: Bench) -> None:
    job = bench.submit()
    bench.restart()
    bench.rounds(3)
    assert [run.name for run in bench.cluster.submitted] == [bench.run(job)]
    assert bench.job(job).status == "provisioning"
    assert (bench.runs / job.id / "spec.json").exists()


def test_crash_between_submit_and_record(bench: Bench) -> None:
    """The run exists, the database does not know: it is observed, not submitted twice."""
    job = bench.submit()
    bench.cluster.runs[bench.run(job)] = Observation("running")
    bench.restart()
    bench.rounds(2)
    assert bench.cluster.submitted == []
    assert bench.job(job).status == "provisioning"


def test_a_500_that_recorded_the_run(bench: Bench) -> None:
    bench.cluster.submit_error = BackendError("Ray answered 500")
    bench.cluster.record_in_spite_of_error = True
    job = bench.submit()
    bench.rounds(3)
    assert len(bench.cluster.submitted) == 1
    assert bench.job(job).status == "provisioning"


def test_a_500_that_did_not_record_is_tried_again_then_given_up(bench: Bench) -> None:
    bench.cluster.submit_error = BackendError("Ray answered 500: no space")
    job = bench.submit()
    bench.rounds(MAX_SUBMITS + 2)
    assert len(bench.cluster.submitted) == MAX_SUBMITS
    end = bench.job(job)
    assert (end.status, end.reason_code) == ("failed", "submit_failed")
    assert "no space" in (end.reason_message or "")
    assert bench.attempt(job).cleaned


def test_unreachable_ray_fails_no_job_and_loses_none(bench: Bench) -> None:
    job, waiting = bench.started(), bench.submit()
    bench.cluster.reachable = False
    bench.rounds(5)
    assert bench.job(job).status == "running"
    assert bench.job(waiting).status in ("queued", "provisioning")
    assert bench.reconciler.ray_error is not None
    bench.writer(job).event("note", "still read")
    bench.rounds()
    assert "note" in bench.kinds(job)
    bench.cluster.reachable = True
    bench.rounds(2)
    assert bench.reconciler.ray_error is None
    assert bench.job(waiting).status == "provisioning"


def test_driver_died_without_a_result(bench: Bench) -> None:
    job = bench.started()
    (bench.runs / job.id / "attempt-1" / "driver.log").write_text("a\nMemoryError: what\n")
    bench.cluster.runs[bench.run(job)] = Observation("ended", "Job entrypoint command failed with exit code -9\nrest")
    bench.rounds()
    end = bench.job(job)
    assert (end.status, end.reason_code) == ("failed", "driver_died")
    assert "exit code -9" in (end.reason_message or "")
    assert "MemoryError: what" in (end.reason_message or "")
    bench.rounds()
    assert bench.attempt(job).cleaned


def test_driver_that_never_opened_its_log_gets_what_ray_kept(bench: Bench) -> None:
    job = bench.submit()
    bench.rounds()
    bench.cluster.runs[bench.run(job)] = Observation("ended", "failed with exit code 1, logs:\nModuleNotFoundError: torch")
    bench.rounds()
    assert bench.job(job).reason_code == "driver_died"
    assert "ModuleNotFoundError: torch" in (bench.runs / job.id / "attempt-1" / "driver.log").read_text()


def test_result_written_just_before_the_end_counts(bench: Bench) -> None:
    job = bench.started()
    bench.writer(job).result(Result("failed", StatusReason("data_invalid", "expected rows")))
    bench.cluster.runs[bench.run(job)] = Observation("ended", "exit code 1")
    bench.rounds()
    end = bench.job(job)
    assert (end.status, end.reason_code, end.reason_message) == ("failed", "data_invalid", "expected rows")


def test_run_that_ray_forgot(bench: Bench) -> None:
    job = bench.started()
    bench.cluster.runs.clear()
    bench.rounds(2)
    end = bench.job(job)
    assert (end.status, end.reason_code) == ("failed", "driver_died")
    assert "Ray was restarted" in (end.reason_message or "")
    assert len(bench.cluster.submitted) == 1


def test_late_result_after_the_end_changes_nothing(bench: Bench) -> None:
    job = bench.started(deadline_s=0)
    bench.rounds()
    assert bench.job(job).reason_code == "deadline"
    writer = bench.writer(job)
    writer.event("late", "still writing")
    writer.result(Result("succeeded", None, (CheckpointRecord("sft", 2, "/c", "h"),)))
    bench.rounds(2)
    end = bench.job(job)
    assert (end.status, end.reason_code) == ("failed", "deadline")
    assert bench.jobs.checkpoints(job.id) == []
    assert bench.kinds(job)[-1] == "late"
    assert bench.cluster.stopped == [bench.run(job)]


def test_heartbeat_lost(bench: Bench) -> None:
    job = bench.started()
    bench.reconciler._timing = Timing(0.01, 0.0, 60.0)
    bench.rounds(2)
    end = bench.job(job)
    assert (end.status, end.reason_code) == ("failed", "heartbeat_lost")
    bench.rounds()
    assert bench.cluster.stopped == [bench.run(job)]


def test_a_heartbeat_that_moves_keeps_the_job(bench: Bench) -> None:
    job = bench.started()
    bench.reconciler._timing = Timing(0.01, 0.0, 60.0)
    for step in range(3):
        bench.writer(job).status(Progress("sft", 0, 1, "training", step, 2))
        bench.rounds()
    assert bench.job(job).status == "running"


def test_silence_before_the_first_heartbeat_counts_only_while_ray_says_running(bench: Bench) -> None:
    job = bench.submit()
    bench.reconciler._timing = Timing(0.01, 60.0, 0.0)
    bench.rounds(2)
    bench.cluster.reachable = False
    bench.rounds(3)
    assert bench.job(job).status == "provisioning"
    bench.cluster.reachable = True
    bench.cluster.runs[bench.run(job)] = Observation("running")
    bench.rounds(2)
    assert bench.job(job).reason_code == "heartbeat_lost"


def test_cancel_before_the_start(bench: Bench) -> None:
    job = bench.submit()
    bench.jobs.request_cancel(job.id)
    bench.rounds(2)
    end = bench.job(job)
    assert (end.status, end.reason_code) == ("cancelled", "cancelled_by_user")
    assert bench.cluster.submitted == []
    assert bench.attempt(job).cleaned


@pytest.mark.parametrize("state", ["pending", "running"])
def test_cancel_of_a_run(bench: Bench, state: Any) -> None:
    job = bench.submit()
    bench.rounds()
    bench.cluster.runs[bench.run(job)] = Observation(state)
    bench.jobs.request_cancel(job.id)
    bench.rounds(3)
    assert bench.cluster.stopped == [bench.run(job)]
    assert bench.job(job).status == "cancelling"
    bench.cluster.runs[bench.run(job)] = Observation("ended", "stopped")
    bench.rounds(2)
    assert bench.job(job).status == "cancelled"
    assert bench.attempt(job).cleaned


def test_a_failure_while_cancelling_is_a_cancellation_that_says_so(bench: Bench) -> None:
    job = bench.started()
    bench.jobs.request_cancel(job.id)
    bench.writer(job).result(Result("failed", StatusReason("worker_died", "trainer-0 ended")))
    bench.rounds()
    end = bench.job(job)
    assert (end.status, end.reason_code) == ("cancelled", "cancelled_by_user")
    assert "worker_died: trainer-0 ended" in (end.reason_message or "")


def test_one_broken_job_does_not_stop_the_others(bench: Bench) -> None:
    broken, sound = bench.started(), bench.started()
    (bench.runs / broken.id / "attempt-1" / "status.json").write_text("{")
    bench.writer(sound).result(Result("succeeded"))
    bench.rounds(3)
    assert bench.job(sound).status == "succeeded"
    assert bench.kinds(broken).count("reconciler_error") == 1


def test_a_broken_event_file_is_told_once_and_does_not_keep_the_job_alive(bench: Bench) -> None:
    job = bench.started()
    (bench.runs / job.id / "attempt-1" / "events.jsonl").write_text("{broken\n")
    bench.rounds(3)
    assert bench.kinds(job).count("events_unreadable") == 1
    bench.cluster.runs[bench.run(job)] = Observation("ended", "x")
    bench.rounds()
    assert bench.job(job).status == "failed"


def test_jobs_wait_in_order_for_what_runs(bench: Bench) -> None:
    """4 CPUs: 3 run, 2 must wait although 1 would fit; first come, first served."""
    big, next_, small = (bench.submit(resources={"peak": {"cpus": float(n), "gpus": 0}}) for n in (3, 2, 1))
    bench.rounds(3)
    assert [bench.job(j).status for j in (big, next_, small)] == ["provisioning", "queued", "queued"]
    assert bench.job(next_).phase == "waiting_for_resources"
    bench.writer(big).result(Result("succeeded"))
    bench.rounds(2)
    # The result is there, but the run still occupies its cores.
    assert bench.job(next_).status == "queued"
    bench.cluster.runs[bench.run(big)] = Observation("ended")
    bench.rounds(2)
    assert [bench.job(j).status for j in (big, next_, small)] == ["succeeded", "provisioning", "provisioning"]


def test_deployment_life(bench: Bench) -> None:
    resources = {"cpus": 0.5, "gpus": 0, "max_model_len": None, "dtype": "bf16"}
    first = bench.deployments.create("m", "/c", ("job_1", "sft"), resources)
    bench.rounds()
    (declared,) = bench.cluster.declared[-1]
    assert declared.name == first.id
    assert declared.arguments == {"model_path": "/c", "model_id": "m", "cpus": 0.5, "gpus": 0, "dtype": "bf16"}
    bench.cluster.apps[first.id] = AppState("ready")
    bench.rounds()
    second = bench.deployments.create("n", "/d", None, resources)
    bench.rounds()
    assert [app.name for app in bench.cluster.declared[-1]] == [first.id, second.id]
    bench.cluster.apps[second.id] = AppState("failed", "no memory")
    bench.rounds(2)
    assert [app.name for app in bench.cluster.declared[-1]] == [first.id]
    rows = {row.id: row for row in bench.deployments.page(10, None)}
    assert (rows[first.id].status, rows[second.id].status) == ("ready", "failed")
    assert rows[second.id].reason_message == "no memory"
    bench.deployments.request_stop(first.id)
    bench.rounds(2)
    assert bench.cluster.declared[-1] == []
    stopped = bench.deployments.get(first.id)
    assert stopped is not None
    assert stopped.status == "stopped"
    count = len(bench.cluster.declared)
    bench.rounds(3)
    assert len(bench.cluster.declared) == count


def test_serve_that_refuses(bench: Bench) -> None:
    bench.cluster.declare_error = BackendError("Ray Serve answered 400: args")
    row = bench.deployments.create("m", "/c", None, {"cpus": 1.0, "gpus": 0})
    bench.rounds()
    stored = bench.deployments.get(row.id)
    assert stored is not None
    assert (stored.status, stored.reason_code) == ("failed", "deploy_refused")


def test_apps_of_a_former_life_are_ended(bench: Bench) -> None:
    bench.cluster.apps["dep-old"] = AppState("ready")
    bench.rounds()
    assert bench.cluster.declared == [[]]


def test_a_round_survives_a_broken_database(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setattr(bench.jobs, "active", lambda: 1 / 0)
    bench.rounds(2)
    assert bench.reconciler.last_round_at is not None


def spec(**recovery: int) -> dict[str, Any]:
    return {"type": "sft", "recovery": recovery}


def dies(bench: Bench, job: JobRow, number: int, completed: int) -> None:
    """The attempt comes as far as that, then its driver is gone."""
    bench.rounds()
    bench.cluster.runs[bench.run(job, number)] = Observation("running")
    bench.writer(job, number).status(Progress("sft", 0, 1, "training", completed + 1, 9, completed=completed))
    bench.rounds()
    assert (bench.job(job).status, bench.job(job).attempt) == ("running", number)
    bench.cluster.runs[bench.run(job, number)] = Observation("ended", "exit code -9")
    bench.rounds()


def test_a_dead_driver_is_followed_by_a_new_attempt_as_often_as_the_budget_says(bench: Bench) -> None:
    job = bench.submit(spec=spec(restarts=2))
    dies(bench, job, 1, completed=3)
    assert (bench.job(job).status, bench.job(job).attempt) == ("queued", 2)
    assert bench.attempt(job).cleaned
    dies(bench, job, 2, completed=5)
    dies(bench, job, 3, completed=7)
    end = bench.job(job)
    assert (end.status, end.reason_code, end.attempt) == ("failed", "driver_died", 3)
    assert "recovery.restarts=2 are used up" in (end.reason_message or "")
    assert [run.name for run in bench.cluster.submitted] == [bench.run(job, n) for n in (1, 2, 3)]
    assert bench.kinds(job).count("attempt_started") == 2
    # The clock of the deadline has run on.
    running_s = [event.time for event in bench.jobs.events(job.id, 0, 99) if event.data.get("to") == "running"]
    assert len(running_s) == 3
    assert bench.job(job).started_at == pytest.approx(running_s[0], abs=0.1)


def test_attempts_that_come_no_further_end_the_job(bench: Bench) -> None:
    job = bench.submit(spec=spec(restarts=9, no_progress=2))
    dies(bench, job, 1, completed=3)
    dies(bench, job, 2, completed=3)
    end = bench.job(job)
    assert (end.status, end.reason_code, end.attempt) == ("failed", "driver_died", 2)
    assert "no further than step 3" in (end.reason_message or "")


def test_a_later_attempt_succeeds_and_the_job_with_it(bench: Bench) -> None:
    job = bench.submit(spec=spec())
    dies(bench, job, 1, completed=3)
    bench.rounds()
    bench.writer(job, 2).result(Result("succeeded"))
    bench.rounds()
    assert (bench.job(job).status, bench.job(job).attempt) == ("succeeded", 2)


def test_a_silent_driver_is_stopped_before_another_one_starts(bench: Bench) -> None:
    job = bench.started(spec=spec(restarts=1))
    memory = bench.reconciler._memories[bench.run(job)]
    assert memory.changed_at is not None
    memory.changed_at -= 70
    bench.rounds(3)
    assert (bench.job(job).status, bench.job(job).attempt) == ("running", 1)
    assert bench.cluster.stopped == [bench.run(job)]
    assert bench.kinds(job).count("driver_silent") == 1
    # It was only slow: what it says about its own end, which nobody wanted, is not the job's.
    bench.writer(job).result(Result("cancelled", StatusReason("cancelled", "stopped on request")))
    bench.rounds()
    assert bench.job(job).attempt == 1
    bench.cluster.runs[bench.run(job)] = Observation("ended", "stopped")
    bench.rounds()
    assert (bench.job(job).status, bench.job(job).attempt) == ("queued", 2)


def test_a_silent_driver_that_cannot_be_stopped_ends_the_job(bench: Bench) -> None:
    job = bench.started(spec=spec())
    memory = bench.reconciler._memories[bench.run(job)]
    assert memory.changed_at is not None
    memory.changed_at -= 200
    bench.rounds()
    assert (bench.job(job).status, bench.job(job).reason_code) == ("failed", "heartbeat_lost")


def test_a_cancelled_job_is_not_tried_again(bench: Bench) -> None:
    job = bench.started(spec=spec())
    bench.jobs.request_cancel(job.id)
    bench.cluster.runs[bench.run(job)] = Observation("ended", "exit code -9")
    bench.rounds()
    assert (bench.job(job).status, bench.job(job).attempt) == ("cancelled", 1)


def test_wanted_workers_reach_the_driver_and_the_one_after_it(bench: Bench) -> None:
    job = bench.started(spec=spec())
    for workers in (3, 3, 2):
        bench.jobs.resize(job.id, "sft", workers, {"peak": {"cpus": float(workers), "gpus": 0}})
    assert bench.kinds(job).count("resize_requested") == 2
    bench.rounds()
    assert read_control(bench.runs / job.id / "attempt-1") == Control(2, "sft", 2)
    assert bench.job(job).resources["peak"]["cpus"] == 2
    bench.cluster.runs[bench.run(job)] = Observation("ended", "exit code -9")
    bench.rounds(3)
    assert read_control(bench.runs / job.id / "attempt-2") == Control(2, "sft", 2)
