"""The real stack: Ray with a token, the API, and a job whose driver is killed. Nothing may be left after `down`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from api import stack as local_stack
from api.client import ApiProblem, Client
from api.settings import Settings
from api.stack import Leader, Stack, StackError


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def until(condition: Callable[[], Any], timeout_s: float) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s")


@pytest.fixture
def stack_settings(tmp_path: Path, root: Path) -> Settings:
    return Settings(home=tmp_path / "home", port=free_port(), allowed_roots=(root,))


@pytest.fixture
def running(stack_settings: Settings) -> Iterator[Stack]:
    stack = local_stack.up(stack_settings, num_cpus=2, num_gpus=0)
    try:
        yield stack
    finally:
        if local_stack.read_stack(stack_settings) is not None:
            local_stack.down(stack_settings)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_jobs_on_a_real_stack(running: Stack, stack_settings: Settings, sft_job: dict[str, Any]) -> None:
    assert httpx.get(f"{running.dashboard_url}/api/jobs/").status_code == 401
    assert httpx.get(f"{running.api_url}/v1/jobs").status_code == 401
    with Client.local(running.api_url, stack_settings.key_path) as client:
        _job_that_cannot_train(client, sft_job)
        _driver_that_is_killed(client, running, sft_job)
        _job_cancelled_while_it_starts(client, sft_job)
        with pytest.raises(ApiProblem, match="2 CPU in stage 'first', got 3"):
            client.submit(sft_job | {"trainer": {"workers": 3}})
    _down_leaves_nothing(running, stack_settings)


def _job_that_cannot_train(client: Client, spec: dict[str, Any]) -> None:
    """The weights are no llama: only the driver can see that."""
    job = client.submit(spec)
    end = until(lambda: (j := client.job(job["id"]))["status"] == "failed" and j, 90)
    assert end["status_reason"]["code"] in ("model_invalid", "internal", "driver_died"), end
    assert end["status_reason"]["message"]
    assert client.logs(job["id"])["text"]
    seqs = [event["seq"] for event in client.events(job["id"])]
    assert seqs == list(range(1, len(seqs) + 1))


def _driver_that_is_killed(client: Client, stack: Stack, spec: dict[str, Any]) -> None:
    job = client.submit(spec | {"recovery": {"restarts": 1}})
    driver = until(lambda: _driver_of(stack, job["id"]), 60)
    driver.kill()
    until(lambda: client.job(job["id"])["attempt"] == 2, 20)
    driver = until(lambda: _driver_of(stack, job["id"]), 60)
    driver.kill()
    killed_at = time.monotonic()
    end = until(lambda: (j := client.job(job["id"]))["status"] == "failed" and j, 20)
    assert time.monotonic() - killed_at < 10
    assert end["status_reason"]["code"] == "driver_died", end
    assert "exit code" in end["status_reason"]["message"]


def _job_cancelled_while_it_starts(client: Client, spec: dict[str, Any]) -> None:
    job = client.submit(spec)
    client.cancel(job["id"])
    end = until(lambda: (j := client.job(job["id"]))["status"] == "cancelled" and j, 60)
    assert end["status_reason"]["code"] == "cancelled_by_user"


def _driver_of(stack: Stack, job_id: str) -> psutil.Process | None:
    for process in local_stack.processes_of(stack):
        try:
            command = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "services.driver" in command and job_id in command[-1]:
            return process
    return None


def _down_leaves_nothing(stack: Stack, settings: Settings) -> None:
    assert local_stack.processes_of(stack)
    started = time.monotonic()
    local_stack.down(settings)
    assert time.monotonic() - started < 15
    assert local_stack.processes_of(stack) == []
    assert not Path(stack.ray_folder).exists()
    assert not (settings.home / "stack.json").exists()
    assert all(not psutil.pid_exists(leader.pid) for leader in stack.leaders.values())


def test_a_taken_port_is_told_before_anything_starts(stack_settings: Settings) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", stack_settings.port))
        held.listen()
        with pytest.raises(StackError, match="set SEDSFT_PORT"):
            local_stack.up(stack_settings)
    assert not (stack_settings.home / "stack.json").exists()


def test_down_without_a_stack(stack_settings: Settings) -> None:
    with pytest.raises(StackError, match="sedsft up"):
        local_stack.down(stack_settings)


def test_down_ends_marked_processes_and_spares_strangers(stack_settings: Settings) -> None:
    """A child in a session of its own goes too; a process with a recorded number but another start does not."""
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    nested = f"import subprocess, time; subprocess.Popen({sleep!r}, start_new_session=True); time.sleep(60)"
    environment = os.environ | {"SEDSFT_STACK": "mark-of-this-test"}
    leader = subprocess.Popen([sys.executable, "-c", nested], env=environment, start_new_session=True)
    stranger = subprocess.Popen(sleep, start_new_session=True)
    try:
        leaders = {
            "ray": Leader(leader.pid, psutil.Process(leader.pid).create_time()),
            "api": Leader(stranger.pid, psutil.Process(stranger.pid).create_time() - 1000),
        }
        stack = Stack("mark-of-this-test", "http://x", "http://y", 1, str(stack_settings.home / "none"), leaders)
        stack_settings.home.mkdir()
        record = stack.__dict__ | {"leaders": {name: each.__dict__ for name, each in leaders.items()}}
        (stack_settings.home / "stack.json").write_text(json.dumps(record))
        until(lambda: len(local_stack.processes_of(stack)) == 2, 20)
        with pytest.raises(StackError, match="is up at http://x"):
            local_stack.up(stack_settings)
        local_stack.down(stack_settings)
        assert local_stack.processes_of(stack) == []
        assert not psutil.pid_exists(leader.pid)
        assert stranger.poll() is None
    finally:
        for process in (leader, stranger):
            process.kill()
            process.wait()
