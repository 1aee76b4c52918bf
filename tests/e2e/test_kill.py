"""kill -9 of each kind of process of a running job: failed with a reason within 30 s, nothing left, the API answers."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from api import stack as local_stack
from api.client import Client
from tests.e2e.specs import ended, rl_stage, wait_for

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

TITLES = {
    "driver": "services.driver",
    "trainer rank": "ray::PolicyWorker",
    "rollout actor": "ray::RolloutWorker",
    "vLLM engine": "VLLM::EngineCore",
    "reward actor": "ray::ScoringWorker",
}
CODES = {"driver": {"driver_died"}}


def matching(stack: local_stack.Stack, title: str) -> Iterator[psutil.Process]:
    for process in local_stack.processes_of(stack):
        try:
            if title in " ".join(process.cmdline()):
                yield process
        except psutil.NoSuchProcess:
            continue


@pytest.mark.parametrize("victim", TITLES)
def test_a_killed_process_ends_the_job_with_a_reason(client: Client, stack: local_stack.Stack, victim: str) -> None:
    idle = {process.pid for process in local_stack.processes_of(stack)}
    job_id = client.submit(rl_stage({"path": "base"}, iterations=100_000))["id"]
    wait_for(client, job_id, lambda job: job["progress"]["step"] >= 2, 200)
    # The driver's shell has the same command line; the driver is the newest process that does.
    *_, process = matching(stack, TITLES[victim])
    process.kill()
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
