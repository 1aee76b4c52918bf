"""Reward workers as Ray actors: order over workers, and no process left after a death."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group

from sedsft.config import AnswerReward, RewardConfig
from sedsft.records import Score, ScoringItem
from services.actor_group import ActorGroup
from services.errors import RewardFailure, WorkerDied
from services.jobspec import ScorerResources
from services.scoring.fleet import ScoringFleet, interleaved, score_figures, scoring_spec, unknown_sources

RESOURCES = ScorerResources(workers=2, cpus_per_worker=0.5, processes=2)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[ActorGroup]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = tempfile.mkdtemp(prefix="sc-", dir="/tmp")
    ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False, object_store_memory=100 << 20)
    yield ActorGroup(scoring_spec(RESOURCES), placement_group([{"CPU": 0.5}] * 2), 0)
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_scores_come_in_order_and_processes_die_with_their_actor(group: ActorGroup) -> None:
    fleet = ScoringFleet(group, RESOURCES)
    fleet.start(RewardConfig(name="countdown", timeout_s=5, memory_mb=512))
    fleet.ready()
    right, wrong = ScoringItem("1 2 3>6", "1+2=3,3+3=6"), ScoringItem("1 2 3>6", "1+2=4")
    items = [right if i % 5 in (0, 3) else wrong for i in range(101)]
    assert [s.reward for s in fleet.score(items, timeout_s=60)] == [float(i % 5 in (0, 3)) for i in range(101)]
    assert fleet.score([], timeout_s=60) == []
    [first, second] = group.call("pids", timeout_s=30)
    assert len(first) == len(second) == 2
    os.kill(psutil.Process(first[0]).ppid(), signal.SIGKILL)
    deadline = time.monotonic() + 5
    while any(psutil.pid_exists(pid) for pid in first) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(psutil.pid_exists(pid) for pid in first)
    with pytest.raises(WorkerDied, match="reward-0"):
        fleet.score(items, timeout_s=60)
    group.kill()


def test_a_part_of_the_wrong_length_is_refused() -> None:
    item, score = ScoringItem("1", "1"), Score(1.0, "scored")
    assert interleaved([[item, item], [item]], [[score, Score(2.0, "scored")], [Score(3.0, "scored")]]) == [
        score,
        Score(3.0, "scored"),
        Score(2.0, "scored"),
    ]
    for parts in ([[score], [score]], [[score] * 3, [score]]):
        with pytest.raises(RewardFailure, match=r"expected 2 scores of reward-0.*got \d"):
            interleaved([[item, item], [item]], parts)


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
