"""What the job routes answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from api.jobs.store import TERMINAL, CheckpointRow, EventRow, JobRow, JobStatus

T = TypeVar("T")


def _timestamp(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class Page(BaseModel, Generic[T]):
    """Part of a list. Ask again with `after=next_cursor` while `has_more`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    next_cursor: str | None


class StatusReason(BaseModel):
    """Why a job has its status."""

    code: str = Field(description="Stable name of the cause.")
    message: str = Field(description="What was expected, what came, what to do.")


class Progress(BaseModel):
    """How far a job is: `step` of `steps` in stage number `stage_index` (from 0) of `num_stages`."""

    stage: str
    stage_index: int
    num_stages: int
    phase: str
    step: int
    steps: int


class RolloutState(BaseModel):
    """Rollout engines of the stage under way."""

    wanted: int = Field(description="As the spec or the newest PATCH says.")
    alive: int = Field(description="Whose process lives, those that are being built included.")
    ready: int = Field(description="That serve, with the current weights.")


class RolloutPatch(BaseModel):
    """What may change of the engines."""

    model_config = ConfigDict(extra="forbid")

    workers: int = Field(ge=1, le=4096, description="Engines from now on.")


class JobPatch(BaseModel):
    """What may change of a job that runs."""

    model_config = ConfigDict(extra="forbid")

    rollout: RolloutPatch


class Job(BaseModel):
    """A job."""

    id: str
    object: Literal["job"] = "job"
    name: str
    type: str
    desired_state: Literal["run", "cancel"] = Field(description="What the user wants.")
    status: JobStatus = Field(description="`succeeded`, `failed` and `cancelled` never change.")
    phase: str = Field(description="What the job does now.")
    progress: Progress
    rollout: RolloutState | None = Field(description="Null while the job has no rollout engines.")
    status_reason: StatusReason | None
    attempt: int = Field(description="Counts from 1; a driver that died is followed by another attempt.")
    metadata: dict[str, str]
    spec: dict[str, Any] = Field(description="The job as it was posted, with absolute paths.")
    plan: ResourcePlan
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    heartbeat_at: datetime | None = Field(description="Last sign of life of the driver.")
    stage_seconds: dict[str, float] = Field(description="Duration of each stage, once the job has ended.")
    dashboard_url: str = Field(description="The job on Ray's dashboard.")

    @classmethod
    def of(cls, row: JobRow, dashboard_url: str) -> Job:
        """The answer for a stored job."""
        return cls(
            id=row.id,
            name=row.name,
            type=row.type,
            desired_state=row.desired_state,
            status=row.status,
            phase=row.phase,
            progress=Progress(**row.progress),
            rollout=_rollout(row),
            status_reason=StatusReason(code=row.reason_code, message=row.reason_message or "") if row.reason_code else None,
            attempt=row.attempt,
            metadata=row.job_metadata,
            spec=row.spec,
            plan=ResourcePlan(**row.resources),
            created_at=_timestamp(row.created_at),
            started_at=_timestamp(row.started_at) if row.started_at else None,
            finished_at=_timestamp(row.finished_at) if row.finished_at else None,
            heartbeat_at=_timestamp(row.heartbeat_at) if row.heartbeat_at else None,
            stage_seconds=row.stage_seconds,
            dashboard_url=dashboard_url,
        )


def _rollout(row: JobRow) -> RolloutState | None:
    engines = row.progress.get("engines")
    if engines is None or row.status in TERMINAL:
        return None
    asked = row.resize is not None and row.resize["stage"] == row.progress["stage"]
    return RolloutState(**(engines | {"wanted": row.resize["rollout_workers"]} if row.resize and asked else engines))


class ResourcePlan(BaseModel):
    """What a job reserves. Stages run one after the other: the job needs the largest."""

    stages: list[dict[str, Any]] = Field(description="Roles of each stage with workers, CPU cores and GPUs per worker; totals.")
    peak: dict[str, float] = Field(description="`cpus` and `gpus` of the stage that needs most.")


class DryRun(BaseModel):
    """What a job would be. Nothing was stored."""

    object: Literal["job.dry_run"] = "job.dry_run"
    spec: dict[str, Any] = Field(description="The job with every default written out and absolute paths.")
    plan: ResourcePlan
    cluster: dict[str, float] = Field(description="What the connected cluster has in total.")


class Event(BaseModel):
    """Something that happened to a job. `seq` counts from 1 without gaps."""

    object: Literal["job.event"] = "job.event"
    seq: int
    time: datetime
    source: Literal["service", "driver"]
    kind: str
    message: str
    data: dict[str, Any]

    @classmethod
    def of(cls, row: EventRow) -> Event:
        """The answer for a stored event."""
        return cls(
            seq=row.seq,
            time=_timestamp(row.time),
            source=row.source,
            kind=row.kind,
            message=row.message,
            data=row.data,
        )


class Logs(BaseModel):
    """Part of the driver's log, which holds its workers' output too. To follow it, ask again with `offset=next_offset`."""

    object: Literal["job.logs"] = "job.logs"
    text: str
    offset: int = Field(description="Byte at which `text` starts.")
    next_offset: int = Field(description="Byte at which the next part starts.")
    ended: bool = Field(description="The job has ended and `text` reaches the end of the log.")


class MetricPoint(BaseModel):
    """Figures of one step."""

    stage: str
    step: int
    time: datetime
    values: dict[str, float | None] = Field(description="By name; null where the figure was not a finite number.")


class Metrics(BaseModel):
    """Figures in the order in which they were written, thinned out evenly to `max_points`."""

    object: Literal["list"] = "list"
    data: list[MetricPoint]
    total: int = Field(description="Points before thinning.")


class StageTable(BaseModel):
    """Result table of a stage."""

    columns: list[str]
    rows: list[dict[str, Any]] = Field(description="Cells by column; null where there is no figure.")


class Tables(BaseModel):
    """Result tables of a job, by the name of the stage."""

    object: Literal["job.tables"] = "job.tables"
    data: dict[str, StageTable]


class Checkpoint(BaseModel):
    """A published checkpoint: a Hugging Face model folder with a manifest of its files' hashes."""

    object: Literal["checkpoint"] = "checkpoint"
    stage: str
    step: int
    path: str
    manifest_sha256: str
    created_at: datetime

    @classmethod
    def of(cls, row: CheckpointRow) -> Checkpoint:
        """The answer for a stored checkpoint."""
        created_at = _timestamp(row.created_at)
        return cls(stage=row.stage, step=row.step, path=row.path, manifest_sha256=row.manifest_sha256, created_at=created_at)


class RolloutSample(BaseModel):
    """One response with its score."""

    response: str
    num_tokens: int
    truncated: bool = Field(description="Cut at the token limit.")
    status: str = Field(description="`scored`, `timeout`, `crashed` or `invalid`.")
    reward: float | None = Field(description="Null where the response has no score.")
    extracted: str | None = Field(description="Answer read from the response.")
    detail: str = Field(description="Why it has no score.")
    weight_version: int = Field(description="Weights that drew it.")
    seed: int = Field(description="Seed that it was drawn with.")
    response_ids: list[int] | None = Field(description="With `tokens`: its token ids.")
    log_probs: list[float | None] | None = Field(
        description="With `tokens`: log-probability of each under the sampler, in nats."
    )


class RolloutGroup(BaseModel):
    """All responses to one prompt in one iteration of an RL stage."""

    object: Literal["rollout_group"] = "rollout_group"
    stage: str
    iteration: int = Field(description="Iteration whose update used it.")
    group: int = Field(description="Place in the iteration, from 0.")
    line: int = Field(description="Row of the prompt in its data file.")
    prompt: str = Field(description="The rendered prompt.")
    answer: str = Field(description="The gold answer.")
    samples: list[RolloutSample]
