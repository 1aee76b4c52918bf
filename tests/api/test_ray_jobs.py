"""What the Ray backend makes of the answers that Ray gives, wrong ones included; a real HTTP server gives them."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from api.backends.base import BackendError, BackendUnreachable, Observation, RunSpec, ServedApp
from api.backends.ray_jobs import RayJobs, RayRest, RayServe


class Dashboard:
    """Answers every request with `status` and `body`, and keeps the requests."""

    def __init__(self) -> None:
        self.status, self.body = 200, "{}"
        self.requests: list[tuple[str, str, str | None, Any]] = []
        dashboard = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(content) if content else None
                dashboard.requests.append((self.command, self.path, self.headers.get("Authorization"), body))
                self.send_response(dashboard.status)
                self.end_headers()
                self.wfile.write(dashboard.body.encode())

            do_GET = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, *args: Any) -> None:
                return

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    dashboard = Dashboard()
    thread = threading.Thread(target=dashboard.server.serve_forever, args=(0.01,))
    thread.start()
    yield dashboard
    dashboard.server.shutdown()
    thread.join()
    dashboard.server.server_close()


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret\n")
    return path


def ask(rest: RayRest, call: Coroutine[Any, Any, Any]) -> Any:
    async def whole() -> Any:
        try:
            return await call
        finally:
            await rest.close()

    return asyncio.run(whole())


RUN = RunSpec("job-1-a1", Path("/runs/job's $(x)/attempt-1"), "job_1", "name", "sft", 1)


def test_submit_quotes_names_and_carries_no_secret(dashboard: Dashboard, token: Path) -> None:
    rest = RayRest(dashboard.url, token)
    ask(rest, RayJobs(rest).submit(RUN))
    ((method, path, authorization, body),) = dashboard.requests
    assert (method, path, authorization) == ("POST", "/api/jobs/", "Bearer secret")
    assert body["submission_id"] == "job-1-a1"
    assert body["entrypoint"].endswith(""" -m services.driver '/runs/job'"'"'s $(x)/attempt-1'""")
    assert body["entrypoint"].startswith("exec ")
    assert body["metadata"] == {"job_id": "job_1", "name": "name", "type": "sft", "attempt": "1"}
    assert body["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "20", "OMP_NUM_THREADS": "1"}
    assert "secret" not in json.dumps(body)


@pytest.mark.parametrize(
    ("status", "kind"), [(500, BackendError), (400, BackendError), (401, BackendUnreachable), (403, BackendUnreachable)]
)
def test_submit_that_is_refused(dashboard: Dashboard, token: Path, status: int, kind: type[BackendError]) -> None:
    dashboard.status, dashboard.body = status, "Job with submission_id job-1-a1 already exists"
    rest = RayRest(dashboard.url, token)
    with pytest.raises(BackendError) as caught:
        ask(rest, RayJobs(rest).submit(RUN))
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (200, '{"status": "PENDING"}', "pending"),
        (200, '{"status": "RUNNING", "message": null}', "running"),
        (200, '{"status": "SUCCEEDED"}', "ended"),
        (200, '{"status": "FAILED", "message": "exit code 1"}', "ended"),
        (200, '{"status": "STOPPED"}', "ended"),
        (404, "Job nope does not exist", "absent"),
        (500, "trouble", "unreachable"),
        (401, "no token", "unreachable"),
        (200, "<html>", "unreachable"),
        (200, '{"status": "NEW"}', "unreachable"),
        (200, "[]", "unreachable"),
    ],
)
def test_observe(dashboard: Dashboard, token: Path, status: int, body: str, state: Any) -> None:
    dashboard.status, dashboard.body = status, body
    rest = RayRest(dashboard.url, token)
    found: Observation = ask(rest, RayJobs(rest).observe("job-1-a1"))
    assert found.state == state


def test_no_dashboard_at_all(token: Path) -> None:
    rest = RayRest("http://127.0.0.1:9", token)
    with pytest.raises(BackendUnreachable, match="sedsft up"):
        ask(rest, RayJobs(rest).cluster_resources())


def test_no_token_file(dashboard: Dashboard, tmp_path: Path) -> None:
    rest = RayRest(dashboard.url, tmp_path / "none")
    with pytest.raises(BackendUnreachable, match="Ray's token"):
        ask(rest, RayJobs(rest).cluster_resources())


def node(state: str, **resources: float) -> dict[str, Any]:
    return {"state": state, "resources_total": resources}


def test_cluster_resources_are_those_of_living_nodes(dashboard: Dashboard, token: Path) -> None:
    nodes = [node("ALIVE", CPU=2.0, GPU=1.0), node("DEAD", CPU=8.0), node("ALIVE", CPU=3.0)]
    dashboard.body = json.dumps({"data": {"result": {"result": nodes}}})
    rest = RayRest(dashboard.url, token)
    assert ask(rest, RayJobs(rest).cluster_resources()) == {"CPU": 5.0, "GPU": 1.0}
    dashboard.body = json.dumps({"data": {"result": {"result": [node("DEAD", CPU=8.0)]}}})
    rest = RayRest(dashboard.url, token)
    with pytest.raises(BackendUnreachable, match="living node"):
        ask(rest, RayJobs(rest).cluster_resources())


def test_applications(dashboard: Dashboard, token: Path) -> None:
    apps = {
        "a": {"status": "RUNNING", "message": "", "deployments": {}},
        "b": {"status": "DEPLOY_FAILED", "message": "bad", "deployments": {"x": {"message": "no memory"}}},
        "c": {"status": "DEPLOYING"},
        "d": {"status": "DELETING"},
        "e": {"status": "UNHEALTHY"},
    }
    dashboard.body = json.dumps({"applications": apps})
    rest = RayRest(dashboard.url, token)
    found = ask(rest, RayServe(rest, 9000).observe_apps())
    assert {name: app.state for name, app in found.items()} == {
        "a": "ready",
        "b": "failed",
        "c": "deploying",
        "d": "deleting",
        "e": "deploying",
    }
    assert found["b"].message == "bad\nno memory"


def test_declare_sends_all_and_deletes_the_last(dashboard: Dashboard, token: Path) -> None:
    rest = RayRest(dashboard.url, token)
    serve = RayServe(rest, 9000)
    ask(rest, serve.declare_apps([ServedApp("dep-1", {"model_path": "/c"})]))
    method, path, _, body = dashboard.requests[-1]
    assert (method, path) == ("PUT", "/api/serve/applications/")
    assert body["http_options"] == {"host": "127.0.0.1", "port": 9000}
    (app,) = body["applications"]
    assert (app["name"], app["route_prefix"], app["args"]) == ("dep-1", "/dep-1", {"model_path": "/c"})
    assert app["import_path"] == "services.serving.app:build"
    rest = RayRest(dashboard.url, token)
    ask(rest, RayServe(rest, 9000).declare_apps([]))
    assert dashboard.requests[-1][:2] == ("DELETE", "/api/serve/applications/")
