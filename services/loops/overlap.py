"""Who waits for whom between sampling and training: the modes of the RL loop, which differ in nothing else.

The loop calls, for each iteration n in turn: `groups(n)`, `begin_next(n)`, trains, `settle(n)`, and saves. Weights of iteration
n are those that its update begins with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol, TypeVar

from sedsft.records import RolloutGroup
from services.loops.rounds import Rounds

ResultT = TypeVar("ResultT")
Fit = Callable[[], None]
"""Brings the engines, which must be quiet, to the trainer's weights of now, unless they hold them."""

_JOIN_S = 60.0


class Overlap(Protocol):
    """A mode. Every method is called on the loop's thread."""

    max_staleness: int
    """Largest number of updates between the weights that drew a sample and those that its update begins with."""

    def groups(self, iteration: int) -> list[RolloutGroup]:
        """Scored and recorded groups of the iteration, which are thereby used; waits for them."""

    def begin_next(self, iteration: int) -> None:
        """The iteration's update is about to begin: engines may go ahead."""

    def settle(self, iteration: int) -> None:
        """The iteration's update is done: the engines become quiet, and what they have begun with weights that the trainers
        do not hold any more is recorded."""

    def wants_weights(self, iteration: int) -> bool:
        """Whether the engines sample anything more with the weights behind the iteration."""

    def check(self) -> int:
        """Number of groups that were asked for and are neither used nor dropped.

        Raises:
            GroupsLost: they do not make up the difference between those submitted and those accepted or dropped.
        """

    def close(self) -> None:
        """End whatever still runs in other threads."""


class Sync:
    """Engines and trainers take turns."""

    max_staleness = 0

    def __init__(self, rounds: Rounds, fit: Fit) -> None:
        self._rounds, self._fit = rounds, fit

    def groups(self, iteration: int) -> list[RolloutGroup]:
        """Read, or drawn now with the iteration's own weights."""
        groups = self._rounds.read(iteration, self.max_staleness)
        if groups is None:
            self._fit()
            groups = self._rounds.draw(iteration, phase_of(self._rounds, iteration))
        else:
            self._rounds.counts.submitted += len(groups)
        self._rounds.counts.accepted += len(groups)
        return groups

    def begin_next(self, iteration: int) -> None:
        """Engines wait for the update."""

    def settle(self, iteration: int) -> None:
        """They are quiet."""

    def wants_weights(self, iteration: int) -> bool:
        """Always, and behind the last iteration for the proof that engines can sample what was trained."""
        return not self._rounds.recording.holds(iteration + 1)

    def check(self) -> int:
        """None: what is drawn is used."""
        self._rounds.counts.check(0)
        return 0

    def close(self) -> None:
        """Nothing runs."""


class OneStepOff:
    """While iteration n is trained, n + 1 is sampled with the weights of n.

    Iteration 1 is drawn with its own weights. A checkpoint behind n is saved only when n + 1 is recorded, so a run that goes on
    from it draws n + 2 with the weights of n + 1, as the run that was killed would have.
    """

    max_staleness = 1

    def __init__(self, rounds: Rounds, fit: Fit) -> None:
        self._rounds, self._fit = rounds, fit
        self._next: Future[list[RolloutGroup]] | None = None

    def groups(self, iteration: int) -> list[RolloutGroup]:
        """What the iteration before has begun; read or drawn now where there was none."""
        if self._next is None:
            self._begin(iteration)
        assert self._next is not None, "expected groups under way"
        if not self._next.done():
            self._rounds.run.phase("rollout", iteration, self._rounds.config.iterations)
        groups, self._next = self._next.result(), None
        self._rounds.counts.accepted += len(groups)
        return groups

    def begin_next(self, iteration: int) -> None:
        """The next iteration is sampled in a thread of its own."""
        if iteration < self._rounds.config.iterations:
            self._begin(iteration + 1)

    def settle(self, iteration: int) -> None:
        """Wait until the next iteration is recorded."""
        if self._next is not None:
            if not self._next.done():
                self._rounds.run.phase("rollout", iteration + 1, self._rounds.config.iterations)
            self._next.result()

    def wants_weights(self, iteration: int) -> bool:
        """Whether the iteration after the next, which is sampled already, will be sampled."""
        return iteration + 2 <= self._rounds.config.iterations and not self._rounds.recording.holds(iteration + 2)

    def check(self) -> int:
        """Groups of the next iteration, once it is recorded."""
        running = len(self._next.result()) if self._next is not None else 0
        self._rounds.counts.check(running)
        return running

    def close(self) -> None:
        """Break off what is sampled."""
        if self._next is not None:
            end(self._rounds, self._next)

    def _begin(self, iteration: int) -> None:
        """Read the iteration, or draw it in the background with the weights of now."""
        recorded = self._rounds.read(iteration, self.max_staleness)
        if recorded is None:
            self._fit()
            self._next = in_background(lambda: self._rounds.draw(iteration, lambda _: None), f"rollout-{iteration}")
        else:
            self._rounds.counts.submitted += len(recorded)
            self._next = Future()
            self._next.set_result(recorded)


def phase_of(rounds: Rounds, iteration: int) -> Callable[[str], None]:
    """Tells the run that a phase of the iteration has begun."""
    return lambda phase: rounds.run.phase(phase, iteration, rounds.config.iterations)


def in_background(work: Callable[[], ResultT], name: str) -> Future[ResultT]:
    """Result of `work`, which runs on a thread of its own; that does not keep the process alive."""
    future: Future[ResultT] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - the thread's border: whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def end(rounds: Rounds, *running: Future[None] | Future[list[RolloutGroup]]) -> None:
    """Break off sampling and wait for the threads; what they end with does not matter any more."""
    with rounds.engines.halted():
        for future in running:
            try:
                future.exception(timeout=_JOIN_S)
            except TimeoutError:
                rounds.run.event("rollout_stuck", f"sampling did not end within {_JOIN_S:.0f} s of being broken off")
