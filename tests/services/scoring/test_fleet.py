"""Reward workers as Ray actors: order over workers, workers that die, freeze or take others with them, none left behind."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psutil
import pytest
import ray
from ray import cloudpickle
from ray.util.placement_group import placement_group

from sedsft.config import AnswerReward, RewardConfig
from sedsft.records import Score, ScoringItem
from services.actor_group import ActorGroup, ActorSpec
from services.errors import NoneLeft, PhaseTimeout, RewardFailure
from services.jobspec import ScorerResources
from services.scoring import fleet as fleet_module
from services.scoring.fleet import ScoringFleet, placed, score_figures, scoring_spec, unknown_sources
from services.scoring.worker import ScoringWorker

# Ray workers cannot import this file: the test's worker class travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

RESOURCES = ScorerResources(workers=2, cpus_per_worker=0.5, processes=2)
REWARD = RewardConfig(name="countdown", timeout_s=5, memory_mb=512)
RIGHT, WRONG = ScoringItem("1 2 3>6", "1+2=3,3+3=6"), ScoringItem("1 2 3>6", "1+2=4")
POISON = ScoringItem("1 2 3>6", "poison")


class FaultyWorker(ScoringWorker):
    """Dies of poison, and freezes or loses a score where its item says so."""

    def score(self, items: Sequence[ScoringItem]) -> list[Score]:
        said = {item.response for item in items}
        if "poison" in said:
            os.kill(os.getpid(), signal.SIGKILL)
        if "freeze" in said and not os.path.exists(os.environ["FROZEN"]):
            open(os.environ["FROZEN"], "x").close()
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().score(items)[1 if "lose" in said else 0 :]


@dataclass
class Bench:
    """Workers on a cluster of two cores, and what the fleet told."""

    group: ActorGroup
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def fleet(self, resources: ScorerResources = RESOURCES) -> ScoringFleet:
        fleet = ScoringFleet(self.group, resources, lambda kind, _, /, **data: self.events.append((kind, data)))
        fleet.start(REWARD)
        fleet.ready()
        return fleet

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = tempfile.mkdtemp(prefix="sc-", dir="/tmp")
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, object_store_memory=100 << 20)
    spec: ActorSpec = replace(scoring_spec(RESOURCES), worker=FaultyWorker, env={"FROZEN": f"{folder}/frozen"})
    group = ActorGroup(spec, placement_group([{"CPU": 0.5}] * 2), 0)
    yield Bench(group)
    group.kill()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.slow
def test_scores_come_in_order_also_from_workers_that_were_killed(bench: Bench) -> None:
    fleet = bench.fleet()
    items = [RIGHT if i % 5 in (0, 3) else WRONG for i in range(101)]
    expected = [float(i % 5 in (0, 3)) for i in range(101)]
    assert [s.reward for s in fleet.score(items, timeout_s=60)] == expected
    assert fleet.score([], timeout_s=60) == []
    [first, second] = bench.group.call("pids", timeout_s=30)
    assert len(first) == len(second) == 2
    os.kill(psutil.Process(first[0]).ppid(), signal.SIGKILL)
    assert gone(first)
    assert [s.reward for s in fleet.score(items, timeout_s=60)] == expected
    assert bench.kinds() == ["scorer_dead", "scorer_restarted"]
    assert {data["scorer"] for _, data in bench.events} == {0}
    assert gone(first)


@pytest.mark.slow
@pytest.mark.chaos
def test_items_that_take_their_workers_with_them_get_a_status_and_the_others_their_scores(bench: Bench) -> None:
    """80 items on two workers: batches of 10. The one with the poison costs two workers, then it is given up."""
    fleet = bench.fleet()
    items = [RIGHT if i % 2 else WRONG for i in range(80)]
    items[33] = POISON
    scores = fleet.score(items, timeout_s=100)
    assert [s.status for s in scores] == ["scored"] * 30 + ["crashed"] * 10 + ["scored"] * 40
    assert all("2 reward workers were lost" in s.detail and s.reward != s.reward for s in scores[30:40])
    assert [s.reward for s in scores[:30] + scores[40:]] == [float(i % 2) for i in range(70)]
    assert bench.kinds() == ["scorer_dead", "scorer_restarted"] * 2


@pytest.mark.slow
@pytest.mark.chaos
def test_restarts_have_a_budget(bench: Bench) -> None:
    fleet = bench.fleet(RESOURCES.model_copy(update={"restarts": 1}))
    with pytest.raises(NoneLeft, match=r"scorer\.restarts=1 are used up"):
        fleet.score([POISON, WRONG, WRONG, WRONG], timeout_s=100)
    assert bench.kinds() == ["scorer_dead", "scorer_restarted", "scorer_dead"]


@pytest.mark.slow
@pytest.mark.chaos
def test_a_frozen_worker_is_replaced_and_its_items_are_scored_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = bench.fleet()
    monkeypatch.setattr(fleet_module, "_START_TIMEOUT_S", 10.0)
    fleet._reward = REWARD.model_copy(update={"timeout_s": 0.05})
    items = [WRONG] * 16
    items[5] = ScoringItem("1 2 3>6", "freeze")
    assert {(s.status, s.reward) for s in fleet.score(items, timeout_s=100)} == {("scored", 0.0)}
    assert bench.kinds() == ["scorer_dead", "scorer_restarted"]
    assert "no answer to score in time" in bench.events[0][1]["cause"]


@pytest.mark.slow
def test_scoring_that_was_broken_off_leaves_nothing_to_the_next(bench: Bench) -> None:
    fleet = bench.fleet(RESOURCES.model_copy(update={"restarts": 9}))
    with pytest.raises(PhaseTimeout, match="reward-0"):
        fleet.score([RIGHT] * 4, timeout_s=0.0)
    assert [s.reward for s in fleet.score([WRONG] * 6, timeout_s=60)] == [0.0] * 6
    assert bench.kinds() == []


@pytest.mark.slow
def test_a_worker_that_loses_a_score_ends_the_job(bench: Bench) -> None:
    with pytest.raises(RewardFailure, match=r"expected 1 scores of reward-\d, one for each response, got 0"):
        bench.fleet().score([RIGHT, ScoringItem("1 2 3>6", "lose"), RIGHT], timeout_s=60)


def test_a_part_of_the_wrong_length_is_refused() -> None:
    score, other = Score(1.0, "scored"), Score(2.0, "scored")
    assert placed(range(7, 9), [score, other], 0) == {7: score, 8: other}
    for answer in ([score], [score] * 3):
        with pytest.raises(RewardFailure, match=r"expected 2 scores of reward-0.*got \d"):
            placed(range(7, 9), answer, 0)


def test_figures_by_status_and_component() -> None:
    scores = [
        Score(1.1, "scored", "1", parts={"answer": 1.0, "format": 1.0}, seconds=0.25),
        Score(0.1, "scored", "2", parts={"answer": 0.0, "format": 1.0}, seconds=0.5),
        Score(float("nan"), "timeout", seconds=3.0),
    ]
    assert score_figures(scores) == {
        "scores_scored": 2.0,
        "scores_timeout": 1.0,
        "scores_crashed": 0.0,
        "scores_invalid": 0.0,
        "reward_answer": 0.5,
        "reward_format": 1.0,
        "score_seconds_max": 3.0,
    }


def test_unknown_sources_are_counted() -> None:
    reward = RewardConfig(components=(AnswerReward(by_data_source=True),))
    assert unknown_sources(reward, ["math_dapo", "x", "aime2024", "x", ""]) == {"x": 2, "": 1}
    assert unknown_sources(RewardConfig(), ["x"]) == {}
