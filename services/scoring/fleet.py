"""The driver's view of all reward workers: start, spread responses over them, stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sedsft.config import RewardConfig
from sedsft.records import Score
from services.actor_group import ActorGroup, ActorSpec
from services.jobspec import ScorerResources
from services.scoring.worker import ScoringWorker

_START_TIMEOUT_S = 180.0


def scoring_spec(resources: ScorerResources) -> ActorSpec:
    """How the reward actors are spawned."""
    return ActorSpec(role="reward", worker=ScoringWorker, count=resources.workers, cpus=resources.cpus_per_worker)


class ScoringFleet:
    """All reward workers with one scorer."""

    def __init__(self, group: ActorGroup, resources: ScorerResources) -> None:
        self._group = group
        self._resources = resources
        self._starting: list[Any] = []

    def start(self, reward: RewardConfig) -> None:
        """Begin to start every worker's scoring processes; `ready` waits for them."""
        arguments = (reward.name, reward.timeout_s, reward.memory_mb, self._resources.processes)
        self._starting = [self._group.start(worker, "start", *arguments) for worker in range(len(self._group))]

    def ready(self) -> None:
        """Wait until every scoring process has loaded the scorer."""
        self._group.wait(self._starting, list(range(len(self._group))), "start", _START_TIMEOUT_S)

    def score(self, items: Sequence[tuple[str, str]], *, timeout_s: float) -> list[Score]:
        """A score for each (gold, response), in order. Neighbours go to different workers: hard prompts come in groups."""
        count = len(self._group)
        parts = self._group.scatter("score", [[list(items[start::count])] for start in range(count)], timeout_s=timeout_s)
        scores: list[Score | None] = [None] * len(items)
        for start, part in enumerate(parts):
            scores[start::count] = part
        return [score for score in scores if score is not None]
