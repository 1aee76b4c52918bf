"""Deployment routes: only verified checkpoints are served."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.backends.base import AppState
from api.settings import Settings
from services.checkpoints import CheckpointInfo, begin, describe, publish
from services.rundir import CheckpointRecord, Result, RunWriter

Json = dict[str, Any]


def publish_checkpoint(model: Path, root: Path) -> CheckpointRecord:
    folder = begin(root, 2, 1)
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    files = [describe(folder, file.name) for file in model.iterdir()]
    return publish(folder, files, CheckpointInfo("sft", 2, "0", 4))


@pytest.fixture
def job_id(client: TestClient, sft_job: Json, cluster: Any, settings: Settings, root: Path) -> str:
    """A job that has published one checkpoint."""
    job_id: str = client.post("/v1/jobs", json=sft_job).json()["id"]
    deadline = time.monotonic() + 10
    while not cluster.submitted and time.monotonic() < deadline:
        time.sleep(0.02)
    folder = cluster.submitted[0].folder
    record = publish_checkpoint(root / "model", folder / "stages" / "sft" / "checkpoints")
    writer = RunWriter(folder)
    writer.result(Result("succeeded", None, (record,)))
    writer.close()
    while client.get(f"/v1/jobs/{job_id}").json()["status"] != "succeeded" and time.monotonic() < deadline:
        time.sleep(0.02)
    return job_id


def refused(response: Any, pointer: str) -> str:
    assert response.status_code == 422, response.text
    (error,) = response.json()["errors"]
    assert error["pointer"] == pointer
    return str(error["message"])


def status_of(client: TestClient, deployment_id: str, wanted: str) -> Json:
    deadline = time.monotonic() + 10
    while (row := client.get(f"/v1/deployments/{deployment_id}").json())["status"] != wanted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert row["status"] == wanted
    return dict(row)


def test_life_of_a_deployment(client: TestClient, job_id: str, cluster: Any) -> None:
    response = client.post("/v1/deployments", json={"name": "sed", "checkpoint": {"job_id": job_id}})
    assert response.status_code == 201, response.text
    made = response.json()
    assert response.headers["location"] == f"/v1/deployments/{made['id']}"
    assert (made["status"], made["stage"], made["job_id"]) == ("deploying", "sft", job_id)
    assert made["url"] == f"http://serve/{made['id']}/v1"
    again = client.post("/v1/deployments", json={"name": "sed", "checkpoint": {"job_id": job_id}})
    assert (again.status_code, again.json()["code"]) == (409, "name_taken")
    while made["id"] not in cluster.apps:
        time.sleep(0.02)
    cluster.apps[made["id"]] = AppState("ready")
    assert status_of(client, made["id"], "ready")["ready_at"]
    assert [row["id"] for row in client.get("/v1/deployments").json()["data"]] == [made["id"]]
    assert client.delete(f"/v1/deployments/{made['id']}").status_code == 202
    assert status_of(client, made["id"], "stopped")["finished_at"]
    assert client.post("/v1/deployments", json={"name": "sed", "checkpoint": {"job_id": job_id}}).status_code == 201


def test_a_checkpoint_by_path(client: TestClient, root: Path) -> None:
    record = publish_checkpoint(root / "model", root / "checkpoints")
    response = client.post("/v1/deployments", json={"name": "m", "checkpoint": {"path": "checkpoints/step-2"}})
    assert response.status_code == 201, response.text
    assert response.json()["model_path"] == record.path


def test_changed_files_are_refused(client: TestClient, job_id: str) -> None:
    path = Path(client.get(f"/v1/jobs/{job_id}/checkpoints").json()["data"][0]["path"])
    weights = path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\x01")
    body = {"name": "m", "checkpoint": {"job_id": job_id, "stage": "sft"}}
    assert "expected sha256" in refused(client.post("/v1/deployments", json=body), "/checkpoint/stage")
    # A manifest made to fit the changed file is not the one the job recorded.
    manifest = json.loads((path / "MANIFEST.json").read_text())
    for file in manifest["files"]:
        if file["name"] == weights.name:
            file["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "it has changed" in refused(client.post("/v1/deployments", json=body), "/checkpoint/stage")
    (path / "MANIFEST.json").unlink()
    assert "MANIFEST.json" in refused(client.post("/v1/deployments", json=body), "/checkpoint/stage")


@pytest.mark.parametrize(
    ("checkpoint", "pointer"),
    [
        ({"job_id": "job_x"}, "/checkpoint/job_id"),
        ({"path": "model"}, "/checkpoint/path"),
        ({"path": "../x"}, "/checkpoint/path"),
        ({"path": "/etc"}, "/checkpoint/path"),
        ({}, "/checkpoint"),
        ({"path": "model", "job_id": "x"}, "/checkpoint"),
        ({"path": "model", "stage": "x"}, "/checkpoint"),
    ],
)
def test_what_is_no_checkpoint(client: TestClient, checkpoint: Json, pointer: str) -> None:
    refused(client.post("/v1/deployments", json={"name": "m", "checkpoint": checkpoint}), pointer)
    assert client.get("/v1/deployments").json()["data"] == []


def test_unknown_stage_names_those_there_are(client: TestClient, job_id: str) -> None:
    body = {"name": "m", "checkpoint": {"job_id": job_id, "stage": "rl"}}
    assert "(sft), got rl" in refused(client.post("/v1/deployments", json=body), "/checkpoint/stage")


def test_more_than_the_cluster_has(client: TestClient, job_id: str, cluster: Any) -> None:
    body = {"name": "m", "checkpoint": {"job_id": job_id}, "resources": {"gpus": 1}}
    assert "0 GPU, got 1" in refused(client.post("/v1/deployments", json=body), "/resources/gpus")
    cluster.reachable = False
    time.sleep(0.1)
    response = client.post("/v1/deployments", json={"name": "m", "checkpoint": {"job_id": job_id}})
    assert (response.status_code, response.json()["code"]) == (503, "ray_unreachable")


def test_foreign_ids(client: TestClient) -> None:
    assert client.get("/v1/deployments/dep-x").status_code == 404
    assert client.delete("/v1/deployments/dep-x").status_code == 404
