"""kill -9 of each kind of process of a running job: it recovers without anybody's doing and its recording replays bit for bit;
without a budget it fails with a reason within 30 s, nothing is left, the API answers."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from api import stack as local_stack
from api.client import Client
from tests.e2e.specs import ROLLOUT, SCORER, ended, rl_stage, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

TITLES = {
    "driver": "services.driver",
    "trainer rank": "ray::PolicyWorker",
    "rollout actor": "ray::RolloutWorker",
    "vLLM engine": "VLLM::EngineCore",
    "reward actor": "ray::ScoringWorker",
}
CODES = {"driver": {"driver_died"}}
RECOVERED = {
    "driver": "drivers",
    "trainer rank": "stages",
    "rollout actor": "engines",
    "vLLM engine": "engines",
    "reward actor": "scorers",
}


def matching(stack: local_stack.Stack, title: str) -> Iterator[psutil.Process]:
    for process in local_stack.processes_of(stack):
        try:
            if title in " ".join(process.cmdline()):
                yield process
        except psutil.NoSuchProcess:
            continue


def kill(stack: local_stack.Stack, victim: str) -> None:
    # The driver's shell has the same command line; the driver is the newest process that does.
    *_, process = matching(stack, TITLES[victim])
    process.kill()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", TITLES)
def test_a_job_recovers_from_a_killed_process(client: Client, stack: local_stack.Stack, victim: str) -> None:
    """Killed behind the checkpoint of iteration 4 or later, the job does all 20 and none of the first 4 again."""
    spec = rl_stage({"path": "base"}, iterations=20, checkpoints={"every_steps": 2})
    spec |= {"rollout": ROLLOUT | {"restarts": 3}}
    job_id = client.submit(spec)["id"]
    wait_for(client, job_id, lambda job: job["progress"]["step"] >= 7, 200)
    kill(stack, victim)
    killed_s = time.monotonic()
    recovered = wait_for(client, job_id, lambda job: recovery_of(client, job_id) != "" or ended(job), 120)
    assert not ended(recovered), recovered["status_reason"]
    step = max(point["step"] for point in client.metrics(job_id, "rl"))
    newer = wait_for(client, job_id, lambda job: client.metrics(job_id, "rl")[-1]["step"] > step or ended(job), 200)
    back_s = time.monotonic() - killed_s
    job = wait_for(client, job_id, ended, 400) if not ended(newer) else newer
    assert (job["status"], job["status_reason"]) == ("succeeded", None)
    assert job["attempt"] == (2 if victim == "driver" else 1)
    points = client.metrics(job_id, "rl")
    assert [point["step"] for point in points] == list(range(1, 21))
    assert points[-1]["values"][f"recoveries_{RECOVERED[victim]}"] == 1
    resumed = [event["data"]["step"] for event in client.events(job_id) if event["kind"] == "resumed"]
    assert all(step >= 4 for step in resumed)
    assert len(resumed) == (victim in ("driver", "trainer rank"))
    run_folder = Path(client.checkpoints(job_id)[-1]["path"]).parents[3]
    command = [sys.executable, "-m", "services.replay", str(run_folder)]
    replayed = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert "equal after 20 iterations" in replayed.stdout, replayed.stdout + replayed.stderr
    print(f"{victim}: {recovery_of(client, job_id)} and trains again after {back_s:.1f} s")


def recovery_of(client: Client, job_id: str) -> str:
    """Kind of the event that says that the job goes on."""
    kinds = ("attempt_started", "stage_restarted", "engine_restarted", "scorer_restarted")
    return next((event["kind"] for event in client.events(job_id) if event["kind"] in kinds), "")


@pytest.mark.parametrize("victim", TITLES)
def test_a_killed_process_ends_the_job_with_a_reason(client: Client, stack: local_stack.Stack, victim: str) -> None:
    idle = {process.pid for process in local_stack.processes_of(stack)}
    spec = rl_stage({"path": "base"}, iterations=100_000) | {"recovery": {"restarts": 0}, "scorer": SCORER | {"restarts": 0}}
    job_id = client.submit(spec)["id"]
    wait_for(client, job_id, lambda job: job["progress"]["step"] >= 2, 200)
    kill(stack, victim)
    started = time.monotonic()
    slowest = 0.0
    while not ended(job := client.job(job_id)):
        asked = time.monotonic()
        client.jobs()
        slowest = max(slowest, time.monotonic() - asked)
        assert time.monotonic() - started < 30, job
        time.sleep(0.2)
    seconds, code = time.monotonic() - started, job["status_reason"]["code"]
    print(f"{victim}: failed after {seconds:.1f} s with {code}, slowest answer of the API {slowest:.2f} s")
    assert job["status"] == "failed"
    assert job["status_reason"]["code"] in CODES.get(victim, {"worker_died"})
    assert slowest < 5
    own = ("services.driver", "ray::PolicyWorker", "ray::RolloutWorker", "ray::ScoringWorker", "EngineCore", "scoring.child")
    deadline = time.monotonic() + 30
    while left := [
        process
        for title in own
        for process in matching(stack, title)
        if process.pid not in idle and process.status() != psutil.STATUS_ZOMBIE
    ]:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
