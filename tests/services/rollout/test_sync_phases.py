"""Deadlines of the phases of a weight sync, and the version that each engine says it holds. vLLM is replaced by a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from services.actor_group import ActorGroup, ActorSpec
from services.errors import NoneLeft, PhaseTimeout, WeightSyncMismatch
from services.jobspec import SyncSettings
from services.rollout.health import State
from services.rollout.transport import FileTransport
from services.rollout.weight_sync import Probe, WeightSync
from tests.services.rollout.test_fleet_faults import PROMPTS, RESOURCES, SAMPLING, Bench, Napper, build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SHORT = SyncSettings(load_timeout_s=1.5, probe_timeout_s=2)


@pytest.fixture
def bench(spawn: Callable[[ActorSpec], ActorGroup], tmp_path: Path) -> Iterator[Bench]:
    """Two engines that are not restarted."""
    built = build(spawn, tmp_path, RESOURCES.model_copy(update={"workers": 2, "restarts": 0, "sync": SHORT}))
    yield built
    built.fleet.close()
    built.group.kill()


@pytest.fixture
def napper(spawn: Callable[[ActorSpec], ActorGroup]) -> Iterator[ActorGroup]:
    group = spawn(ActorSpec("trainer", Napper, 1, 0.5, elastic=True))
    group.call_one(0, "nap", 0.0, timeout_s=60)
    yield group
    group.kill()


def test_an_older_version_is_loaded_again_and_counted(bench: Bench) -> None:
    bench.version += 1
    bench.faults = {"lies": "1"}
    report = bench.weight_sync().push(bench.version)
    assert (report.refitted, report.stale) == ((0, 1), (0, 1))
    assert [gap.engine for gap in report.engines] == [0, 1]
    figures = report.figures()
    assert figures["engines_stale"] == figures["engines_refitted"] == 2
    assert figures["probe_gap_max_engine_1"] == figures["probe_gap_mean_engine_0"] == 0
    bench.sample(1)


def test_an_older_version_after_two_loads_ends_the_sync(bench: Bench) -> None:
    bench.version += 1
    bench.faults = {"lies": "2"}
    with pytest.raises(
        WeightSyncMismatch, match="to hold weight version 2 after two loads, got rollout-0 at 1, rollout-1 at 1; look"
    ):
        bench.weight_sync().push(bench.version)
    assert State.READY not in bench.fleet.states().values()


@pytest.mark.parametrize(("fault", "phase"), [("slow_load", "phase load: weights 2"), ("slow_probe", "phase probe: it")])
def test_engines_that_are_late_are_given_up_by_the_phase_name(bench: Bench, fault: str, phase: str) -> None:
    bench.version += 1
    bench.faults = {fault: ""}
    with pytest.raises(NoneLeft, match=f"rollout-0: {phase} was not|rollout-0: {phase} were not"):
        bench.weight_sync().push(bench.version)
    assert phase in bench.last("engine_dead")["cause"]


@pytest.mark.parametrize("phase", ["export", "probe"])
def test_trainers_that_are_late_end_the_sync_by_the_phase_name(bench: Bench, napper: ActorGroup, phase: str) -> None:
    def late(*_: Any) -> Any:
        napper.call_one(0, "nap", 20.0, timeout_s=0.5)

    write = late if phase == "export" else bench.export
    log_probs = late if phase == "probe" else bench.log_probs
    sync = WeightSync(bench.fleet, FileTransport(write, bench.folder), log_probs, Probe(PROMPTS[:4], SAMPLING, 3), 0.05)
    match = rf"^phase {phase} of the sync of weights 2: .*trainer.* did not answer.*rollout\.sync\.{phase}_timeout_s$"
    with pytest.raises(PhaseTimeout, match=match):
        sync.push(2)
    assert not (bench.folder / "weights-2").exists()
