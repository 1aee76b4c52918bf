"""Routes of jobs."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse

from api.auth import require_key
from api.errors import responses
from api.jobs.rollouts import CURSOR, MAX_GROUPS, RolloutQuery
from api.jobs.schemas import Checkpoint, DryRun, Event, Job, JobPatch, Logs, Metrics, Page, RolloutGroup, Tables
from api.jobs.service import JobService
from api.jobs.store import JobRow, JobStatus
from services.jobspec import JobSpec

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[Depends(require_key)], responses=responses(401, 422))

# A report may run its own inline script but reach nothing: neither the network nor the API's origin.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; sandbox allow-scripts"
)


def _service(request: Request) -> JobService:
    service: JobService = request.app.state.jobs
    return service


Service = Annotated[JobService, Depends(_service)]
Limit = Annotated[int, Query(ge=1, le=1000, description="Largest number of entries.")]


def _answer(request: Request, row: JobRow) -> Job:
    return Job.of(row, request.app.state.reconciler.dashboard_url(row.id, row.attempt))


@router.post(
    "",
    status_code=201,
    response_model=Job,
    responses={**responses(413, 503), 200: {"model": DryRun, "description": "With dry_run: the resolved spec and plan."}},
)
async def create_job(
    request: Request,
    spec: JobSpec,
    service: Service,
    dry_run: Annotated[bool, Query(description="Check everything and answer with the resolved spec; store nothing.")] = False,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1, max_length=255, description="A repeated POST with the same key and body answers with the first job."
        ),
    ] = None,
) -> Response:
    """Check a job and queue it.

    Paths, model folders, data rows and resources are checked first: what is refused here never started.
    """
    if dry_run:
        return JSONResponse((await service.dry_run(spec)).model_dump(mode="json"), 200)
    row, created = await service.submit(spec, idempotency_key, await request.body())
    headers = {"Location": f"/v1/jobs/{row.id}"} | ({} if created else {"Idempotency-Replayed": "true"})
    return JSONResponse(_answer(request, row).model_dump(mode="json"), 201, headers)


@router.get("")
def list_jobs(
    request: Request,
    service: Service,
    limit: Limit = 20,
    after: Annotated[str | None, Query(max_length=64, description="`next_cursor` of the page before.")] = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status.")] = None,
) -> Page[Job]:
    """Jobs, newest first."""
    rows = service.store.page(limit + 1, after, status)
    jobs = [_answer(request, row) for row in rows[:limit]]
    more = len(rows) > limit
    return Page(data=jobs, has_more=more, next_cursor=jobs[-1].id if more else None)


@router.get("/{job_id}", responses=responses(404))
def get_job(request: Request, job_id: str, service: Service) -> Job:
    """One job."""
    return _answer(request, service.get(job_id))


@router.patch("/{job_id}", status_code=202, responses=responses(404, 409, 503))
async def change_job(request: Request, job_id: str, change: JobPatch, service: Service) -> Job:
    """Change the number of rollout engines while an `rl` stage is under way; training goes on meanwhile.

    The driver follows within seconds: engines that are too many end and their prompts go to others, new ones serve once they
    are built and hold the current weights. `rollout` of the job says what is wanted and what is there.
    """
    return _answer(request, await service.resize(job_id, change.rollout.workers))


@router.post("/{job_id}/cancel", status_code=202, responses=responses(404, 409))
def cancel_job(request: Request, job_id: str, service: Service) -> Job:
    """Ask a job to end. Checkpoints published before stay."""
    return _answer(request, service.cancel(job_id))


@router.get("/{job_id}/events", responses=responses(404))
def list_events(
    job_id: str,
    service: Service,
    after: Annotated[int, Query(ge=0, description="Only events with a larger `seq`.")] = 0,
    limit: Limit = 100,
) -> Page[Event]:
    """What happened, oldest first."""
    service.get(job_id)
    rows = service.store.events(job_id, after, limit + 1)
    events = [Event.of(row) for row in rows[:limit]]
    more = len(rows) > limit
    return Page(data=events, has_more=more, next_cursor=str(events[-1].seq) if more else None)


@router.get("/{job_id}/logs", responses=responses(404))
def get_logs(
    job_id: str,
    service: Service,
    offset: Annotated[int, Query(ge=0, description="Byte to start at.")] = 0,
    limit_bytes: Annotated[int, Query(ge=16, le=4 << 20, description="Largest part in bytes.")] = 64 << 10,
) -> Logs:
    """Output of the driver and its workers."""
    return service.logs(service.get(job_id), offset, limit_bytes)


@router.get("/{job_id}/metrics", responses=responses(404))
def get_metrics(
    job_id: str,
    service: Service,
    stage: Annotated[str | None, Query(description="Only this stage.")] = None,
    names: Annotated[str | None, Query(description="Only these figures, separated by commas.")] = None,
    max_points: Annotated[int, Query(ge=1, le=10_000, description="Thin out evenly to this many points.")] = 1000,
) -> Metrics:
    """Figures per step."""
    wanted = names.split(",") if names is not None else None
    return service.metrics(service.get(job_id), stage, wanted, max_points)


@router.get("/{job_id}/tables", responses=responses(404))
def get_tables(job_id: str, service: Service) -> Tables:
    """Result tables, of evaluation stages above all."""
    return service.tables(service.get(job_id))


@router.get("/{job_id}/checkpoints", responses=responses(404))
def list_checkpoints(job_id: str, service: Service) -> Page[Checkpoint]:
    """Published checkpoints, oldest first."""
    service.get(job_id)
    rows = service.store.checkpoints(job_id)
    return Page(data=[Checkpoint.of(row) for row in rows], has_more=False, next_cursor=None)


@router.get("/{job_id}/rollouts", responses=responses(404, 500))
def list_rollouts(
    job_id: str,
    service: Service,
    stage: Annotated[str | None, Query(max_length=63, description="Only this stage.")] = None,
    iteration: Annotated[int | None, Query(ge=1, description="Only this iteration.")] = None,
    prompt: Annotated[str | None, Query(max_length=1000, description="Only prompts that contain this text.")] = None,
    tokens: Annotated[bool, Query(description="Token ids and log-probabilities too.")] = False,
    after: Annotated[str | None, Query(pattern=CURSOR, description="`next_cursor` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_GROUPS, description="Largest number of groups.")] = 20,
) -> Page[RolloutGroup]:
    """What RL stages sampled and how it was scored, a prompt at a time, oldest first."""
    query = RolloutQuery(stage, iteration, prompt, tokens, after, limit)
    return service.rollouts(service.get(job_id), query)


@router.get(
    "/{job_id}/report",
    response_class=FileResponse,
    responses={**responses(404), 200: {"content": {"text/html": {}}, "description": "The report, one self-contained file."}},
)
def get_report(job_id: str, service: Service) -> FileResponse:
    """Curves, tables and samples of the job as one HTML file."""
    path = service.report(service.get(job_id))
    headers = {"Content-Security-Policy": _REPORT_POLICY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(path, media_type="text/html; charset=utf-8", headers=headers)
