"""Ray's Jobs and Serve over the REST API of its dashboard.

Traps that this handles (Ray 2.60): a repeated submission id answers 500; a 500 may have recorded the run; a record deleted
right after a stop comes back as failed, so nothing is ever deleted and ids are never used twice; stop waits only 3 s before
SIGKILL unless the run's environment says otherwise.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from api.backends.base import AppState, BackendError, BackendUnreachable, Observation, RunSpec, ServedApp

STOP_GRACE_S = 20
SERVE_APPLICATION = "services.serving.app:build"
_STATES: dict[str, Any] = {
    "PENDING": "pending",
    "RUNNING": "running",
    "SUCCEEDED": "ended",
    "FAILED": "ended",
    "STOPPED": "ended",
}
_APP_STATES: dict[str, Any] = {"RUNNING": "ready", "DEPLOY_FAILED": "failed", "DELETING": "deleting"}


class RayRest:
    """Requests with the token, errors as `BackendError`."""

    def __init__(self, dashboard: str, token_path: Path | None) -> None:
        self.dashboard = dashboard.rstrip("/")
        self._token_path = token_path
        self._client = httpx.AsyncClient(base_url=self.dashboard, timeout=httpx.Timeout(20, connect=3), trust_env=False)

    async def request(self, method: str, path: str, **content: Any) -> httpx.Response:
        """One request; any status below 500 but 401 and 403 is an answer."""
        try:
            response = await self._client.request(method, path, headers=self._headers(), **content)
        except httpx.TransportError as error:
            raise BackendUnreachable(
                f"expected Ray's dashboard to answer at {self.dashboard}, got {type(error).__name__} {error}; start it with "
                "`sedsft up`, or set SEDSFT_RAY_DASHBOARD to where it runs"
            ) from error
        if response.status_code in (401, 403):
            raise BackendUnreachable(
                f"expected Ray at {self.dashboard} to accept the token in {self._token_path}, got {response.status_code}; set "
                "SEDSFT_RAY_TOKEN_PATH to the token of this cluster"
            )
        if response.status_code >= 500:
            raise BackendError(f"Ray answered {response.status_code} to {method} {path}: {response.text[-500:]}")
        return response

    def _headers(self) -> dict[str, str]:
        if self._token_path is None:
            return {}
        try:
            return {"Authorization": f"Bearer {self._token_path.read_text(encoding='ascii').strip()}"}
        except OSError as error:
            raise BackendUnreachable(
                f"expected Ray's token in {self._token_path}, got {error}; start Ray with `sedsft up`"
            ) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


class RayJobs:
    """`LaunchBackend` on a long-lived Ray cluster."""

    def __init__(self, rest: RayRest) -> None:
        self._rest = rest

    async def submit(self, run: RunSpec) -> None:
        body = {
            # Ray runs this with a shell: `exec` makes the driver itself the process that signals reach.
            "entrypoint": f"exec {shlex.quote(sys.executable)} -m services.driver {shlex.quote(str(run.folder))}",
            "submission_id": run.name,
            "metadata": {"job_id": run.job_id, "name": run.job_name, "type": run.job_type, "attempt": str(run.attempt)},
            "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S), "OMP_NUM_THREADS": "1"}},
        }
        response = await self._rest.request("POST", "/api/jobs/", json=body)
        if response.status_code != 200:
            raise BackendError(f"Ray answered {response.status_code} to the submit of {run.name}: {response.text[-500:]}")

    async def observe(self, name: str) -> Observation:
        try:
            response = await self._rest.request("GET", f"/api/jobs/{name}")
        except BackendError as error:
            return Observation("unreachable", str(error))
        if response.status_code == 404:
            return Observation("absent")
        try:
            record = response.json()
            return Observation(_STATES[record["status"]], record.get("message") or "")
        except (ValueError, KeyError, TypeError):
            return Observation("unreachable", f"Ray answered {response.status_code} to GET {name}: {response.text[:200]}")

    async def stop(self, name: str) -> None:
        await self._rest.request("POST", f"/api/jobs/{name}/stop")

    async def cluster_resources(self) -> dict[str, float]:
        try:
            response = await self._rest.request("GET", "/api/v0/nodes", params={"detail": "true", "limit": "1000"})
            nodes = [node for node in response.json()["data"]["result"]["result"] if node["state"] == "ALIVE"]
            totals = {kind: sum(node["resources_total"].get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
        except BackendUnreachable:
            raise
        except (BackendError, ValueError, KeyError, TypeError) as error:
            raise BackendUnreachable(f"expected Ray's list of nodes, got {error!r}") from error
        if not nodes:
            # So it is for some seconds after a head has started.
            raise BackendUnreachable("expected a living node in the Ray cluster, got none; wait for it or look at Ray's log")
        return totals

    def dashboard_url(self, name: str) -> str:
        return f"{self._rest.dashboard}/#/jobs/{name}"


class RayServe:
    """`ServeBackend` on the same cluster."""

    def __init__(self, rest: RayRest, port: int) -> None:
        self._rest = rest
        self._port = port

    async def observe_apps(self) -> dict[str, AppState]:
        try:
            response = await self._rest.request("GET", "/api/serve/applications/")
            apps = response.json()["applications"]
            return {
                name: AppState(_APP_STATES.get(app["status"], "deploying"), _app_message(app)) for name, app in apps.items()
            }
        except BackendUnreachable:
            raise
        except (BackendError, ValueError, KeyError, TypeError) as error:
            raise BackendUnreachable(f"expected Ray Serve's list of applications, got {error!r}") from error

    async def declare_apps(self, apps: Sequence[ServedApp]) -> None:
        if not apps:
            await self._rest.request("DELETE", "/api/serve/applications/")
            return
        body = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self._port},
            "applications": [
                {
                    "name": app.name,
                    "route_prefix": f"/{app.name}",
                    "import_path": SERVE_APPLICATION,
                    "args": app.arguments,
                    "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
                }
                for app in apps
            ],
        }
        response = await self._rest.request("PUT", "/api/serve/applications/", json=body)
        if response.status_code != 200:
            raise BackendError(f"Ray Serve answered {response.status_code}: {response.text[-1000:]}")

    def app_url(self, name: str) -> str:
        return f"http://127.0.0.1:{self._port}/{name}/v1"


def _app_message(app: dict[str, Any]) -> str:
    parts = [app.get("message") or ""]
    parts += [deployment.get("message") or "" for deployment in (app.get("deployments") or {}).values()]
    return "\n".join(part for part in parts if part)[-2000:]
