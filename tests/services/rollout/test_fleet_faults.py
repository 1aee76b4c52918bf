"""The fleet over real processes that die, freeze, lie and leave: ten seeds each. vLLM is replaced, so that a restart is cheap.

`test_engine_faults.py` does the same to real engines, fewer times.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from sedsft.config import SamplingConfig
from sedsft.records import Prompt, Sample
from services.actor_group import ActorGroup, ActorSpec
from services.errors import WeightSyncMismatch, WorkerDied
from services.jobspec import RolloutResources
from services.rollout.fleet import RolloutFleet
from services.rollout.health import State
from services.rollout.transport import FileTransport
from services.rollout.weight_sync import Pair, Probe, WeightSync
from services.rollout.worker import GenerateRequest, RolloutSetup, RolloutWorker

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(300)]

# Ray workers cannot import this file: the test's worker class travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

RESOURCES = RolloutResources(workers=3, cpus_per_worker=0.5, max_num_seqs=8, heartbeat_timeout_s=4, restarts=1000)
PROMPTS = [Prompt(prompt_ids=(i, 7), text="", answer="", line=i + 1) for i in range(120)]
SAMPLING = SamplingConfig(max_tokens=4)


class StandIn:
    """An engine whose one weight is a number in a file, and whose every log-probability is that number.

    Files beside it tell how it fails: `broken` (loads nothing), `slow_load`, `slow_probe`, `lies` (how often it then says that
    it holds an older version).
    """

    max_model_len = 64

    def __init__(self) -> None:
        self.weight = float("nan")
        self.folder: Path | None = None
        self.lies = 0

    async def generate(self, request: GenerateRequest) -> list[tuple[Sample, ...]]:
        if self.folder is not None and (self.folder / "slow_probe").exists():
            await asyncio.sleep(30)
        await asyncio.sleep(random.Random(request.seeds[0]).uniform(0.01, 0.2))
        return [
            tuple(
                Sample((ids[0], seed % 50, g), (self.weight,) * 3, "", False, request.version)
                for g in range(request.group_size)
            )
            for ids, seed in zip(request.prompts, request.seeds, strict=True)
        ]

    async def load_weights(self, folder: str, version: int) -> int:
        files = Path(folder)
        if files != self.folder:
            self.folder, self.lies = files, int((files / "lies").read_text()) if (files / "lies").exists() else 0
        if (files / "slow_load").exists():
            await asyncio.sleep(30)
        if not (files / "broken").exists():
            self.weight = float((files / "weight").read_text())
        self.lies -= 1
        return version - 1 if self.lies >= 0 else version

    async def heartbeat(self) -> None:
        return None


class StandInWorker(RolloutWorker):
    """The real worker around a stand-in engine."""

    async def start(self, setup: RolloutSetup) -> int:
        self._engine = StandIn()  # type: ignore[assignment]
        return StandIn.max_model_len


class Napper:
    """Keeps its caller waiting."""

    def __init__(self, index: int) -> None:
        self.index = index

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass
class Bench:
    """A fleet with the trainer whose weight is minus the version."""

    fleet: RolloutFleet
    group: ActorGroup
    folder: Path
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    version: int = 0
    broken: bool = False
    faults: dict[str, str] = field(default_factory=dict)
    """Files that the next exports leave beside the weight."""

    def sync(self) -> None:
        self.version += 1
        self.weight_sync().push(self.version)

    def weight_sync(self) -> WeightSync:
        probe = Probe(PROMPTS[:4], SAMPLING, seed=3)
        return WeightSync(self.fleet, FileTransport(self.export, self.folder), self.log_probs, probe, 0.05)

    def export(self, folder: Path) -> None:
        (folder / "weight").write_text(str(-self.version))
        for name, text in (self.faults | ({"broken": ""} if self.broken else {})).items():
            (folder / name).write_text(text)

    def log_probs(self, pairs: list[Pair]) -> list[np.ndarray]:
        return [np.full(len(ids), -self.version, np.float32) for _, ids in pairs]

    def settle(self, engines: int) -> None:
        deadline = time.monotonic() + 100
        while list(self.fleet.states().values()) != [State.READY] * engines:
            assert time.monotonic() < deadline, self.fleet.states()
            self.fleet._tend()
            time.sleep(0.02)

    def sample(self, seed: int, timeout_s: float = 100) -> None:
        """Every prompt is answered once, with the current weights in truth and not only by name."""
        groups = self.fleet.generate(PROMPTS, 2, SAMPLING, seed, timeout_s=timeout_s)
        assert [[sample.response_ids[0] for sample in samples] for samples in groups] == [[i, i] for i in range(len(PROMPTS))]
        assert {sample.weight_version for samples in groups for sample in samples} == {self.version}
        assert {p for samples in groups for sample in samples for p in sample.log_probs} == {-float(self.version)}
        assert self.fleet.counts()["wrong_version"] == 0

    def pid(self, engine: int) -> int:
        return int(self.group.call_one(engine, "pid", timeout_s=60))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def last(self, kind: str) -> dict[str, Any]:
        return next(data for name, data in reversed(self.events) if name == kind)


def build(spawn: Callable[[ActorSpec], ActorGroup], folder: Path, resources: RolloutResources) -> Bench:
    spec = ActorSpec("engine", StandInWorker, resources.workers, 0.5, max_concurrency=100, elastic=True)
    group = spawn(spec)
    events: list[tuple[str, dict[str, Any]]] = []
    fleet = RolloutFleet(group, resources, lambda kind, message, /, **data: events.append((kind, {"message": message} | data)))
    fleet.start("model", "bf16")
    fleet.ready(timeout_s=100)
    bench = Bench(fleet, group, folder, events)
    bench.sync()
    return bench


@pytest.fixture(scope="module")
def bench(spawn: Callable[[ActorSpec], ActorGroup], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    built = build(spawn, tmp_path_factory.mktemp("weights"), RESOURCES)
    yield built
    built.fleet.close()
    built.group.kill()


@pytest.fixture
def small(request: pytest.FixtureRequest, spawn: Callable[[ActorSpec], ActorGroup], tmp_path: Path) -> Iterator[Bench]:
    """Two engines that may be restarted so many times."""
    built = build(spawn, tmp_path, RESOURCES.model_copy(update={"workers": 2, "restarts": request.param}))
    yield built
    built.fleet.close()
    built.group.kill()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("fault", ["killed", "frozen", "removed"])
def test_a_fault_in_mid_generation(bench: Bench, fault: str, seed: int) -> None:
    rng = random.Random(f"{fault}{seed}")
    bench.settle(3)
    bench.sync()
    before = bench.fleet.counts()["redispatched"]
    engine = rng.choice(sorted(bench.fleet.states()))
    pid = bench.pid(engine)
    strike = {
        "killed": lambda: os.kill(pid, signal.SIGKILL),
        "frozen": lambda: os.kill(pid, signal.SIGSTOP),
        "removed": lambda: bench.fleet.resize(2),
    }[fault]
    timer = threading.Timer(rng.uniform(0.05, 0.5), strike)
    timer.start()
    bench.sample(seed)
    timer.join()
    assert bench.fleet.counts()["redispatched"] > before
    if fault == "removed":
        assert len(bench.fleet) == 2
        bench.fleet.resize(3)
    bench.settle(3)
    ready = bench.last("engine_ready")
    print(f"\n{fault} seed {seed}: serves again after {ready['seconds']:.1f} s, {bench.fleet.counts()}")
    bench.sample(seed + 1)


def test_a_hiccup_is_suspected_and_forgiven(bench: Bench) -> None:
    bench.settle(3)
    engine = min(bench.fleet.states())
    restarted = bench.kinds().count("engine_restarted")
    pid = bench.pid(engine)
    timers = [threading.Timer(0.1, os.kill, (pid, signal.SIGSTOP)), threading.Timer(2.6, os.kill, (pid, signal.SIGCONT))]
    for timer in timers:
        timer.start()
    bench.sample(5)
    for timer in timers:
        timer.join()
    bench.settle(3)
    assert bench.last("engine_recovered")["engine"] == engine
    assert bench.kinds().count("engine_restarted") == restarted


def test_an_engine_that_died_between_calls_leaves_the_sync_and_comes_back(bench: Bench) -> None:
    bench.settle(3)
    engine = min(bench.fleet.states())
    os.kill(bench.pid(engine), signal.SIGKILL)
    bench.sync()
    assert bench.last("engine_dead")["engine"] == engine
    bench.sample(1)
    bench.settle(3)


def test_engines_are_mended_while_others_work(bench: Bench, spawn: Callable[[ActorSpec], ActorGroup]) -> None:
    bench.settle(3)
    other = spawn(ActorSpec("other", Napper, 1, 0.5, elastic=True))
    engine = min(bench.fleet.states())
    os.kill(bench.pid(engine), signal.SIGKILL)
    bench.events.append(("killed", {}))
    deadline = time.monotonic() + 60
    # Nothing but waiting for another group touches the fleet.
    while bench.kinds()[-1] != "engine_ready" and time.monotonic() < deadline:
        other.call_one(0, "nap", 5.0, timeout_s=60)
    assert bench.last("engine_dead")["engine"] == bench.last("engine_ready")["engine"] == engine
    assert set(bench.fleet.states().values()) == {State.READY}
    other.kill()


@pytest.mark.parametrize("small", [0], indirect=True)
def test_without_restarts_the_rest_goes_on_until_none_is_left(small: Bench) -> None:
    first, second = small.pid(0), small.pid(1)
    threading.Timer(0.2, os.kill, (first, signal.SIGKILL)).start()
    small.sample(1)
    assert small.fleet.states() == {0: State.DEAD, 1: State.READY}
    assert "no restart is left" in small.last("engine_dead")["message"]
    small.sync()
    small.sample(2)
    # A new size replaces what died for good.
    small.fleet.resize(2)
    small.settle(2)
    assert sorted(small.fleet.states()) == [1, 2]
    for pid in (second, small.pid(2)):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"none can come back: .*rollout-1: .*; rollout-2: "):
        small.sample(3)


@pytest.mark.parametrize("small", [2], indirect=True)
def test_a_prompt_that_ends_two_engines_is_named(small: Bench) -> None:
    pids = [small.pid(0), small.pid(1)]
    timers = [threading.Timer(0.1 * (i + 1), os.kill, (pid, signal.SIGKILL)) for i, pid in enumerate(pids)]
    for timer in timers:
        timer.start()
    with pytest.raises(
        WorkerDied, match=r"expected each prompt to lose at most one engine, \d+ lost two; by place in the call: "
    ):
        small.sample(1)
    small.settle(2)
    small.sample(2)


@pytest.mark.parametrize("small", [2], indirect=True)
def test_stale_weights_never_serve(small: Bench) -> None:
    small.broken = True
    with pytest.raises(WeightSyncMismatch, match=r"rollout-0 mean 1\.0000.*rollout-1 mean 1\.0000"):
        small.sync()
    assert set(small.fleet.states().values()) == {State.STALE}
    with pytest.raises(WorkerDied, match="no engine holds verified weights"):
        small.sample(1)
    small.broken = False
    small.sync()
    small.sample(2)


@pytest.mark.parametrize("small", [2], indirect=True)
def test_a_restarted_engine_whose_refit_fails_the_probe_never_serves(small: Bench) -> None:
    small.sync()
    # From here on loads do nothing: a fresh engine holds no number at all.
    (small.folder / f"weights-{small.version}" / "broken").touch()
    os.kill(small.pid(0), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while small.kinds().count("engine_dead") < 3 and time.monotonic() < deadline:
        small.sample(1)
    assert small.kinds().count("engine_dead") == 3
    assert small.kinds().count("engine_mismatch") == 4
    assert small.fleet.states() == {0: State.DEAD, 1: State.READY}
    assert "mean gap nan" in small.last("engine_dead")["cause"]
