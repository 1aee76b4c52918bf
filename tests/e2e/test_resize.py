"""Engines are added and removed while an RL stage trains: nobody waits, nothing is lost, and the job says what is there."""

from __future__ import annotations

import time

import pytest

from api.client import ApiProblem, Client
from tests.e2e.specs import ended, rl_stage, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_engines_come_and_go_while_training_goes_on(client: Client) -> None:
    job_id = client.submit(rl_stage({"path": "base"}, iterations=100_000))["id"]
    wait_for(client, job_id, lambda job: job["progress"]["step"] >= 2, 200)
    assert client.job(job_id)["rollout"] == {"wanted": 1, "alive": 1, "ready": 1}
    # The trainer's 0.8 cores, the scorer's 0.2 and 0.4 for each engine: 2 of the stack's cores hold two.
    with pytest.raises(ApiProblem, match="expected at most the cluster's 2 CPU"):
        client.resize(job_id, 3)

    asked_s = time.monotonic()
    assert client.resize(job_id, 2)["rollout"]["wanted"] == 2
    job = wait_for(client, job_id, lambda job: job["rollout"]["ready"] == 2, 150)
    print(f"a second engine serves {time.monotonic() - asked_s:.1f} s after it was asked for")
    assert job["rollout"] == {"wanted": 2, "alive": 2, "ready": 2}
    step = job["progress"]["step"]
    wait_for(client, job_id, lambda job: job["progress"]["step"] >= step + 2, 60)

    asked_s = time.monotonic()
    client.resize(job_id, 1)
    wait_for(client, job_id, lambda job: job["rollout"] == {"wanted": 1, "alive": 1, "ready": 1}, 60)
    print(f"it is gone after {time.monotonic() - asked_s:.1f} s")
    step = client.job(job_id)["progress"]["step"]
    wait_for(client, job_id, lambda job: job["progress"]["step"] >= step + 2, 60)

    kinds = [event["kind"] for event in client.events(job_id)]
    expected = ["resize_requested", "resize", "engine_added", "engine_ready", "resize_requested", "resize", "engine_removed"]
    assert [kind for kind in kinds if kind in expected] == expected
    points = [point["values"] for point in client.metrics(job_id, "rl")]
    assert all(point["score_errors"] == 0 for point in points)
    assert len({(group["iteration"], group["group"]) for group in client.rollouts(job_id)}) >= 8 * len(points)
    client.cancel(job_id)
    while not ended(client.job(job_id)):
        time.sleep(0.2)
    with pytest.raises(ApiProblem, match="no_rl_stage"):
        client.resize(job_id, 2)
