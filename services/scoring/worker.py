"""The Ray actor that owns scoring processes."""

from __future__ import annotations

from collections.abc import Sequence

from sedsft.config import RewardConfig
from sedsft.records import Score, ScoringItem
from sedsft.rewards.pool import PoolLimits, ScorerStartError, ScoringPool, scoring_command
from services.errors import RewardFailure


class ScoringWorker:
    """Actor with a pool of scoring processes. Call it from one thread: the kernel kills the processes when it ends."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._pool: ScoringPool | None = None

    def start(self, reward: RewardConfig, processes: int) -> None:
        """Start the processes and wait until each can score.

        Raises:
            RewardFailure: a process did not get ready.
        """
        self._pool = ScoringPool(scoring_command(reward), PoolLimits(processes, reward.timeout_s, reward.memory_mb))
        try:
            self._pool.start()
        except ScorerStartError as error:
            raise self._failure(error) from error

    def score(self, items: Sequence[ScoringItem]) -> list[Score]:
        """A score for each item, in order. What goes wrong with an item is its status, never a reward.

        Raises:
            RewardFailure: a process that takes the place of another does not get ready.
        """
        assert self._pool is not None, "start the processes first"
        try:
            return self._pool.score(items)
        except ScorerStartError as error:
            raise self._failure(error) from error

    def pids(self) -> list[int]:
        """Process ids of the scoring processes."""
        assert self._pool is not None, "start the processes first"
        return self._pool.pids()

    def stop(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.stop()

    def _failure(self, error: ScorerStartError) -> RewardFailure:
        return RewardFailure(f"reward-{self._index}: {error}")
