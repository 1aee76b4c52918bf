"""Engines killed, frozen and removed in mid-generation: every prompt is answered once, with the current weights."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from sedsft.config import SamplingConfig
from sedsft.records import Prompt
from services.actor_group import ActorGroup, ActorSpec
from services.jobspec import RolloutResources
from services.rollout.fleet import RolloutFleet, rollout_spec
from services.rollout.health import State
from services.rollout.transport import FileTransport
from services.rollout.weight_sync import WeightSync
from tests.services.rollout.test_weight_sync import PROBE, trainer_of

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(400)]

TWO = RolloutResources(
    workers=2,
    cpus_per_worker=0.5,
    max_model_len=256,
    max_num_seqs=64,
    heartbeat_timeout_s=8,
    restarts=1000,
    sample_timeout_s=300,
)
PROMPTS = [Prompt(prompt_ids=(1, 3, 5 + i % 60, 5 + i // 60), text="", answer="", line=i + 1) for i in range(200)]
SAMPLING = SamplingConfig(max_tokens=200)
GROUP_SIZE = 8
SEEDS = range(3)


@dataclass
class Bench:
    """A fleet of two engines that a trainer's weights were synced to, and what it told."""

    fleet: RolloutFleet
    group: ActorGroup
    folder: Path
    events: list[tuple[float, str, dict[str, Any]]] = field(default_factory=list)
    version: int = 0

    def sync(self, seed: int) -> None:
        """Push other weights under the next version."""
        self.version += 1
        export, log_probs = trainer_of(seed)
        self.log_probs = log_probs
        WeightSync(self.fleet, FileTransport(export, self.folder), log_probs, PROBE, 0.05).push(self.version)

    def settle(self, engines: int, within_s: float = 200) -> None:
        """Wait until so many engines serve, and no other is there."""
        deadline = time.monotonic() + within_s
        while list(self.fleet.states().values()) != [State.READY] * engines:
            assert time.monotonic() < deadline, self.fleet.states()
            self.fleet._tend()
            time.sleep(0.1)

    def sample_under(self, fault: Callable[[], None], after_s: float, seed: int) -> float:
        """Sample while a fault strikes; every prompt must be answered once, by the current weights. Returns seconds."""
        before = self.fleet.counts()
        timer = threading.Timer(after_s, fault)
        timer.start()
        began = time.monotonic()
        groups = self.fleet.generate(PROMPTS, GROUP_SIZE, SAMPLING, seed=seed, timeout_s=300)
        seconds = time.monotonic() - began
        assert not timer.is_alive(), "the fault came too late: more prompts"
        timer.join()
        assert [len(samples) for samples in groups] == [GROUP_SIZE] * len(PROMPTS)
        assert {sample.weight_version for samples in groups for sample in samples} == {self.version}
        assert self.fleet.counts()["wrong_version"] == before["wrong_version"] == 0
        assert self.fleet.counts()["redispatched"] > before["redispatched"]
        # They are those weights, and the prompt's own responses.
        pairs = [(PROMPTS[i].prompt_ids, groups[i][0].response_ids) for i in range(0, len(PROMPTS), 20)]
        drawn = [groups[i][0].log_probs for i in range(0, len(PROMPTS), 20)]
        gaps = [np.abs(np.array(d) - t) for d, t in zip(drawn, self.log_probs(pairs), strict=True)]
        assert np.concatenate(gaps).mean() < 0.05
        return seconds

    def last(self, kind: str) -> dict[str, Any]:
        return next(data for _, name, data in reversed(self.events) if name == kind)


@pytest.fixture(scope="module")
def bench(
    spawn: Callable[[ActorSpec], ActorGroup], model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    group = spawn(rollout_spec(TWO))
    events: list[tuple[float, str, dict[str, Any]]] = []
    fleet = RolloutFleet(group, TWO, lambda kind, _, /, **data: events.append((time.monotonic(), kind, data)))
    fleet.start(str(model_folder), "bf16")
    fleet.ready(timeout_s=200)
    built = Bench(fleet, group, tmp_path_factory.mktemp("weights"), events)
    built.sync(3)
    yield built
    fleet.close()
    group.kill()


def victim_pid(bench: Bench, engine: int, actor: bool) -> int:
    """Process of an engine's actor or of the vLLM engine below it."""
    if actor:
        return int(bench.group.call_one(engine, "pid", timeout_s=60))
    return int(bench.group.call_one(engine, "engine_pids", timeout_s=60)[0])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_an_engine_that_dies_or_freezes_in_mid_generation(bench: Bench, fault: signal.Signals, seed: int) -> None:
    rng = random.Random(seed)
    bench.sync(10 + seed)
    engine, actor = rng.randrange(2), bool(seed % 2)
    pid = victim_pid(bench, engine, actor)
    struck_s = []

    def strike() -> None:
        struck_s.append(time.monotonic())
        os.kill(pid, fault)

    seconds = bench.sample_under(strike, rng.uniform(0.3, 1.5), seed)
    dead_s = next(at_s for at_s, kind, _ in reversed(bench.events) if kind == "engine_dead")
    bench.settle(2)
    ready = bench.last("engine_ready")
    assert ready["engine"] == engine
    assert dead_s - struck_s[0] < (4 if fault is signal.SIGKILL else TWO.heartbeat_timeout_s + 6)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    print(
        f"\n{fault.name} {'actor' if actor else 'engine'} seed {seed}: {len(PROMPTS)} prompts in {seconds:.1f} s, noticed "
        f"after {dead_s - struck_s[0]:.1f} s, rejoined {ready['seconds']:.1f} s later, {bench.fleet.counts()}"
    )
    # What came back serves the weights that the other one does.
    again = bench.fleet.generate(PROMPTS[:40], 1, SamplingConfig(max_tokens=4), seed=seed, timeout_s=60)
    assert {sample.weight_version for [sample] in again} == {bench.version}


@pytest.mark.parametrize("seed", SEEDS)
def test_an_engine_removed_in_mid_generation_and_added_again(bench: Bench, seed: int) -> None:
    rng = random.Random(100 + seed)
    bench.settle(2)
    bench.sync(20 + seed)
    removed = max(bench.fleet.states())
    began = time.monotonic()
    seconds = bench.sample_under(lambda: bench.fleet.resize(1), rng.uniform(0.3, 1.5), seed)
    assert bench.last("engine_removed")["engine"] == removed
    assert len(bench.fleet) == 1
    bench.fleet.resize(2)
    assert bench.last("engine_added")["engine"] == removed + 1
    bench.settle(2)
    print(
        f"\nremoved seed {seed}: {len(PROMPTS)} prompts in {seconds:.1f} s, a new one serves after "
        f"{bench.last('engine_ready')['seconds']:.1f} s, all in {time.monotonic() - began:.1f} s"
    )


def test_an_engine_that_died_between_calls_leaves_the_sync_and_comes_back(bench: Bench) -> None:
    bench.settle(2)
    pid = victim_pid(bench, min(bench.fleet.states()), actor=True)
    os.kill(pid, signal.SIGKILL)
    bench.sync(30)
    groups = bench.fleet.generate(PROMPTS[:40], 2, SAMPLING, seed=1, timeout_s=100)
    assert {sample.weight_version for samples in groups for sample in samples} == {bench.version}
    bench.settle(2)
