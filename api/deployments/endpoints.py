"""Routes of deployments."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from api.auth import require_key
from api.deployments.schemas import Deployment, DeploymentSpec
from api.deployments.service import DeploymentService
from api.deployments.store import DeploymentRow
from api.errors import responses
from api.jobs.schemas import Page

router = APIRouter(
    prefix="/v1/deployments", tags=["deployments"], dependencies=[Depends(require_key)], responses=responses(401, 422)
)


def _service(request: Request) -> DeploymentService:
    service: DeploymentService = request.app.state.deployments
    return service


Service = Annotated[DeploymentService, Depends(_service)]


def _answer(request: Request, row: DeploymentRow) -> Deployment:
    return Deployment.of(row, request.app.state.reconciler.app_url(row.id))


@router.post("", status_code=201, responses=responses(409, 413, 503))
async def create_deployment(request: Request, response: Response, spec: DeploymentSpec, service: Service) -> Deployment:
    """Verify a checkpoint and serve it; `status` becomes `ready` when its routes answer."""
    row = await service.create(spec)
    response.headers["Location"] = f"/v1/deployments/{row.id}"
    return _answer(request, row)


@router.get("")
def list_deployments(
    request: Request,
    service: Service,
    limit: Annotated[int, Query(ge=1, le=1000, description="Largest number of entries.")] = 20,
    after: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")] = None,
) -> Page[Deployment]:
    """Deployments, newest first."""
    rows = service.store.page(limit + 1, after)
    data = [_answer(request, row) for row in rows[:limit]]
    more = len(rows) > limit
    return Page(data=data, has_more=more, next_cursor=data[-1].id if more else None)


@router.get("/{deployment_id}", responses=responses(404))
def get_deployment(request: Request, deployment_id: str, service: Service) -> Deployment:
    """One deployment."""
    return _answer(request, service.get(deployment_id))


@router.delete("/{deployment_id}", status_code=202, responses=responses(404))
def delete_deployment(request: Request, deployment_id: str, service: Service) -> Deployment:
    """Ask a deployment to end; `status` becomes `stopped` when it is gone."""
    return _answer(request, service.delete(deployment_id))
