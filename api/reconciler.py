"""One loop that makes the cluster follow the database, and the database follow the cluster. It owns every call to Ray.

A job is never failed because Ray does not answer. What ends it: its driver's result; its deadline; the end or loss of its run
and a driver silent for too long, once the job's `recovery` allows no other attempt. After that the run is stopped until nothing
of it is left. A new attempt starts when the one before it is over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from api.backends.base import BackendError, BackendUnreachable, LaunchBackend, Observation, RunSpec, ServeBackend
from api.deployments.served import reserved, served_app
from api.deployments.store import DeploymentRow, DeploymentStore
from api.ids import run_name
from api.jobs.store import TERMINAL, Active, AttemptRow, JobRow, JobStatus, JobStore
from services.failure_policy import GiveUp, decide
from services.jobspec import Recovery
from services.rundir import (
    Control,
    Result,
    death_of,
    failures_before,
    read_lines,
    read_result,
    read_status,
    write_atomically,
    write_control,
)

log = logging.getLogger("sedsft.reconciler")

STOP_EVERY_S = 5.0
EXIT_GRACE_S = 10.0
MAX_SUBMITS = 5
CLUSTER_MAX_AGE_S = 10.0
LOG_LINES = 15
STOP_LIMITS = 3.0
"""Heartbeat time-outs after which a run that cannot be stopped ends its job all the same."""


@dataclass(frozen=True)
class Timing:
    """Periods and time-outs, as in the settings."""

    period_s: float
    heartbeat_timeout_s: float
    start_timeout_s: float


@dataclass
class _Memory:
    """What the loop remembers of a run between rounds; losing it costs only time."""

    heartbeat: float | None = None
    changed_at: float | None = None
    stopped_at: float = float("-inf")
    error: str = ""
    silent: bool = False
    control_seq: int = 0


class Reconciler:
    """The loop, and the cluster's totals for the endpoints."""

    def __init__(
        self,
        jobs: JobStore,
        deployments: DeploymentStore,
        launch: LaunchBackend,
        serve: ServeBackend,
        runs: Path,
        timing: Timing,
    ) -> None:
        self._jobs = jobs
        self._deployments = deployments
        self._launch = launch
        self._serve = serve
        self._runs = runs
        self._timing = timing
        self._memories: dict[str, _Memory] = {}
        self._cluster: tuple[float, dict[str, float]] | None = None
        self._serving: set[str] | None = None
        self.ray_error: str | None = "Ray was not asked yet"
        self.last_round_at: float | None = None

    # ------------------------------------------------------------------------------------------ for endpoints

    def dashboard_url(self, job_id: str, attempt: int) -> str:
        """Page of an attempt's run."""
        return self._launch.dashboard_url(run_name(job_id, attempt))

    def app_url(self, deployment_id: str) -> str:
        """Where a deployment's OpenAI routes start."""
        return self._serve.app_url(deployment_id)

    async def cluster_resources(self, max_age_s: float = 2.0) -> dict[str, float]:
        """Totals of the cluster, at most `max_age_s` old. Raises BackendUnreachable."""
        now = time.monotonic()
        if self._cluster is not None and self.ray_error is None and now - self._cluster[0] <= max_age_s:
            return self._cluster[1]
        try:
            self._cluster = now, await self._launch.cluster_resources()
        except BackendUnreachable as error:
            self._note_ray(str(error))
            raise
        self._note_ray(None)
        return self._cluster[1]

    def _note_ray(self, error: str | None) -> None:
        if (error is None) != (self.ray_error is None):
            log.warning("Ray: %s", error or "reachable")
        self.ray_error = error

    # ---------------------------------------------------------------------------------------------------- loop

    async def run(self) -> None:
        """Round after round until cancelled."""
        while True:
            await self.round()
            await asyncio.sleep(self._timing.period_s)

    async def round(self) -> None:
        """Look at every job and deployment once."""
        try:
            active = await asyncio.to_thread(self._jobs.active)
            may_start = await self._admit(active)
            await asyncio.gather(*(self._guarded(item, item.job.id in may_start) for item in active))
            await self._deployments_round()
        except BackendUnreachable as error:
            self._note_ray(str(error))
        except Exception:
            log.exception("a round of the reconciler failed")
        self.last_round_at = time.monotonic()

    async def _admit(self, active: Sequence[Active]) -> set[str]:
        """Queued jobs that fit beside what runs, first come, first served."""
        queued = [item.job for item in active if item.job.status == "queued"]
        try:
            cluster = await self.cluster_resources(2.0 if queued else CLUSTER_MAX_AGE_S)
        except BackendUnreachable:
            return set()
        if not queued:
            return set()
        peaks = [item.job.resources["peak"] for item in active if item.job.status != "queued"]
        taken = [(peak["cpus"], peak["gpus"]) for peak in peaks]
        taken += [reserved(row.resources) for row in await asyncio.to_thread(self._deployments.live)]
        free_cpus = cluster["CPU"] - sum(cpus for cpus, _ in taken)
        free_gpus = cluster["GPU"] - sum(gpus for _, gpus in taken)
        admitted: set[str] = set()
        for job in queued:
            peak = job.resources["peak"]
            if peak["cpus"] > free_cpus + 1e-6 or peak["gpus"] > free_gpus + 1e-6:
                if job.phase != "waiting_for_resources":
                    await asyncio.to_thread(self._jobs.phase, job.id, "waiting_for_resources")
                break
            free_cpus -= peak["cpus"]
            free_gpus -= peak["gpus"]
            admitted.add(job.id)
        return admitted

    async def _guarded(self, item: Active, may_start: bool) -> None:
        memory = self._memories.setdefault(item.attempt.run_name, _Memory())
        try:
            await self._job(item, memory, may_start)
        except BackendUnreachable as error:
            self._note_ray(str(error))
        except Exception as error:
            log.exception("job %s", item.job.id)
            message = f"{type(error).__name__}: {error}"
            if message != memory.error:
                memory.error = message
                await asyncio.to_thread(self._jobs.event, item.job.id, "reconciler_error", message)

    # ---------------------------------------------------------------------------------------------------- jobs

    async def _job(self, item: Active, memory: _Memory, may_start: bool) -> None:
        job, attempt = item.job, item.attempt
        folder = self._runs / job.id / f"attempt-{attempt.number}"
        # Observe first: a run that has ended wrote its result and events before.
        observation = await self._launch.observe(attempt.run_name)
        if observation.state == "unreachable":
            self._note_ray(observation.message)
        if observation.state in ("pending", "running", "ended") and not attempt.observed:
            await asyncio.to_thread(self._jobs.observed, attempt)
        await self._ingest(attempt, folder, memory)
        if job.status in TERMINAL:
            await self._clean_up(item, observation, memory)
            return
        heartbeat = await self._progress(job, folder)
        await self._control(job, folder, memory)
        result = await asyncio.to_thread(read_result, folder)
        # A driver that somebody else stopped, a node's shutdown say, has not done what is wanted of it: it counts as dead.
        if result is not None and (result.status != "cancelled" or job.desired_state == "cancel"):
            await self._finish_with(job, result)
            return
        match observation.state:
            case "ended":
                await self._dead(item, folder, observation.message)
            case "absent" if attempt.observed:
                await self._dead(item, folder, "the cluster no longer knows the run; Ray was restarted or its head died")
            case "absent" if job.desired_state == "cancel":
                await self._finish(job, "cancelled", ("cancelled_by_user", "cancelled before it started"))
            case "absent" if may_start:
                await self._submit(job, attempt, folder)
            case "pending" | "running" | "unreachable" if attempt.observed:
                await self._watch(item, observation, memory, heartbeat, folder)

    async def _submit(self, job: JobRow, attempt: AttemptRow, folder: Path) -> None:
        run = RunSpec(attempt.run_name, folder, job.id, job.name, job.type, attempt.number)
        await asyncio.to_thread(_write_spec, folder, job)
        try:
            await self._launch.submit(run)
        except BackendUnreachable:
            raise
        except BackendError as error:
            # It may have been recorded: the next round observes.
            if await asyncio.to_thread(self._jobs.submit_failed, attempt, str(error)) >= MAX_SUBMITS:
                message = f"expected Ray to accept the run, it refused {MAX_SUBMITS} times: {error}"
                await self._finish(job, "failed", ("submit_failed", message))
            return
        await asyncio.to_thread(self._jobs.observed, attempt)
        await asyncio.to_thread(self._jobs.transition, job.id, "provisioning")

    async def _watch(
        self, item: Active, observation: Observation, memory: _Memory, heartbeat: float | None, folder: Path
    ) -> None:
        """A run that lives, or of which nothing is known: cancel, deadline, heartbeat."""
        job, now = item.job, time.monotonic()
        if job.status == "queued":
            await asyncio.to_thread(self._jobs.transition, job.id, "provisioning")
        if job.desired_state == "cancel" and observation.state != "unreachable":
            await self._stop(item.attempt, memory)
        if job.started_at is not None and time.time() - job.started_at > job.deadline_s:
            message = f"expected the job to end within deadline_s={job.deadline_s} of its start, it still ran; raise deadline_s"
            await self._finish(job, "failed", ("deadline", message))
            return
        # Measured by this clock, as the time since the heartbeat last changed: the wall clock may jump.
        not_started = heartbeat is None and observation.state != "running"
        if memory.changed_at is None or heartbeat != memory.heartbeat or not_started:
            memory.heartbeat, memory.changed_at = heartbeat, now
        limit_s = self._timing.start_timeout_s if heartbeat is None else self._timing.heartbeat_timeout_s
        silent_s = now - memory.changed_at
        if silent_s > limit_s:
            message = f"expected a sign of life from the driver every {limit_s:g} s, it was silent longer; see the job's logs"
            give_up = silent_s > STOP_LIMITS * limit_s or job.desired_state == "cancel"
            if give_up or await asyncio.to_thread(self._why_not_again, job, folder) is not None:
                status: JobStatus = "cancelled" if job.desired_state == "cancel" else "failed"
                await self._finish(job, status, ("heartbeat_lost", message))
                return
            if not memory.silent:
                memory.silent = True
                await asyncio.to_thread(self._jobs.event, job.id, "driver_silent", f"{message}. Its run is stopped")
            if observation.state != "unreachable":
                await self._stop(item.attempt, memory)

    async def _clean_up(self, item: Active, observation: Observation, memory: _Memory) -> None:
        if observation.state in ("absent", "ended"):
            await asyncio.to_thread(self._jobs.cleaned, item.attempt)
            self._memories.pop(item.attempt.run_name, None)
        elif observation.state != "unreachable":
            ended_by_itself = item.job.status == "succeeded" or item.job.reason_code not in ("deadline", "heartbeat_lost")
            if not ended_by_itself or time.time() - (item.job.finished_at or 0.0) > EXIT_GRACE_S:
                await self._stop(item.attempt, memory)

    async def _stop(self, attempt: AttemptRow, memory: _Memory) -> None:
        now = time.monotonic()
        if now - memory.stopped_at >= STOP_EVERY_S:
            memory.stopped_at = now
            await self._launch.stop(attempt.run_name)

    # ------------------------------------------------------------------------------------------- run folder in

    async def _ingest(self, attempt: AttemptRow, folder: Path, memory: _Memory) -> None:
        def ingest() -> None:
            lines = list(read_lines(folder / "events.jsonl", attempt.events_offset))
            if lines:
                self._jobs.ingest(attempt, [event for event, _ in lines], lines[-1][1])

        try:
            await asyncio.to_thread(ingest)
        except (ValueError, KeyError, TypeError) as error:
            # A broken file of events must not keep the job from ending.
            message = f"expected events in {folder / 'events.jsonl'} after byte {attempt.events_offset}, got {error!r}"
            if message != memory.error:
                memory.error = message
                await asyncio.to_thread(self._jobs.event, attempt.job_id, "events_unreadable", message)

    async def _progress(self, job: JobRow, folder: Path) -> float | None:
        """Take over the driver's progress; its last heartbeat."""
        status = await asyncio.to_thread(read_status, folder)
        if status is None:
            return None
        progress, heartbeat = status
        if heartbeat != job.heartbeat_at:
            await asyncio.to_thread(self._jobs.progress, job.id, asdict(progress), heartbeat)
        return heartbeat

    async def _control(self, job: JobRow, folder: Path, memory: _Memory) -> None:
        """Pass on to the driver of the newest attempt what is wanted of a stage."""
        if job.resize is None or job.resize["seq"] == memory.control_seq or not folder.exists():
            return
        await asyncio.to_thread(write_control, folder, Control(**job.resize))
        memory.control_seq = job.resize["seq"]

    # -------------------------------------------------------------------------------------------------- ending

    async def _finish(self, job: JobRow, status: JobStatus, reason: tuple[str, str]) -> None:
        await asyncio.to_thread(self._jobs.finish, job.id, status, reason)

    async def _finish_with(self, job: JobRow, result: Result) -> None:
        reason = (result.reason.code, result.reason.message) if result.reason else None
        status: JobStatus = result.status
        if job.desired_state == "cancel" and status != "succeeded":
            detail = f"; its driver said {reason[0]}: {reason[1]}" if reason and status == "failed" else ""
            status, reason = "cancelled", ("cancelled_by_user", f"cancelled on request{detail}")
        await asyncio.to_thread(self._jobs.finish, job.id, status, reason, result.checkpoints, result.stage_seconds)

    async def _dead(self, item: Active, folder: Path, said: str) -> None:
        """The run is over and its driver left no result: a new attempt goes on, or the job ends."""
        job = item.job
        if job.desired_state == "cancel":
            await self._finish(job, "cancelled", ("cancelled_by_user", "cancelled on request"))
            return
        tail = await asyncio.to_thread(_log_tail, folder / "driver.log", said)
        head = said.partition("\n")[0][:500]
        message = f"expected the driver to leave a result, it ended without one ({head})"
        why_not = await asyncio.to_thread(self._why_not_again, job, folder)
        if why_not is None:
            await asyncio.to_thread(self._jobs.again, item.attempt, f"{message}; another attempt goes on", log=tail)
            return
        message = f"{message}. Not tried again: {why_not}; last lines of its log:\n{tail}"
        await self._finish(job, "failed", ("driver_died", message))

    def _why_not_again(self, job: JobRow, folder: Path) -> str | None:
        """Why no other attempt may follow on the death of this one; None where one may."""
        recovery = Recovery.model_validate(job.spec.get("recovery", {}))
        try:
            verdict = decide(death_of(folder), failures_before(folder), recovery)
        except (ValueError, KeyError, TypeError) as error:
            return f"what it left in {folder} cannot be read ({error!r})"
        return verdict.why if isinstance(verdict, GiveUp) else None

    # --------------------------------------------------------------------------------------------- deployments

    async def _deployments_round(self) -> None:
        live = await asyncio.to_thread(self._deployments.live)
        if not live and self._serving == set():
            return
        apps = await self._serve.observe_apps()
        wanted: list[DeploymentRow] = []
        for row in live:
            app = apps.get(row.id)
            if row.desired_state == "stop":
                if app is None:
                    await asyncio.to_thread(self._deployments.set_status, row.id, "stopped")
            elif app is not None and app.state == "failed":
                reason = ("deploy_failed", app.message or "Ray Serve could not start it and does not say why")
                await asyncio.to_thread(self._deployments.set_status, row.id, "failed", reason)
            else:
                wanted.append(row)
                if app is not None and app.state in ("ready", "deploying"):
                    await asyncio.to_thread(self._deployments.set_status, row.id, app.state)
        if {row.id for row in wanted} != {name for name, app in apps.items() if app.state != "deleting"}:
            await self._declare(wanted, set(apps))
        self._serving = set(apps)

    async def _declare(self, wanted: Sequence[DeploymentRow], present: set[str]) -> None:
        try:
            await self._serve.declare_apps([served_app(row) for row in wanted])
        except BackendUnreachable:
            raise
        except BackendError as error:
            log.exception("Ray Serve refused the deployments")
            for row in wanted:
                if row.id not in present:
                    await asyncio.to_thread(self._deployments.set_status, row.id, "failed", ("deploy_refused", str(error)))


def _write_spec(folder: Path, job: JobRow) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder.parent / "spec.json", json.dumps(job.spec, indent=1))


def _log_tail(path: Path, fallback: str) -> str:
    """Last lines of the log. A driver that died before it opened its log gets what Ray kept of its output as log."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, fallback + "\n")
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-LOG_LINES:])
