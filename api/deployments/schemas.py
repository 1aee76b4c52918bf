"""What the deployment routes take and answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from api.deployments.store import DeploymentRow, DeploymentStatus
from api.jobs.schemas import StatusReason
from sedsft.config import Config, Precision
from services.jobspec import Name


class CheckpointRef(Config):
    """Which checkpoint: the last one of a job's stage, or a folder."""

    job_id: Annotated[str, Field(max_length=64)] | None = None
    """Job that published it."""
    stage: Name | None = None
    """Stage of that job. May be left out when only one stage published checkpoints."""
    path: str | None = None
    """Folder of a checkpoint, with its MANIFEST.json, below one of the service's allowed roots."""

    @model_validator(mode="after")
    def _one_source(self) -> CheckpointRef:
        if (self.job_id is None) == (self.path is None):
            raise ValueError('expected exactly one of {"job_id": ..., "stage": ...} and {"path": ...}')
        if self.stage is not None and self.job_id is None:
            raise ValueError("expected job_id beside stage; name the job that published the checkpoint")
        return self


class ServingResources(Config):
    """What one deployment reserves and how it serves."""

    cpus: Annotated[float, Field(gt=0)] = 0.5
    """CPU cores of the engine, or beside each of its GPUs."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs, over which the layers are split."""
    max_model_len: Annotated[int, Field(ge=16)] | None = None
    """Longest prompt plus response in tokens. Default: the model's own limit."""
    dtype: Precision = "bf16"
    """Arithmetic."""


class DeploymentSpec(Config):
    """A checkpoint to serve over OpenAI's routes."""

    name: Name
    """Name of the model in requests; one live deployment per name."""
    checkpoint: CheckpointRef
    """What to serve. Its files are checked against its manifest first."""
    resources: ServingResources = ServingResources()
    """What it reserves."""


class Deployment(BaseModel):
    """A served checkpoint."""

    id: str
    object: Literal["deployment"] = "deployment"
    name: str
    status: DeploymentStatus = Field(description="`failed` and `stopped` never change.")
    desired_state: Literal["run", "stop"]
    status_reason: StatusReason | None
    model_path: str
    job_id: str | None
    stage: str | None
    resources: ServingResources
    url: str = Field(description="Base URL for OpenAI clients; it ends with /v1.")
    created_at: datetime
    ready_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, row: DeploymentRow, url: str) -> Deployment:
        """The answer for a stored deployment."""
        return cls(
            id=row.id,
            name=row.name,
            status=row.status,
            desired_state=row.desired_state,
            status_reason=StatusReason(code=row.reason_code, message=row.reason_message or "") if row.reason_code else None,
            model_path=row.model_path,
            job_id=row.job_id,
            stage=row.stage,
            resources=ServingResources(**row.resources),
            url=url,
            created_at=datetime.fromtimestamp(row.created_at, UTC),
            ready_at=datetime.fromtimestamp(row.ready_at, UTC) if row.ready_at else None,
            finished_at=datetime.fromtimestamp(row.finished_at, UTC) if row.finished_at else None,
        )
