"""The driver's view of all reward workers: start, hand out responses, replace those that die, count what came of it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, Protocol, get_args

from sedsft.config import RewardConfig
from sedsft.records import Score, ScoreStatus, ScoringItem
from sedsft.rewards.pool import unscored
from sedsft.rewards.registry import scorer_of
from services.actor_group import ActorGroup, ActorSpec, first_ready
from services.errors import NoneLeft, PhaseTimeout, RewardFailure, WorkerDied
from services.jobspec import ScorerResources
from services.scoring.worker import ScoringWorker
from services.stacks import save_stacks

log = logging.getLogger("sedsft.scoring")

_START_TIMEOUT_S = 180.0
_MOST_ITEMS = 256
_PARTS = 4
"""Batches that each of several workers gets at least, where there are items for them."""
_LOST = 2
"""Workers that a batch may be lost with; then it is taken for the cause."""
_RESTART_WINDOW_S = 3600.0


class EventSink(Protocol):
    """Where deaths and restarts are told: `Run.event`."""

    def __call__(self, kind: str, message: str, /, **data: Any) -> None:
        """Record one event."""


def _logged(kind: str, message: str, /, **_: Any) -> None:
    log.info("%s: %s", kind, message)


def scoring_spec(resources: ScorerResources) -> ActorSpec:
    """How the reward actors are spawned."""
    return ActorSpec("reward", ScoringWorker, resources.workers, resources.cpus_per_worker, elastic=True)


@dataclass
class _Batch:
    """Places of neighbouring items, and with how many workers they were lost."""

    places: range
    lost: int = 0


@dataclass(frozen=True)
class _Call:
    """What a worker does now: start, or score `batch`."""

    worker: int
    method: str
    deadline_s: float
    batch: _Batch | None = None


class ScoringFleet:
    """All reward workers with one scorer. One that dies or does not answer is replaced, and its items are scored again.

    Any thread may score; calls exclude each other.
    """

    def __init__(self, group: ActorGroup, resources: ScorerResources, event: EventSink = _logged) -> None:
        self._group = group
        self._resources = resources
        self._event = event
        self._reward = RewardConfig()
        self._restarted_s: deque[float] = deque()
        self._calls: dict[Any, _Call] = {}
        self._lock = threading.Lock()

    def start(self, reward: RewardConfig) -> None:
        """Begin to start every worker's scoring processes; `ready` waits for them."""
        self._reward = reward
        for worker in range(len(self._group)):
            self._start(worker)

    def ready(self) -> None:
        """Wait until every scoring process has loaded the scorer.

        Raises:
            RewardFailure: the scorer does not load.
            NoneLeft: a worker died as often as it may.
            PhaseTimeout: a worker did not start in time.
        """
        while self._calls:
            self._turn(time.monotonic() + _START_TIMEOUT_S, {})

    def score(self, items: Sequence[ScoringItem], *, timeout_s: float) -> list[Score]:
        """A score for each item, in order. A batch that two workers were lost with gets the status `crashed`.

        Raises:
            RewardFailure: a worker gave another number of scores than it got items, or its scorer does not load.
            NoneLeft: a worker died as often as it may.
            PhaseTimeout: not all scored within `timeout_s` seconds.
        """
        with self._lock:
            return self._score(items, time.monotonic() + timeout_s)

    def _score(self, items: Sequence[ScoringItem], deadline: float) -> list[Score]:
        # What a call before this one left behind when it raised: its workers are busy, its answers nobody's.
        self._calls = {ref: replace(call, batch=None) for ref, call in self._calls.items()}
        waiting = _batches(len(items), len(self._group))
        scores: dict[int, Score] = {}
        while len(scores) < len(items):
            busy = {call.worker for call in self._calls.values()}
            for worker in [worker for worker in range(len(self._group)) if worker not in busy and waiting]:
                self._hand_out(worker, waiting.popleft(), items)
            for batch in self._turn(deadline, scores):
                if batch.lost < _LOST:
                    waiting.appendleft(batch)
                    continue
                reason = f"{batch.lost} reward workers were lost while they scored it or its neighbours"
                scores |= {place: unscored("crashed", reason) for place in batch.places}
        return [scores[place] for place in range(len(items))]

    def _start(self, worker: int) -> None:
        ref = self._group.start(worker, "start", self._reward, self._resources.processes)
        self._calls[ref] = _Call(worker, "start", time.monotonic() + _START_TIMEOUT_S)

    def _hand_out(self, worker: int, batch: _Batch, items: Sequence[ScoringItem]) -> None:
        share = [items[place] for place in batch.places]
        # Every item may end with the death of its process, and another one takes over.
        limit_s = _START_TIMEOUT_S + len(share) * 2 * self._reward.timeout_s
        ref = self._group.start(worker, "score", share)
        self._calls[ref] = _Call(worker, "score", time.monotonic() + limit_s, batch)

    def _turn(self, deadline_s: float, scores: dict[int, Score]) -> list[_Batch]:
        """Wait for one answer and put its scores where they belong; the batches of workers that were lost."""
        first = min([deadline_s, *(call.deadline_s for call in self._calls.values())])
        ready = first_ready(list(self._calls), max(0.0, first - time.monotonic()))
        if not ready:
            return self._late(deadline_s)
        call = self._calls.pop(ready[0])
        try:
            answer = self._group.wait(ready, [call.worker], call.method, 0.0)[0]
        except WorkerDied as error:
            return self._lost(call, error.message)
        if call.batch is not None:
            scores |= placed(call.batch.places, answer, call.worker)
        return []

    def _late(self, deadline_s: float) -> list[_Batch]:
        """Give up the workers that are past their own deadline; past the common one, the phase."""
        now = time.monotonic()
        late = {ref: call for ref, call in self._calls.items() if now >= min(call.deadline_s, deadline_s)}
        save_stacks({f"reward-{call.worker}": self._group.actors[call.worker] for call in late.values()})
        if now >= deadline_s:
            names = ", ".join(f"reward-{call.worker}" for call in late.values())
            raise PhaseTimeout(
                f"expected all responses to be scored in time, {names} did not answer; the job's log has the stacks; add "
                "reward workers or processes, or lower reward.timeout_s"
            )
        batches = []
        for ref, call in late.items():
            del self._calls[ref]
            batches += self._lost(call, f"no answer to {call.method} in time")
        return batches

    def _lost(self, call: _Call, cause: str) -> list[_Batch]:
        """Put a new worker in the place of one that died or is late; what it scored is to be scored again."""
        name, now = f"reward-{call.worker}", time.monotonic()
        self._event("scorer_dead", f"{name} was lost during {call.method}: {cause}", scorer=call.worker, cause=cause)
        while self._restarted_s and now - self._restarted_s[0] >= _RESTART_WINDOW_S:
            self._restarted_s.popleft()
        if len(self._restarted_s) >= self._resources.restarts:
            raise NoneLeft(
                f"expected reward workers to live, {name} died and scorer.restarts={self._resources.restarts} are used up: "
                f"{cause}. Look at its log (memory limit, signal, node loss); raise scorer.restarts once the cause is gone"
            )
        self._restarted_s.append(now)
        self._group.end(call.worker)
        self._group.replace(call.worker)
        self._start(call.worker)
        self._event("scorer_restarted", f"{name} is started again", scorer=call.worker)
        if call.batch is None:
            return []
        call.batch.lost += 1
        return [call.batch]


def _batches(count: int, workers: int) -> deque[_Batch]:
    """Items in runs of equal length, several for each worker: hard prompts come in groups, so whoever is done takes more."""
    parts = 1 if workers == 1 else _PARTS * workers
    size = max(1, min(_MOST_ITEMS, -(-count // parts)))
    return deque(_Batch(range(first, min(first + size, count))) for first in range(0, count, size))


def placed(places: range, answer: Sequence[Score], worker: int) -> dict[int, Score]:
    """The scores of a batch by the places of its items.

    Raises:
        RewardFailure: another number of scores than of items.
    """
    if len(answer) != len(places):
        raise RewardFailure(
            f"expected {len(places)} scores of reward-{worker}, one for each response, got {len(answer)}; they cannot be told "
            "apart, so none is used"
        )
    return dict(zip(places, answer, strict=True))


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
