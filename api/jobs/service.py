"""What can be done with jobs: checks before anything is stored, and the files of a run as answers."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from api.backends.base import BackendUnreachable
from api.errors import ApiError, FieldProblem, not_found
from api.jobs.rollouts import RolloutQuery, rollout_page
from api.jobs.schemas import DryRun, Logs, MetricPoint, Metrics, Page, ResourcePlan, RolloutGroup, StageTable, Tables
from api.jobs.store import TERMINAL, IdempotencyConflict, JobRow, JobStore, NewJob
from services import preflight
from services.errors import RecordingInvalid
from services.jobspec import JOB_SPEC, JobSpec, RLStage, stages_of
from services.rundir import attempts_of, read_lines

ClusterResources = Callable[[], Awaitable[dict[str, float]]]


class JobService:
    """Jobs as the endpoints see them."""

    def __init__(
        self,
        store: JobStore,
        runs: Path,
        roots: Sequence[Path],
        cluster: ClusterResources,
        hub_home: Path | None = None,
        rights: preflight.RewardRights = preflight.NO_RIGHTS,
    ) -> None:
        """`hub_home`: where data sets of the Hugging Face hub are downloaded; None: they are refused. `rights`: what rewards
        may use."""
        self.store = store
        self._runs = runs
        self._roots = roots
        self._cluster = cluster
        self._hub_home = hub_home
        self._rights = rights

    # ------------------------------------------------------------------------------------------------- submit

    async def submit(self, spec: JobSpec, idempotency_key: str | None, body: bytes) -> tuple[JobRow, bool]:
        """Store a job after every check. Returns the job, and whether it is new."""
        idempotency = (idempotency_key, hashlib.sha256(body).hexdigest()) if idempotency_key is not None else None
        try:
            if idempotency and (found := await asyncio.to_thread(self.store.replayed, *idempotency)):
                return found, False
            resolved, resources, _ = await self._check(spec)
            new = NewJob(
                name=spec.name,
                type=spec.type,
                # What is written out only by default stays out: some settings exclude each other when given.
                spec=resolved.model_dump(mode="json", exclude_unset=True),
                metadata=spec.metadata,
                resources=resources.as_dict(),
                deadline_s=spec.deadline_s,
                num_stages=len(stages_of(spec)),
            )
            return await asyncio.to_thread(self.store.create, new, idempotency)
        except IdempotencyConflict as error:
            raise ApiError(
                422,
                "idempotency_key_reused",
                f"expected Idempotency-Key {idempotency_key!r} with the body it was first used with, got another body; "
                "use a new key for a new job",
            ) from error

    async def dry_run(self, spec: JobSpec) -> DryRun:
        """Every check, nothing stored."""
        resolved, resources, cluster = await self._check(spec)
        plan = ResourcePlan(**resources.as_dict())
        return DryRun(spec=resolved.model_dump(mode="json"), plan=plan, cluster=cluster)

    async def _check(self, spec: JobSpec) -> tuple[JobSpec, preflight.ResourcePlan, dict[str, float]]:
        try:
            resolved = await asyncio.to_thread(preflight.resolve, spec, self._roots, self._hub_home, self._rights)
            resources = preflight.plan(resolved)
            cluster = await self._cluster()
            preflight.check_capacity(resolved, resources, cluster)
            return resolved, resources, cluster
        except preflight.SpecError as error:
            problems = [FieldProblem(pointer=p.pointer, message=p.message) for p in error.problems]
            raise ApiError(422, "invalid_spec", str(error), problems) from error
        except BackendUnreachable as error:
            raise ApiError(503, "ray_unreachable", f"{error}. Nothing was stored: submit again then.") from error

    # ---------------------------------------------------------------------------------------------------- read

    def get(self, job_id: str) -> JobRow:
        """One job, or 404."""
        job = self.store.get(job_id)
        if job is None:
            raise not_found("job", job_id)
        return job

    def cancel(self, job_id: str) -> JobRow:
        """Ask for the end of a job; 409 when it has ended otherwise."""
        job = self.store.request_cancel(job_id)
        if job is None:
            raise not_found("job", job_id)
        if job.status in TERMINAL - {"cancelled"}:
            raise ApiError(
                409, "job_ended", f"expected a job that has not ended, got one that {job.status}; nothing was changed"
            )
        return job

    async def resize(self, job_id: str, rollout_workers: int) -> JobRow:
        """Want so many rollout workers in the RL stage that is under way.

        409 where there is none, 422 where the cluster does not hold so many. The driver follows within seconds, and so does a
        later attempt; the next stage has what the spec says of it.
        """
        job = await asyncio.to_thread(self.get, job_id)
        spec = JOB_SPEC.validate_python(job.spec)
        name = job.progress["stage"]
        if job.status != "running" or not any(isinstance(s, RLStage) and s.name == name for s in stages_of(spec)):
            where = f"one in stage {name!r}" if job.status == "running" else f"one that is {job.status}"
            raise ApiError(409, "no_rl_stage", f"expected a job whose rl stage is under way, got {where}; nothing was changed")
        resized = preflight.with_rollout_workers(spec, name, rollout_workers)
        resources = preflight.plan(resized)
        try:
            preflight.check_capacity(resized, resources, await self._cluster())
        except preflight.SpecError as error:
            problems = [FieldProblem(pointer="/rollout/workers", message=p.message) for p in error.problems]
            raise ApiError(422, "invalid_request", str(error), problems) from error
        except BackendUnreachable as error:
            raise ApiError(503, "ray_unreachable", f"{error}. Nothing was changed: ask again then.") from error
        row = await asyncio.to_thread(self.store.resize, job_id, name, rollout_workers, resources.as_dict())
        if row is None or row.status in TERMINAL:
            raise ApiError(409, "job_ended", f"expected job {job_id} to run, it has ended; nothing was changed")
        return row

    def folder(self, job: JobRow) -> Path:
        """Folder of the job's newest attempt."""
        return self._runs / job.id / f"attempt-{job.attempt}"

    def logs(self, job: JobRow, offset: int, limit_bytes: int) -> Logs:
        """Whole characters from byte `offset` on, at most `limit_bytes` of them in bytes."""
        path = self.folder(job) / "driver.log"
        data, size = b"", 0
        if path.exists():
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(offset)
                data = file.read(limit_bytes)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data, final=offset + len(data) >= size and job.status in TERMINAL)
        next_offset = offset + len(data) - len(decoder.getstate()[0])
        return Logs(text=text, offset=offset, next_offset=next_offset, ended=job.status in TERMINAL and next_offset >= size)

    def metrics(self, job: JobRow, stage: str | None, names: Sequence[str] | None, max_points: int) -> Metrics:
        """Figures of one or all stages, only `names` when given; the newest point is always among them.

        A step that was done again, by a later attempt or after a restart of its stage, has the figures of the last time.
        """
        newest: dict[tuple[str, int], dict[str, Any]] = {}
        for attempt in attempts_of(self.folder(job)):
            for record, _ in read_lines(attempt / "metrics.jsonl"):
                newest[record["stage"], record["step"]] = record
        points = []
        for record in newest.values():
            values = {key: value for key, value in record["values"].items() if names is None or key in names}
            if values and (stage is None or record["stage"] == stage):
                points.append((record, values))
        total = len(points)
        if total > max_points:
            points = [points[(index + 1) * total // max_points - 1] for index in range(max_points)]
        data = [
            MetricPoint(stage=r["stage"], step=r["step"], time=datetime.fromtimestamp(r["time"], UTC), values=v)
            for r, v in points
        ]
        return Metrics(data=data, total=total)

    def tables(self, job: JobRow) -> Tables:
        """Tables of the stages that have written one."""
        paths = sorted((self.folder(job) / "stages").glob("*/table.json"))
        return Tables(data={path.parent.name: StageTable.model_validate_json(path.read_bytes()) for path in paths})

    def rollouts(self, job: JobRow, query: RolloutQuery) -> Page[RolloutGroup]:
        """Recorded groups of the job's RL stages, those that earlier attempts left included; 500 for a damaged file."""
        try:
            return rollout_page(self.folder(job), query)
        except RecordingInvalid as error:
            raise ApiError(500, error.code, error.message) from error

    def report(self, job: JobRow) -> Path:
        """The job's report.html, or 404."""
        path = self.folder(job) / "report.html"
        if not path.exists():
            wait = "its run ended before it was written" if job.status in TERMINAL else "it is written when the job ends"
            raise ApiError(404, "no_report", f"expected a report of {job.id}, there is none: {wait}; see its events and logs")
        return path
