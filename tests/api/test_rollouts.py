"""Recorded rollouts over HTTP: pages, filters, attempts, damage. Anonymous and foreign ids are in test_jobs_endpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.settings import Settings
from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services.rollout_record import write_rollouts
from tests.api.test_jobs_endpoints import problem

Json = dict[str, Any]


def group(line: int, version: int) -> RolloutGroup:
    samples = (Sample((5, 6), (-0.5, -0.25), f"answer {line}", False, version), Sample((7,), (-1.0,), "", True, version))
    scores = (Score(1.0, "scored", "4"), Score(float("nan"), "timeout", None, "killed after 5 s"))
    return RolloutGroup(Prompt((1, 2), f"question {line}?", "4", line), samples, scores, seed=100 * line)


@pytest.fixture
def job(client: TestClient, sft_job: Json, settings: Settings) -> Json:
    """A job with three iterations of two prompts each in stage rl, one in stage again."""
    created: Json = client.post("/v1/jobs", json=sft_job).json()
    for stage, iterations in (("rl", (1, 2, 10)), ("again", (1,))):
        for iteration in iterations:
            write_rollouts(folder(settings, created, stage), iteration, [group(1, iteration), group(2, iteration)], {})
    return created


def folder(settings: Settings, job: Json, stage: str) -> Path:
    return settings.runs / str(job["id"]) / "attempt-1" / "stages" / stage / "rollouts"


def places(page: Json) -> list[tuple[str, int, int]]:
    return [(entry["stage"], entry["iteration"], entry["group"]) for entry in page["data"]]


def test_pages_in_order_to_the_end(client: TestClient, job: Json) -> None:
    seen: list[tuple[str, int, int]] = []
    params: Json = {"limit": 3}
    while True:
        page = client.get(f"/v1/jobs/{job['id']}/rollouts", params=params).json()
        seen += places(page)
        if not page["has_more"]:
            break
        params["after"] = page["next_cursor"]
    assert page["next_cursor"] is None
    assert seen == [("again", 1, 0), ("again", 1, 1), *(("rl", i, g) for i in (1, 2, 10) for g in (0, 1))]


def test_an_entry_holds_the_prompt_and_its_responses(client: TestClient, job: Json) -> None:
    url = f"/v1/jobs/{job['id']}/rollouts"
    [entry] = client.get(url, params={"stage": "rl", "iteration": 2, "limit": 1}).json()["data"]
    assert {key: value for key, value in entry.items() if key != "samples"} == {
        "object": "rollout_group",
        "stage": "rl",
        "iteration": 2,
        "group": 0,
        "line": 1,
        "prompt": "question 1?",
        "answer": "4",
    }
    right, late = entry["samples"]
    assert right == {
        "response": "answer 1",
        "num_tokens": 2,
        "truncated": False,
        "status": "scored",
        "reward": 1.0,
        "extracted": "4",
        "detail": "",
        "weight_version": 2,
        "seed": 100,
        "response_ids": None,
        "log_probs": None,
    }
    assert (late["status"], late["reward"], late["detail"], late["seed"]) == ("timeout", None, "killed after 5 s", 101)
    [entry] = client.get(url, params={"stage": "rl", "limit": 1, "tokens": True}).json()["data"]
    assert [(s["response_ids"], s["log_probs"]) for s in entry["samples"]] == [([5, 6], [-0.5, -0.25]), ([7], [-1.0])]


def test_filters(client: TestClient, job: Json) -> None:
    url = f"/v1/jobs/{job['id']}/rollouts"
    assert places(client.get(url, params={"prompt": "question 2"}).json()) == [
        ("again", 1, 1),
        ("rl", 1, 1),
        ("rl", 2, 1),
        ("rl", 10, 1),
    ]
    assert places(client.get(url, params={"iteration": 10}).json()) == [("rl", 10, 0), ("rl", 10, 1)]
    assert places(client.get(url, params={"stage": "rl", "after": "rl:2:0", "limit": 2}).json()) == [
        ("rl", 2, 1),
        ("rl", 10, 0),
    ]
    for nothing in ({"stage": "sft"}, {"iteration": 3}, {"prompt": "question 3"}, {"after": "rl:10:1"}):
        assert client.get(url, params=nothing).json() == {"object": "list", "data": [], "has_more": False, "next_cursor": None}


@pytest.mark.parametrize(
    "wrong", [{"after": "rl"}, {"after": "rl:1:x"}, {"iteration": 0}, {"limit": 0}, {"limit": 201}, {"prompt": "x" * 1001}]
)
def test_wrong_parameters_are_422(client: TestClient, job: Json, wrong: Json) -> None:
    problem(client.get(f"/v1/jobs/{job['id']}/rollouts", params=wrong), 422, "invalid_request")


def test_a_job_without_rollouts_has_an_empty_page(client: TestClient, sft_job: Json) -> None:
    job = client.post("/v1/jobs", json=sft_job).json()
    assert client.get(f"/v1/jobs/{job['id']}/rollouts").json()["data"] == []


def test_a_damaged_file_is_named(client: TestClient, job: Json, settings: Settings) -> None:
    (folder(settings, job, "rl") / "iteration-000002.parquet").write_bytes(b"PAR1")
    url = f"/v1/jobs/{job['id']}/rollouts"
    body = problem(client.get(url, params={"stage": "rl"}), 500, "recording_invalid")
    assert "iteration-000002.parquet" in body["detail"]
    assert len(client.get(url, params={"stage": "again"}).json()["data"]) == 2
