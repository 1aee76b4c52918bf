"""Rollout engines and scorers of the current stage, kept for the next one when that needs just the same.

Starting an engine takes far longer than loading weights into it, so consecutive `rl` and `eval` stages over one architecture
share engines. Weights always arrive through a verified sync, so a reused engine cannot serve what it held before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from sedsft.config import Precision, RewardConfig, SamplingConfig
from sedsft.records import Prompt, RolloutGroup, Score, ScoringItem
from services.errors import RewardFailure
from services.jobspec import RolloutResources, ScorerResources
from services.placement import actor_groups
from services.rollout.feed import Feed
from services.rollout.fleet import RolloutFleet, prompt_seed, rollout_spec
from services.rollout.health import State
from services.run import Run
from services.scoring.fleet import ScoringFleet, scoring_spec

START_TIMEOUT_S = 1800.0
GENERATE_TIMEOUT_S = 7200.0
SCORE_TIMEOUT_S = 3600.0

# Entries of the model's settings that say nothing about its shape or about where its answers end.
_VOLATILE = (
    "_from_model_config",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True)
class EngineRequest:
    """What a stage needs to sample and to score."""

    model_path: Path
    precision: Precision
    rollout: RolloutResources
    scorer: ScorerResources
    reward: RewardConfig

    def key(self) -> tuple[object, ...]:
        """Equal for requests that can share engines."""
        settings = [_entries(self.model_path / name) for name in ("config.json", "generation_config.json")]
        # A reused engine goes on decoding with the tokenizer it was started with.
        tokenizer = b"".join(path.read_bytes() for name in _TOKENIZER if (path := self.model_path / name).exists())
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode() + tokenizer).hexdigest()
        return digest, self.precision, self.rollout, self.scorer, self.reward


def _entries(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in entries.items() if name not in _VOLATILE}


class Engines:
    """At most one set of engines and scorers at a time."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stack = ExitStack()
        self._key: tuple[object, ...] | None = None
        self._started = False
        self._version = 0
        self._wanted = 0
        self._fleet: RolloutFleet | None = None
        self._scorers: ScoringFleet | None = None
        run.engines_now = self.counts

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """End engines and scorers and free what they reserved."""
        self._stack.close()
        self._key = self._fleet = self._scorers = None

    def start(self, request: EngineRequest) -> None:
        """Begin to start engines for `request`, unless those that run fit; others are released first. `ready` waits."""
        key = request.key()
        if self._key == key:
            return
        self.release()
        specs = [rollout_spec(request.rollout), scoring_spec(request.scorer)]
        engines, scorers = self._stack.enter_context(actor_groups(specs, self._run.job_id))
        self._scorers = ScoringFleet(scorers, request.scorer, self._run.event)
        self._scorers.start(request.reward)
        self._fleet = RolloutFleet(engines, request.rollout, self._run.event)
        self._stack.callback(self._fleet.close)
        self._fleet.start(str(request.model_path), request.precision)
        self._wanted = request.rollout.workers
        self._key = key
        self._started = False

    def ready(self) -> RolloutFleet:
        """The engines that `start` asked for. They hold no known weights until a sync."""
        assert self._fleet is not None, "start engines first"
        assert self._scorers is not None, "start engines first"
        if not self._started:
            self._scorers.ready()
            self._fleet.ready(timeout_s=START_TIMEOUT_S)
            self._started = True
        return self._fleet

    def resize(self, workers: int) -> bool:
        """Have so many engines; nobody waits for new ones. False where there are none now. Any thread may call it."""
        fleet = self._fleet
        if fleet is None or self._key is None:
            return False
        if workers != self._wanted:
            self._wanted = workers
            fleet.want(workers)
        return True

    def counts(self) -> dict[str, int] | None:
        """Engines `wanted`, `alive` and `ready`; None where there are none now. Any thread may call it."""
        fleet = self._fleet
        if fleet is None or self._key is None:
            return None
        states = list(fleet.states().values())
        alive = sum(state is not State.DEAD for state in states)
        return {"wanted": self._wanted, "alive": alive, "ready": states.count(State.READY)}

    def next_version(self) -> int:
        """Number of the next weights, never given before."""
        self._version += 1
        return self._version

    def use_version(self, version: int) -> None:
        """Take note of a number that a stage which goes on gives the weights that had it before."""
        self._version = max(self._version, version)

    def sample(self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, seed: int) -> list[RolloutGroup]:
        """`group_size` responses for each prompt, not yet scored."""
        assert self._fleet is not None, "start engines first"
        groups = self._fleet.generate(prompts, group_size, sampling, seed, timeout_s=GENERATE_TIMEOUT_S)
        return [
            RolloutGroup(prompt, samples, seed=prompt_seed(seed, index))
            for index, (prompt, samples) in enumerate(zip(prompts, groups, strict=True))
        ]

    def stream(self, feed: Feed, group_size: int, sampling: SamplingConfig) -> None:
        """`group_size` responses for each prompt that the feed gives, until it ends."""
        assert self._fleet is not None, "start engines first"
        self._fleet.stream(feed, group_size, sampling, timeout_s=GENERATE_TIMEOUT_S)

    def halted(self) -> AbstractContextManager[None]:
        """Inside the block, calls that sample in other threads end with `Halted`."""
        assert self._fleet is not None, "start engines first"
        return self._fleet.halted()

    def score(self, groups: Sequence[RolloutGroup], max_error_share: float) -> list[RolloutGroup]:
        """`scored`, when not too many samples have no score.

        Raises:
            RewardFailure: more than `max_error_share` of the samples could not be scored.
        """
        scored = self.scored(groups)
        check_errors([score for group in scored for score in group.scores], max_error_share)
        return scored

    def scored(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        """The groups with a score, or the reason why there is none, for every sample."""
        assert self._scorers is not None, "start engines first"
        items = [
            ScoringItem(group.prompt.answer, sample.text, len(sample.response_ids), group.prompt.data_source)
            for group in groups
            for sample in group.samples
        ]
        rest = iter(self._scorers.score(items, timeout_s=SCORE_TIMEOUT_S))
        return [replace(group, scores=tuple(next(rest) for _ in group.samples)) for group in groups]


def check_errors(scores: Sequence[Score], max_error_share: float) -> None:
    """Raise `RewardFailure` when more than the share, or all, of the samples have no score."""
    errors = [score for score in scores if score.status != "scored"]
    if len(errors) == len(scores) or len(errors) > max_error_share * len(scores):
        counts = {status: sum(score.status == status for score in errors) for status in ("timeout", "crashed", "invalid")}
        raise RewardFailure(
            f"expected at most {max_error_share:.1%} of samples without a score, got {len(errors)} of {len(scores)} {counts}; "
            f"first: {errors[0].detail or errors[0].status}. Check the scorer and its gold answers, or raise reward.timeout_s, "
            "reward.memory_mb or reward.max_error_share"
        )
