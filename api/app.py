"""The FastAPI application: its parts wired together, and their life."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from api import errors
from api.auth import digest, ensure_secret
from api.backends.base import LaunchBackend, ServeBackend
from api.backends.ray_jobs import RayJobs, RayRest, RayServe
from api.db import Database
from api.deployments import endpoints as deployment_endpoints
from api.deployments.service import DeploymentService
from api.deployments.store import DeploymentStore
from api.jobs import endpoints as job_endpoints
from api.jobs.service import JobService
from api.jobs.store import JobStore
from api.reconciler import Reconciler, Timing
from api.settings import Settings
from services.preflight import RewardRights

DESCRIPTION = """
SED-SFT and GRPO as jobs on Ray: post a spec, follow its progress, deploy its checkpoints.

Send the service's key as `Authorization: Bearer <key>`. Errors are problem documents (RFC 9457) that say what was expected,
what came and what to do, with a JSON pointer per wrong field.
"""


def create_app(settings: Settings, backends: tuple[LaunchBackend, ServeBackend] | None = None) -> FastAPI:
    """The service. `backends` replaces the connection to Ray."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        rest = RayRest(settings.ray_dashboard, settings.ray_token_path)
        launch, serve = backends or (RayJobs(rest), RayServe(rest, settings.serve_port))
        with _only_one(settings.home / "api.lock"):
            database = Database(settings.database_url)
            await asyncio.to_thread(database.upgrade)
            jobs, deployments = JobStore(database), DeploymentStore(database)
            timing = Timing(settings.reconcile_period_s, settings.heartbeat_timeout_s, settings.start_timeout_s)
            reconciler = Reconciler(jobs, deployments, launch, serve, settings.runs, timing)
            app.state.key_digest = digest(ensure_secret(settings.key_path))
            app.state.reconciler = reconciler
            # Where the cluster reads and writes runs, it can read data, too.
            hub_home = settings.runs if settings.allow_hub else None
            rights = RewardRights(settings.reward_hosts, settings.allow_reward_code)
            app.state.jobs = JobService(
                jobs, settings.runs, settings.allowed_roots, reconciler.cluster_resources, hub_home, rights
            )
            app.state.deployments = DeploymentService(deployments, jobs, settings.allowed_roots, reconciler.cluster_resources)
            loop = asyncio.create_task(reconciler.run())
            try:
                yield
            finally:
                loop.cancel()
                with suppress(asyncio.CancelledError):
                    await loop
                await rest.close()
                database.close()

    app = FastAPI(title="sedsft", version=version("sedsft"), description=DESCRIPTION, lifespan=lifespan)
    errors.install(app, settings.max_body_bytes)
    app.include_router(job_endpoints.router)
    app.include_router(deployment_endpoints.router)
    _add_health(app, settings)
    _add_problem_schema(app)
    return app


def _add_health(app: FastAPI, settings: Settings) -> None:
    @app.get("/healthz", tags=["health"])
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], responses={503: {"description": "A part is missing; the body says which."}})
    async def readyz(request: Request) -> JSONResponse:
        """Jobs can be submitted and run: the loop turns and Ray answers."""
        reconciler: Reconciler = request.app.state.reconciler
        age_s = None if reconciler.last_round_at is None else time.monotonic() - reconciler.last_round_at
        turning = age_s is not None and age_s < 30 + settings.reconcile_period_s
        parts = {"reconciler": "ok" if turning else "no round in 30 s", "ray": reconciler.ray_error or "ok"}
        ready = all(state == "ok" for state in parts.values())
        return JSONResponse({"status": "ok" if ready else "unavailable", **parts}, 200 if ready else 503)


def _add_problem_schema(app: FastAPI) -> None:
    """Document problem documents, which are answered by handlers that FastAPI does not look into."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            schema = generate()
            problem = errors.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
            schema["components"]["schemas"] |= problem.pop("$defs") | {"Problem": problem}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Two services on one home would both submit its jobs."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"expected no other service on {path.parent}, one runs; stop it or set another SEDSFT_HOME"
            ) from error
        yield


def main() -> None:
    """Serve until SIGTERM."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = Settings()
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=3,
    )


if __name__ == "__main__":
    main()
