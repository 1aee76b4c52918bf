"""Job routes: anonymous, valid, invalid, conflict, foreign id."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.backends.base import Observation
from api.settings import Settings
from services.rundir import CheckpointRecord, Control, Progress, Result, RunWriter, StatusReason, read_control

Json = dict[str, Any]


def wait_for(client: TestClient, job_id: str, *statuses: str) -> Json:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        job: Json = client.get(f"/v1/jobs/{job_id}").json()
        if job["status"] in statuses:
            return job
        time.sleep(0.02)
    raise AssertionError(f"expected {statuses}, got {job['status']}: {job['status_reason']}")


def wait_for_readiness(client: TestClient, status: int) -> None:
    deadline = time.monotonic() + 10
    while client.get("/readyz").status_code != status:
        assert time.monotonic() < deadline, client.get("/readyz").json()
        time.sleep(0.02)


def problem(response: Any, status: int, code: str) -> Json:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/problem+json")
    body: Json = response.json()
    assert body["status"] == status
    assert body["code"] == code
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["detail"]
    return body


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/jobs"),
        ("GET", "/v1/jobs"),
        ("GET", "/v1/jobs/x"),
        ("PATCH", "/v1/jobs/x"),
        ("POST", "/v1/jobs/x/cancel"),
        ("GET", "/v1/jobs/x/events"),
        ("GET", "/v1/jobs/x/logs"),
        ("GET", "/v1/jobs/x/metrics"),
        ("GET", "/v1/jobs/x/checkpoints"),
        ("GET", "/v1/jobs/x/tables"),
        ("GET", "/v1/jobs/x/rollouts"),
        ("GET", "/v1/jobs/x/report"),
        ("POST", "/v1/deployments"),
        ("GET", "/v1/deployments"),
        ("GET", "/v1/deployments/x"),
        ("DELETE", "/v1/deployments/x"),
    ],
)
def test_every_route_needs_the_key(anonymous: TestClient, method: str, path: str) -> None:
    problem(anonymous.request(method, path), 401, "unauthorized")
    wrong = anonymous.request(method, path, headers={"Authorization": "Bearer " + "0" * 64})
    assert problem(wrong, 401, "unauthorized")["detail"].count("another key") == 1
    assert wrong.headers["www-authenticate"] == "Bearer"


def test_all_v1_routes_are_in_the_list_above(anonymous: TestClient) -> None:
    paths = anonymous.get("/openapi.json").json()["paths"]
    assert sum(len(methods) for path, methods in paths.items() if path.startswith("/v1/")) == 16
    assert {path for path in paths if not path.startswith("/v1/")} == {"/healthz", "/readyz"}


def test_health_is_open(anonymous: TestClient) -> None:
    assert anonymous.get("/healthz").json() == {"status": "ok"}


def test_submit_stores_a_queued_job_with_absolute_paths(client: TestClient, sft_job: Json, root: Any) -> None:
    response = client.post("/v1/jobs", json=sft_job)
    assert response.status_code == 201, response.text
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["id"].startswith("job_")
    assert len(job["id"]) == 30
    assert job["id"] == job["id"].lower()
    assert (job["status"], job["desired_state"], job["attempt"], job["object"]) == ("queued", "run", 1, "job")
    assert job["spec"]["model"]["path"] == str(root / "model")
    assert job["spec"]["sft"]["data"] == {"path": str(root / "sft.jsonl")}
    assert job["plan"]["peak"] == {"cpus": 1.0, "gpus": 0}
    assert job["dashboard_url"] == f"http://dashboard/{job['id'].replace('_', '-')}-a1"


def test_dry_run_writes_out_defaults_and_stores_nothing(client: TestClient, pipeline_job: Json) -> None:
    response = client.post("/v1/jobs?dry_run=true", json=pipeline_job)
    assert response.status_code == 200, response.text
    body = response.json()
    assert body["spec"]["stages"][1]["grpo"]["clip_high"] == 0.28
    assert [(s["stage"], s["cpus"], s["gpus"]) for s in body["plan"]["stages"]] == [
        ("sft", 2, 0),
        ("rl", 3, 0),
        ("eval", 2.1, 0),
    ]
    assert body["plan"]["peak"] == {"cpus": 3.0, "gpus": 0}
    assert body["cluster"] == {"CPU": 4.0, "GPU": 0.0}
    assert client.get("/v1/jobs").json()["data"] == []


def test_wrong_fields_are_named_by_pointer(client: TestClient, pipeline_job: Json) -> None:
    pipeline_job["stages"][0]["sft"]["objective"]["weight"] = -1
    pipeline_job["stages"][0]["sft"]["batchsize"] = 3
    pipeline_job["stages"][2]["eval"]["benchmarks"][0]["max_rows"] = 0
    del pipeline_job["stages"][1]["grpo"]["iterations"]
    body = problem(client.post("/v1/jobs", json=pipeline_job), 422, "invalid_request")
    errors = {error["pointer"]: error["message"] for error in body["errors"]}
    assert set(errors) == {
        "/stages/0/sft/objective/weight",
        "/stages/0/sft/batchsize",
        "/stages/1/grpo/iterations",
        "/stages/2/eval/benchmarks/0/max_rows",
    }
    assert errors["/stages/0/sft/objective/weight"] == "Input should be greater than or equal to 0, got -1"


def test_pointer_of_a_single_stage_job_keeps_the_field_that_is_called_like_the_type(client: TestClient, sft_job: Json) -> None:
    sft_job["sft"]["steps"] = "many"
    body = problem(client.post("/v1/jobs", json=sft_job), 422, "invalid_request")
    assert [error["pointer"] for error in body["errors"]] == ["/sft/steps"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"type": "sft"',
        b'{"type": "gan"}',
        b'"sft"',
        b"\xff\xfe",
        b'{"type": {"a": 1}}',
        b"[" * 5000,
    ],
)
def test_a_body_that_is_no_job_is_a_problem(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert response.json()["request_id"]


def test_text_that_cannot_be_stored_is_refused(client: TestClient, sft_job: Json) -> None:
    body = json.dumps(sft_job | {"metadata": {"note": "x"}}).replace('"x"', r'"\ud800"')
    problem(client.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"}), 422, "invalid_request")


def test_body_over_the_limit(client: TestClient, sft_job: Json) -> None:
    sft_job["metadata"] = {"note": "x" * 30_000}
    problem(client.post("/v1/jobs", json=sft_job), 413, "body_too_large")
    chunks = (b"x" * 1000 for _ in range(30))
    problem(client.post("/v1/jobs", content=chunks), 413, "body_too_large")


def test_content_problems_have_pointers(client: TestClient, pipeline_job: Json) -> None:
    pipeline_job["stages"][1]["grpo"]["data"]["path"] = "missing.jsonl"
    body = problem(client.post("/v1/jobs", json=pipeline_job), 422, "invalid_spec")
    assert [error["pointer"] for error in body["errors"]] == ["/stages/1/grpo/data/path"]
    assert "missing.jsonl" in body["detail"]


def test_more_than_the_cluster_has_is_refused_with_the_numbers(client: TestClient, pipeline_job: Json) -> None:
    pipeline_job["stages"][0]["trainer"] = {"workers": 8, "gpus_per_worker": 1}
    body = problem(client.post("/v1/jobs", json=pipeline_job), 422, "invalid_spec")
    assert [error["pointer"] for error in body["errors"]] == ["/stages/0", "/stages/0"]
    assert "4 CPU in stage 'sft', got 8 (8 trainer x 1)" in body["detail"]
    assert "0 GPU in stage 'sft', got 8 (8 trainer x 1)" in body["detail"]


def test_unreachable_ray_is_503_and_nothing_is_stored(client: TestClient, sft_job: Json, cluster: Any) -> None:
    cluster.reachable = False
    wait_for_readiness(client, 503)
    body = problem(client.post("/v1/jobs", json=sft_job), 503, "ray_unreachable")
    assert "start it" in body["detail"]
    assert client.get("/v1/jobs").json()["data"] == []
    assert "expected Ray to answer" in client.get("/readyz").json()["ray"]
    cluster.reachable = True
    wait_for_readiness(client, 200)
    assert client.get("/readyz").json() == {"status": "ok", "reconciler": "ok", "ray": "ok"}


def test_idempotency_key(client: TestClient, sft_job: Json) -> None:
    headers = {"Idempotency-Key": "k1"}
    first = client.post("/v1/jobs", json=sft_job, headers=headers)
    again = client.post("/v1/jobs", json=sft_job, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json()["id"] == again.json()["id"]
    assert again.headers["idempotency-replayed"] == "true"
    other = client.post("/v1/jobs", json=sft_job | {"name": "other"}, headers=headers)
    problem(other, 422, "idempotency_key_reused")
    assert len(client.get("/v1/jobs").json()["data"]) == 1


def test_paging_newest_first(client: TestClient, sft_job: Json) -> None:
    sft_job["trainer"] = {"cpus_per_worker": 3}  # one fits into the 4 CPUs, the others wait
    made = []
    for _ in range(5):
        made.append(client.post("/v1/jobs", json=sft_job).json()["id"])
        time.sleep(0.002)
    seen, after = [], None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2} | ({"after": after} if after else {})).json()
        seen += [job["id"] for job in page["data"]]
        after = page["next_cursor"]
        if not page["has_more"]:
            break
    assert seen == made[::-1]
    assert after is None
    wait_for(client, made[0], "provisioning")
    assert [job["id"] for job in client.get("/v1/jobs?status=queued").json()["data"]] == made[:0:-1]
    problem(client.get("/v1/jobs?status=lost"), 422, "invalid_request")
    body = problem(client.get("/v1/jobs?limit=0"), 422, "invalid_request")
    assert body["errors"][0]["pointer"] == "?limit"


@pytest.mark.parametrize("path", ["", "/events", "/logs", "/metrics", "/tables", "/rollouts", "/checkpoints", "/report"])
def test_foreign_ids_are_404(client: TestClient, path: str) -> None:
    for job_id in ("job_01k3aaaaaaaaaaaaaaaaaaaaaa", "..%2F..%2Fetc", "%00"):
        problem(client.get(f"/v1/jobs/{job_id}{path}"), 404, "not_found")


def test_unknown_route_and_method(client: TestClient) -> None:
    problem(client.get("/v1/nothing"), 404, "not_found")
    problem(client.put("/v1/jobs"), 405, "method_not_allowed")


def test_a_whole_life(client: TestClient, sft_job: Json, cluster: Any, settings: Settings) -> None:
    """What the driver leaves in its folder arrives at the routes."""
    job_id = client.post("/v1/jobs", json=sft_job).json()["id"]
    wait_for(client, job_id, "provisioning")
    problem(client.get(f"/v1/jobs/{job_id}/report"), 404, "no_report")
    run = cluster.submitted[0]
    assert run.folder == settings.runs / job_id / "attempt-1"
    spec = json.loads((run.folder.parent / "spec.json").read_text())
    assert spec == client.get(f"/v1/jobs/{job_id}").json()["spec"]

    writer = RunWriter(run.folder)
    writer.status(Progress("sft", 0, 1, "training", 1, 2))
    writer.event("stage_started", "stage sft started", stage="sft", figure=float("nan"))
    for step in range(1, 11):
        writer.metrics("sft", step, {"loss": 1.0 / step, "lr": float("nan")})
    (run.folder / "driver.log").write_bytes("erster Schritt für Ü\n".encode())
    job = wait_for(client, job_id, "running")
    assert job["progress"] == {"stage": "sft", "stage_index": 0, "num_stages": 1, "phase": "training", "step": 1, "steps": 2}
    assert job["phase"] == "training"
    assert job["heartbeat_at"].endswith("Z")

    logs = client.get(f"/v1/jobs/{job_id}/logs", params={"limit_bytes": 17}).json()
    assert (logs["text"], logs["next_offset"], logs["ended"]) == ("erster Schritt f", 16, False)
    logs = client.get(f"/v1/jobs/{job_id}/logs", params={"offset": 16}).json()
    assert (logs["text"], logs["ended"]) == ("ür Ü\n", False)

    metrics = client.get(f"/v1/jobs/{job_id}/metrics", params={"max_points": 3}).json()
    assert metrics["total"] == 10
    assert [point["step"] for point in metrics["data"]] == [3, 6, 10]
    assert metrics["data"][2]["values"] == {"loss": 0.1, "lr": None}
    only = client.get(f"/v1/jobs/{job_id}/metrics", params={"names": "loss", "stage": "sft"}).json()
    assert only["data"][0]["values"] == {"loss": 1.0}
    assert client.get(f"/v1/jobs/{job_id}/metrics", params={"stage": "other"}).json()["data"] == []

    (run.folder / "stages" / "eval").mkdir(parents=True)
    table = {"columns": ["model", "avg"], "rows": [{"model": "base", "avg": 0.25}]}
    (run.folder / "stages" / "eval" / "table.json").write_text(json.dumps(table))
    assert client.get(f"/v1/jobs/{job_id}/tables").json()["data"] == {"eval": table}
    (run.folder / "report.html").write_text("<html>r</html>")
    writer.result(Result("succeeded", None, (CheckpointRecord("sft", 2, "/c/step-2", "ab"),), {"sft": 1.5}))
    job = wait_for(client, job_id, "succeeded")
    assert job["stage_seconds"] == {"sft": 1.5}
    assert job["finished_at"]
    checkpoint = client.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"][0]
    assert (checkpoint["stage"], checkpoint["step"], checkpoint["path"]) == ("sft", 2, "/c/step-2")
    report = client.get(f"/v1/jobs/{job_id}/report")
    assert report.text == "<html>r</html>"
    assert "sandbox" in report.headers["content-security-policy"]
    assert client.get(f"/v1/jobs/{job_id}/logs").json()["ended"] is True

    events = client.get(f"/v1/jobs/{job_id}/events").json()["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [(e["source"], e["kind"]) for e in events if e["source"] == "driver"] == [("driver", "stage_started")]
    assert next(e["data"] for e in events if e["source"] == "driver") == {"stage": "sft", "figure": None}
    page = client.get(f"/v1/jobs/{job_id}/events?limit=2").json()
    assert (page["next_cursor"], page["has_more"]) == ("2", True)
    assert client.get(f"/v1/jobs/{job_id}/events?after=2").json()["data"] == events[2:]
    problem(client.post(f"/v1/jobs/{job_id}/cancel"), 409, "job_ended")
    writer.close()


def test_cancel(client: TestClient, sft_job: Json, cluster: Any) -> None:
    job_id = client.post("/v1/jobs", json=sft_job).json()["id"]
    wait_for(client, job_id, "provisioning")
    response = client.post(f"/v1/jobs/{job_id}/cancel")
    assert response.status_code == 202
    assert (response.json()["status"], response.json()["desired_state"]) == ("cancelling", "cancel")
    assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    deadline = time.monotonic() + 5
    while not cluster.stopped and time.monotonic() < deadline:
        time.sleep(0.02)
    writer = RunWriter(cluster.submitted[0].folder)
    writer.result(Result("cancelled", StatusReason("cancelled", "stopped on request")))
    writer.close()
    job = wait_for(client, job_id, "cancelled")
    assert job["status_reason"] == {"code": "cancelled_by_user", "message": "cancelled on request"}
    assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
    problem(client.post("/v1/jobs/job_x/cancel"), 404, "not_found")


def workers(count: Any) -> Json:
    return {"rollout": {"workers": count}}


def test_engines_are_added_and_removed_while_rl_is_under_way(client: TestClient, pipeline_job: Json, cluster: Any) -> None:
    """The rl stage has a trainer, an engine and a scorer of a core each; the cluster has 4 cores."""
    url = "/v1/jobs/" + client.post("/v1/jobs", json=pipeline_job).json()["id"]
    problem(client.patch(url, json=workers(2)), 409, "no_rl_stage")
    wait_for(client, url.rpartition("/")[2], "provisioning")
    writer = RunWriter(cluster.submitted[0].folder)
    writer.status(Progress("sft", 0, 3, "training", 1, 2))
    assert wait_for(client, url.rpartition("/")[2], "running")["rollout"] is None
    assert "stage 'sft'" in problem(client.patch(url, json=workers(2)), 409, "no_rl_stage")["detail"]

    counts = {"wanted": 1, "alive": 1, "ready": 1}
    deadline = time.monotonic() + 5
    while client.get(url).json()["rollout"] != counts:
        writer.status(Progress("rl", 1, 3, "rollout", 1, 2, engines=counts))
        assert time.monotonic() < deadline
        time.sleep(0.02)
    changed = client.patch(url, json=workers(2))
    assert changed.status_code == 202
    assert changed.json()["rollout"] == {"wanted": 2, "alive": 1, "ready": 1}
    assert changed.json()["plan"]["peak"] == {"cpus": 4.0, "gpus": 0}
    assert changed.json()["spec"]["stages"][1] == client.get(url).json()["spec"]["stages"][1]
    # Asked again, nothing more is wanted.
    assert client.patch(url, json=workers(2)).status_code == 202
    while read_control(writer.folder) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert read_control(writer.folder) == Control(1, "rl", 2)
    assert [e["kind"] for e in client.get(url + "/events").json()["data"]].count("resize_requested") == 1

    [error] = problem(client.patch(url, json=workers(3)), 422, "invalid_request")["errors"]
    assert error["pointer"] == "/rollout/workers"
    assert "expected at most the cluster's 4 CPU" in error["message"]
    for body in (
        workers(0),
        workers(-1),
        workers("many"),
        workers(1.5),
        {},
        {"rollout": {}},
        {"rollout": {"cpus": 1}},
        {"x": 1},
    ):
        problem(client.patch(url, json=body), 422, "invalid_request")
    assert client.get(url).json()["rollout"]["wanted"] == 2
    cluster.reachable = False
    deadline = time.monotonic() + 5
    while client.patch(url, json=workers(1)).status_code != 503:
        assert time.monotonic() < deadline
    cluster.reachable = True

    writer.result(Result("succeeded"))
    ended = wait_for(client, url.rpartition("/")[2], "succeeded")
    assert ended["rollout"] is None
    problem(client.patch(url, json=workers(1)), 409, "no_rl_stage")
    problem(client.patch("/v1/jobs/job_x", json=workers(1)), 404, "not_found")
    writer.close()


def test_a_step_that_was_done_again_has_the_figures_of_the_last_time(client: TestClient, sft_job: Json, cluster: Any) -> None:
    """The driver of the first attempt dies behind step 3, the second goes on from the checkpoint of step 1."""
    job_id = client.post("/v1/jobs", json=sft_job).json()["id"]
    wait_for(client, job_id, "provisioning")
    for number, steps, loss in ((1, (1, 2, 3), 1.0), (2, (2, 3, 4), 0.5)):
        deadline = time.monotonic() + 5
        while len(cluster.submitted) < number:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        writer = RunWriter(cluster.submitted[-1].folder)
        for step in steps:
            writer.metrics("sft", step, {"loss": loss})
        writer.close()
        cluster.runs[cluster.submitted[-1].name] = Observation("ended", "exit code -9")
    job = client.get(f"/v1/jobs/{job_id}").json()
    assert job["attempt"] >= 2
    points = client.get(f"/v1/jobs/{job_id}/metrics").json()["data"]
    assert [(point["step"], point["values"]["loss"]) for point in points] == [(1, 1.0), (2, 0.5), (3, 0.5), (4, 0.5)]


def test_openapi_documents_fields_and_problems(anonymous: TestClient) -> None:
    schema = anonymous.get("/openapi.json").json()
    assert (
        "the weight of the diversity term"
        in schema["components"]["schemas"]["SEDObjective"]["properties"]["weight"]["description"]
    )
    assert "application/problem+json" in schema["paths"]["/v1/jobs"]["post"]["responses"]["413"]["content"]
    assert "pointer" in schema["components"]["schemas"]["FieldProblem"]["properties"]
