"""The driver's view of all reward workers: start, spread responses over them, count what came of it, stop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any, get_args

from sedsft.config import RewardConfig
from sedsft.records import Score, ScoreStatus, ScoringItem
from sedsft.rewards.registry import scorer_of
from services.actor_group import ActorGroup, ActorSpec
from services.errors import RewardFailure
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
        arguments = (reward, self._resources.processes)
        self._starting = [self._group.start(worker, "start", *arguments) for worker in range(len(self._group))]

    def ready(self) -> None:
        """Wait until every scoring process has loaded the scorer."""
        self._group.wait(self._starting, list(range(len(self._group))), "start", _START_TIMEOUT_S)

    def score(self, items: Sequence[ScoringItem], *, timeout_s: float) -> list[Score]:
        """A score for each item, in order. Neighbours go to different workers: hard prompts come in groups.

        Raises:
            RewardFailure: a worker gave another number of scores than it got items.
        """
        count = len(self._group)
        shares = [list(items[start::count]) for start in range(count)]
        return interleaved(shares, self._group.scatter("score", [[share] for share in shares], timeout_s=timeout_s))


def interleaved(shares: Sequence[Sequence[ScoringItem]], parts: Sequence[Sequence[Score]]) -> list[Score]:
    """Scores of all items from those of every worker's share; share s holds the items s, s + count, s + 2 count, ...

    Raises:
        RewardFailure: a part is not as long as its share.
    """
    for worker, (share, part) in enumerate(zip(shares, parts, strict=True)):
        if len(part) != len(share):
            raise RewardFailure(
                f"expected {len(share)} scores of reward-{worker}, one for each response, got {len(part)}; they cannot be told "
                "apart, so none is used"
            )
    return [parts[index % len(shares)][index // len(shares)] for index in range(sum(map(len, shares)))]


def score_figures(scores: Sequence[Score]) -> dict[str, float]:
    """Statistics of an iteration's scores, as figures of its step.

    `scores_<status>` counts every status, zeros included. `reward_<component>` is the mean of a component over scored samples,
    before its weight; `score_seconds_max` the longest time that one scoring took.
    """
    figures: dict[str, float] = {
        f"scores_{status}": float(sum(score.status == status for score in scores)) for status in get_args(ScoreStatus)
    }
    scored = [score for score in scores if score.status == "scored"]
    for name in dict.fromkeys(name for score in scored for name in score.parts):
        figures[f"reward_{name}"] = fmean(score.parts[name] for score in scored if name in score.parts)
    return figures | {"score_seconds_max": max((score.seconds for score in scores), default=0.0)}


def unknown_sources(reward: RewardConfig, data_sources: Sequence[str]) -> dict[str, int]:
    """How many rows of which data sources fall to the default scorer because no scorer is known for them."""
    answer = reward.answer
    if answer is None:
        return {}
    return dict(Counter(source for source in data_sources if not scorer_of(answer, source)[1]))
