"""The asynchronous mode: engines sample all the time but for weight syncs, trainers take the oldest groups that are ready."""

from __future__ import annotations

from concurrent.futures import Future

from sedsft.records import RolloutGroup
from services.loops.engines import check_errors
from services.loops.group_flow import GroupFlow
from services.loops.overlap import Fit, end, in_background
from services.loops.rounds import Rounds, sampling
from services.loops.timeline import SCORERS

_WAIT_S = 0.5


class Async:
    """One thread streams samples between two weight syncs, one scores what is sampled.

    Recorded iterations are used as they are. What was under way when a run was killed is asked for again with the same seeds,
    and is then drawn with the weights of the iteration that the run goes on with.
    """

    def __init__(self, rounds: Rounds, fit: Fit, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self._rounds, self._fit = rounds, fit
        self._recorded = rounds.recording.seeds()
        self._flow = GroupFlow(rounds, max_staleness, self._recorded.values())
        self._stream: Future[None] | None = None
        self._scorer: Future[None] | None = None

    def groups(self, iteration: int) -> list[RolloutGroup]:
        """Read, or the oldest that are ready as soon as there are enough."""
        recorded = self._rounds.read(iteration, self.max_staleness)
        if recorded is not None:
            self._flow.read(iteration, recorded)
            return recorded
        self._flow.unread(self._recorded.pop(iteration, set()))
        groups = self._flow.use(iteration)
        while groups is None:
            self._rounds.run.phase("rollout", iteration, self._rounds.config.iterations)
            self._go(iteration)
            self._flow.check_supply(iteration)
            groups = self._flow.use(iteration, _WAIT_S)
        # Over the iteration and not over each group: in one of eight samples a single error would be too many.
        scores = [score for group in groups for score in group.scores]
        check_errors(scores, self._rounds.config.reward.max_error_share)
        self._rounds.recording.write(iteration, groups)
        return groups

    def begin_next(self, iteration: int) -> None:
        """Engines go on, or begin where the next iteration is the first that is not recorded."""
        if iteration < self._rounds.config.iterations and not self._rounds.recording.holds(iteration + 1):
            self._go(iteration)

    def settle(self, iteration: int) -> None:
        """Let the engines finish what they have."""
        self._flow.shut()
        if self._stream is not None:
            if not self._stream.done():
                self._rounds.run.phase("rollout", iteration, self._rounds.config.iterations)
            self._stream.result()
            self._stream = None

    def wants_weights(self, iteration: int) -> bool:
        """Whether the next iteration is not recorded and something is still to be asked for."""
        return not self._rounds.recording.holds(iteration + 1) and self._flow.unasked > 0

    def check(self) -> int:
        """Groups in engines, with scorers or ready."""
        return self._flow.checked()

    def close(self) -> None:
        """Break off what is sampled."""
        self._flow.close()
        end(self._rounds, *(future for future in (self._stream, self._scorer) if future is not None))

    def _go(self, iteration: int) -> None:
        """Have engines that are quiet sample with the weights of the iteration; raise what went wrong in a thread."""
        if self._scorer is None:
            self._scorer = in_background(self._score, "scores")
        if self._scorer.done():
            self._scorer.result()
        if self._stream is not None and self._stream.done():
            self._stream.result()
            self._stream = None
        if self._stream is None and self._flow.unasked:
            self._fit()
            self._flow.open(iteration)
            config = self._rounds.config
            self._stream = in_background(
                lambda: self._rounds.engines.stream(self._flow, config.group_size, sampling(config)), f"rollout-{iteration}"
            )

    def _score(self) -> None:
        while not self._flow.closed:
            if groups := self._flow.unscored(_WAIT_S):
                with self._rounds.timeline.span("score", SCORERS):
                    scored = self._rounds.engines.scored(groups)
                self._flow.scored(scored)
