"""Deaths without a restart left: an engine that ends is an error at once, and no engine outlives its actor."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from sedsft.config import SamplingConfig
from sedsft.records import Prompt
from services.actor_group import ActorGroup, ActorSpec
from services.errors import ModelError, WorkerDied
from services.jobspec import RolloutResources
from services.rollout.fleet import RolloutFleet, rollout_spec
from services.rollout.worker import RolloutSetup
from tests.services.rollout.conftest import serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ONE = RolloutResources(workers=1, cpus_per_worker=0.5, max_model_len=256, max_num_seqs=64, restarts=0)
PROMPTS = [Prompt(prompt_ids=(1, 3, 5 + i), text="", answer="", line=i + 1) for i in range(60)]


def gone(pid: int, within_s: float) -> bool:
    """True once the process has ended (or waits as a zombie to be reaped)."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def group(spawn: Callable[[ActorSpec], ActorGroup]) -> ActorGroup:
    return spawn(rollout_spec(ONE))


@pytest.fixture
def fleet(group: ActorGroup, model_folder: Path) -> Iterator[RolloutFleet]:
    built = RolloutFleet(group, ONE)
    built.start(str(model_folder), "bf16")
    built.ready(timeout_s=150)
    serve(built, model_folder)
    yield built
    built.close()
    group.kill()


@pytest.mark.chaos
def test_dead_engine_is_an_error_at_once(fleet: RolloutFleet, group: ActorGroup, model_folder: Path) -> None:
    group.call_one(0, "heartbeat", timeout_s=30)
    [engine] = group.call_one(0, "engine_pids", timeout_s=30)
    killer = threading.Timer(0.5, os.kill, (engine, signal.SIGKILL))
    killer.start()
    began = time.monotonic()
    with pytest.raises(WorkerDied, match="none can come back: rollout-0: expected the vLLM engine process to live"):
        fleet.generate(PROMPTS * 100, 8, SamplingConfig(max_tokens=200), seed=0, timeout_s=100)
    assert 0.4 < time.monotonic() - began < 10
    with pytest.raises(WorkerDied, match="none can come back"):
        serve(fleet, model_folder, 1)


@pytest.mark.chaos
def test_engine_dies_with_its_actor(fleet: RolloutFleet, group: ActorGroup) -> None:
    actor = group.call_one(0, "pid", timeout_s=30)
    engines = group.call_one(0, "engine_pids", timeout_s=30)
    os.kill(actor, signal.SIGKILL)
    assert engines
    assert all(gone(pid, within_s=5) for pid in engines)
    with pytest.raises(WorkerDied, match="its process ended"):
        fleet.generate(PROMPTS, 2, SamplingConfig(max_tokens=4), seed=0, timeout_s=30)


@pytest.mark.chaos
def test_actor_killed_while_the_engine_starts(group: ActorGroup, model_folder: Path) -> None:
    actor = group.call_one(0, "pid", timeout_s=60)
    setup = RolloutSetup(str(model_folder), "bf16", ONE)
    starting = group.actors[0].start.remote(setup)
    deadline = time.monotonic() + 120
    while not (engines := psutil.Process(actor).children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(actor, signal.SIGKILL)
    assert engines
    assert all(gone(process.pid, within_s=60) for process in engines)
    with pytest.raises(WorkerDied):
        group.wait([starting], [0], "start", 30)


def test_a_folder_that_is_no_model(group: ActorGroup, tmp_path: Path) -> None:
    fleet = RolloutFleet(group, ONE)
    fleet.start(str(tmp_path), "bf16")
    with pytest.raises(ModelError, match="expected vLLM to start on"):
        fleet.ready(timeout_s=100)
    fleet.close()
    group.kill()
