"""Typed client of the REST API, as the command line uses it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

Json = dict[str, Any]
ENDED = ("succeeded", "failed", "cancelled")


class ApiProblem(Exception):
    """The service refused. `problem` is its problem document; the text lists every wrong field."""

    def __init__(self, problem: Json) -> None:
        errors = problem.get("errors") or []
        listed = "".join(f"\n  {error['pointer'] or '/'}: {error['message']}" for error in errors)
        head = problem.get("detail", "") if not errors else f"{len(errors)} wrong field{'s' if len(errors) > 1 else ''}:"
        super().__init__(f"{problem.get('status')} {problem.get('code', '')}: {head}{listed}")
        self.problem = problem


class ServiceUnreachable(Exception):
    """No service answers."""


class Client:
    """One connection to the service at `url` with its key."""

    def __init__(self, url: str, key: str, timeout_s: float = 60.0) -> None:
        self._url = url
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=timeout_s, trust_env=False)

    @classmethod
    def local(cls, url: str, key_path: Path) -> Client:
        """Client of the service that runs on this machine."""
        try:
            return cls(url, key_path.read_text(encoding="ascii").strip())
        except FileNotFoundError as error:
            raise ServiceUnreachable(
                f"expected the service's key in {key_path}, there is none; start it with `sedsft up`"
            ) from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def _request(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise ServiceUnreachable(f"expected the service at {self._url}, got {error}; start it with `sedsft up`") from error
        if response.is_error:
            try:
                raise ApiProblem(response.json())
            except ValueError as error:
                raise ApiProblem({"status": response.status_code, "detail": response.text[:500]}) from error
        return response

    def _json(self, method: str, path: str, **content: Any) -> Json:
        body: Json = self._request(method, path, **content).json()
        return body

    def _pages(self, path: str, params: Json) -> Iterator[Json]:
        while True:
            page = self._json("GET", path, params=params)
            yield from page["data"]
            if not page["has_more"]:
                return
            params = params | {"after": page["next_cursor"]}

    def submit(self, spec: Json, idempotency_key: str | None = None) -> Json:
        """POST a job."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key is not None else {}
        return self._json("POST", "/v1/jobs", json=spec, headers=headers)

    def dry_run(self, spec: Json) -> Json:
        """What a job would be."""
        return self._json("POST", "/v1/jobs", json=spec, params={"dry_run": "true"})

    def jobs(self, limit: int = 20, status: str | None = None) -> list[Json]:
        """The newest jobs."""
        params = {"limit": limit} | ({"status": status} if status else {})
        jobs: list[Json] = self._json("GET", "/v1/jobs", params=params)["data"]
        return jobs

    def job(self, job_id: str) -> Json:
        """One job."""
        return self._json("GET", f"/v1/jobs/{job_id}")

    def cancel(self, job_id: str) -> Json:
        """Ask a job to end."""
        return self._json("POST", f"/v1/jobs/{job_id}/cancel")

    def resize(self, job_id: str, rollout_workers: int) -> Json:
        """Want so many rollout engines in the RL stage that is under way."""
        return self._json("PATCH", f"/v1/jobs/{job_id}", json={"rollout": {"workers": rollout_workers}})

    def events(self, job_id: str, after: int = 0) -> Iterator[Json]:
        """Events with seq > `after`."""
        return self._pages(f"/v1/jobs/{job_id}/events", {"after": after, "limit": 1000})

    def logs(self, job_id: str, offset: int = 0) -> Json:
        """Part of the log."""
        return self._json("GET", f"/v1/jobs/{job_id}/logs", params={"offset": offset})

    def metrics(self, job_id: str, stage: str | None = None, max_points: int = 1000) -> list[Json]:
        """Figures per step."""
        params = {"max_points": max_points} | ({"stage": stage} if stage else {})
        points: list[Json] = self._json("GET", f"/v1/jobs/{job_id}/metrics", params=params)["data"]
        return points

    def checkpoints(self, job_id: str) -> list[Json]:
        """Published checkpoints."""
        return list(self._pages(f"/v1/jobs/{job_id}/checkpoints", {}))

    def tables(self, job_id: str) -> Json:
        """Result tables by stage."""
        tables: Json = self._json("GET", f"/v1/jobs/{job_id}/tables")["data"]
        return tables

    def rollouts(self, job_id: str, **filters: Any) -> Iterator[Json]:
        """Recorded groups, by `stage`, `iteration`, `prompt`; with `tokens=True` ids and log-probabilities too."""
        return self._pages(f"/v1/jobs/{job_id}/rollouts", filters | {"limit": 200})

    def report(self, job_id: str) -> bytes:
        """The HTML report."""
        return self._request("GET", f"/v1/jobs/{job_id}/report").content

    def deploy(self, spec: Json) -> Json:
        """POST a deployment."""
        return self._json("POST", "/v1/deployments", json=spec)

    def deployments(self, limit: int = 20) -> list[Json]:
        """The newest deployments."""
        rows: list[Json] = self._json("GET", "/v1/deployments", params={"limit": limit})["data"]
        return rows

    def deployment(self, deployment_id: str) -> Json:
        """One deployment."""
        return self._json("GET", f"/v1/deployments/{deployment_id}")

    def undeploy(self, deployment_id: str) -> Json:
        """Ask a deployment to end."""
        return self._json("DELETE", f"/v1/deployments/{deployment_id}")
