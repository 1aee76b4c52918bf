"""What can be done with deployments. Only checkpoints whose files match their manifest are served."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from api.backends.base import BackendUnreachable
from api.deployments.schemas import CheckpointRef, DeploymentSpec, ServingResources
from api.deployments.served import reserved
from api.deployments.store import DeploymentRow, DeploymentStore, NameTaken
from api.errors import ApiError, FieldProblem, not_found
from api.jobs.store import CheckpointRow, JobStore
from services import checkpoints, preflight
from services.errors import CheckpointInvalid


class DeploymentService:
    """Deployments as the endpoints see them."""

    def __init__(
        self,
        store: DeploymentStore,
        jobs: JobStore,
        roots: Sequence[Path],
        cluster: Callable[[], Awaitable[dict[str, float]]],
    ) -> None:
        self.store = store
        self._jobs = jobs
        self._roots = roots
        self._cluster = cluster

    async def create(self, spec: DeploymentSpec) -> DeploymentRow:
        """Verify the checkpoint and store the deployment."""
        path, source = await asyncio.to_thread(self._verified, spec.checkpoint)
        try:
            self._check_capacity(spec.resources, await self._cluster())
            resources = spec.resources.model_dump(mode="json")
            return await asyncio.to_thread(self.store.create, spec.name, str(path), source, resources)
        except NameTaken as error:
            detail = (
                f"expected a name that no live deployment has, got {spec.name!r}; delete that one first or choose another name"
            )
            raise ApiError(409, "name_taken", detail) from error
        except BackendUnreachable as error:
            raise ApiError(503, "ray_unreachable", f"{error}. Nothing was stored: try again then.") from error

    def get(self, deployment_id: str) -> DeploymentRow:
        """One deployment, or 404."""
        row = self.store.get(deployment_id)
        if row is None:
            raise not_found("deployment", deployment_id)
        return row

    def delete(self, deployment_id: str) -> DeploymentRow:
        """Ask for its end."""
        row = self.store.request_stop(deployment_id)
        if row is None:
            raise not_found("deployment", deployment_id)
        return row

    def _verified(self, ref: CheckpointRef) -> tuple[Path, tuple[str, str] | None]:
        """Folder of the checkpoint, and the (job id, stage) that it comes from."""
        if ref.job_id is None:
            pointer, text, recorded, source = "/checkpoint/path", ref.path or "", None, None
        else:
            pointer = "/checkpoint/stage" if ref.stage else "/checkpoint/job_id"
            row = self._published(ref.job_id, ref.stage, pointer)
            text, recorded, source = row.path, row.manifest_sha256, (row.job_id, row.stage)
        try:
            # What a job published lies in its run folder, whatever the roots are now.
            path = preflight.resolve_model(text, [Path(text)] if source else self._roots)
            checkpoints.verify(path)
            if recorded and hashlib.sha256((path / checkpoints.MANIFEST).read_bytes()).hexdigest() != recorded:
                raise CheckpointInvalid(
                    f"expected {path / checkpoints.MANIFEST} as its job recorded it, it has changed; use another"
                )
        except preflight.SpecError as error:
            raise _refused(pointer, error.problems[0].message) from error
        except CheckpointInvalid as error:
            raise _refused(pointer, error.message) from error
        return path, source

    def _published(self, job_id: str, stage: str | None, pointer: str) -> CheckpointRow:
        if self._jobs.get(job_id) is None:
            raise _refused(
                "/checkpoint/job_id", f"expected the id of a job, got {job_id!r}, which is not there; list jobs to see ids"
            )
        rows = self._jobs.checkpoints(job_id, stage)
        stages = sorted({row.stage for row in rows})
        if len(stages) != 1:
            every = sorted({row.stage for row in self._jobs.checkpoints(job_id)})
            raise _refused(
                pointer, f"expected one of the stages that published checkpoints ({', '.join(every) or 'none'}), got {stage}"
            )
        return rows[-1]

    @staticmethod
    def _check_capacity(resources: ServingResources, cluster: dict[str, float]) -> None:
        cpus, gpus = reserved(resources.model_dump())
        for kind, asked in (("CPU", cpus), ("GPU", float(gpus))):
            total = cluster.get(kind, 0.0)
            if asked > total + 1e-6:
                pointer = f"/resources/{kind.lower()}s"
                raise _refused(
                    pointer, f"expected at most the cluster's {total:g} {kind}, got {asked:g}; ask for less or add nodes"
                )


def _refused(pointer: str, message: str) -> ApiError:
    problem = FieldProblem(pointer=pointer, message=message)
    return ApiError(422, "invalid_deployment", f"{pointer}: {message}", [problem])
