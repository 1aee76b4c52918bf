"""Groups on their way through an asynchronous stage: asked for, sampled, scored, used or dropped. Bookkeeping under one lock.

A ticket is a place of an iteration, with its prompt and its seed. Every ticket is used once in the run, in the order in which
its group is finished, whatever iteration that falls into; one whose group was dropped is asked for again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import product

from sedsft.records import RolloutGroup, Sample
from services.errors import GroupsLost
from services.loops.group_counts import GroupCounts, within
from services.loops.rounds import Rounds
from services.loops.timeline import ENGINES
from services.rollout.feed import Ask

Ticket = tuple[int, int]
"""Iteration from 1, and place in it."""


class GroupFlow:
    """The feed of the engines on one side, iterations on the other; submitted = accepted + dropped + running in every step.

    Engines hold the weights of iteration `opened`, so groups that are asked for now can be used up to iteration
    `opened` + `max_staleness`. That many iterations' groups, less those used, may be under way: with the oldest used first none
    gets too old unless a group is drawn anew.
    """

    def __init__(self, rounds: Rounds, max_staleness: int, recorded: Iterable[Set[int]]) -> None:
        """`recorded` are the seeds of the groups of each recorded iteration: their tickets are used."""
        self._rounds, self._max_staleness = rounds, max_staleness
        self._counts: GroupCounts = rounds.counts
        self._size = rounds.config.prompts_per_iteration
        self._changed = threading.Condition()
        used = {seed for seeds in recorded for seed in seeds}
        self._waiting: deque[Ticket] = deque(t for t in self._all_tickets() if not used or rounds.seed(*t) not in used)
        self._tickets: dict[int, Ticket] = {}
        self._sampling: set[int] = set()
        self._unscored: list[RolloutGroup] = []
        self._scoring: list[RolloutGroup] = []
        self._ready: list[RolloutGroup] = []
        self._opened = 0
        self._used = 0
        self._span: int | None = None
        self.closed = False

    # ---------------------------------------------------------------------------------------- the engines' side

    def open(self, iteration: int) -> None:
        """Engines hold the weights of the iteration and may begin groups."""
        with self._changed:
            self._opened = iteration

    def shut(self) -> None:
        """Nothing more is begun until the next `open`."""
        with self._changed:
            self._opened = 0

    @property
    def ended(self) -> bool:
        """True when nothing is begun until further notice."""
        return not self._opened or not self._waiting

    def take(self) -> Sequence[Ask]:
        """Tickets whose groups begin now."""
        with self._changed:
            if not self._opened:
                return []
            room = (self._opened + self._max_staleness - self._used) * self._size - self._running()
            tickets = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
            asks = [self._rounds.ask(*ticket) for ticket in tickets]
            for ask, ticket in zip(asks, tickets, strict=True):
                self._tickets[ask.seed] = ticket
                self._sampling.add(ask.seed)
            self._counts.submitted += len(asks)
            if asks and self._span is None:
                self._span = self._rounds.timeline.begin("rollout", ENGINES)
            self._check()
            return asks

    def put(self, ask: Ask, samples: tuple[Sample, ...]) -> None:
        """A group is sampled."""
        with self._changed:
            self._sampling.remove(ask.seed)
            self._unscored.append(RolloutGroup(ask.prompt, tuple(samples), seed=ask.seed))
            if not self._sampling and self._span is not None:
                self._rounds.timeline.end(self._span)
                self._span = None
            self._check()
            self._changed.notify_all()

    # ---------------------------------------------------------------------------------------- the scorers' side

    def unscored(self, timeout_s: float) -> list[RolloutGroup]:
        """Groups to score now; waits for some for at most `timeout_s` seconds, or until `close`."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._unscored) or self.closed, timeout_s)
            self._scoring, self._unscored = self._unscored, []
            return self._scoring

    def scored(self, groups: Sequence[RolloutGroup]) -> None:
        """What `unscored` gave, with its scores."""
        with self._changed:
            self._scoring = []
            self._ready += groups
            self._check()
            self._changed.notify_all()

    # --------------------------------------------------------------------------------------------- the trainer's

    def use(self, iteration: int, wait_s: float = 0.0) -> list[RolloutGroup] | None:
        """The oldest groups that the iteration may use, in the order of their tickets; waits for enough of them for at most
        `wait_s` seconds, and is None when there are not.

        What is too old by then is dropped, and its tickets are the next to be asked for.
        """
        version = self._rounds.version(iteration)
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_fresh(version) >= self._size, wait_s):
                return None
            self._ready.sort(key=lambda group: (group.samples[0].weight_version, self._tickets[group.seed]))
            chosen, self._ready = self._ready[: self._size], self._ready[self._size :]
            self._counts.accepted += len(chosen)
            self._used = iteration
            self._check()
            return sorted(chosen, key=lambda group: self._tickets.pop(group.seed))

    def _num_fresh(self, version: int) -> int:
        """Groups that are ready, once those too old for an update of `version` are dropped."""
        fresh: list[RolloutGroup] = []
        for group in self._ready:
            if within([group], version, self._max_staleness):
                fresh.append(group)
            else:
                self._counts.dropped += 1
                self._waiting.appendleft(self._tickets.pop(group.seed))
        self._ready = fresh
        self._check()
        return len(fresh)

    def read(self, iteration: int, groups: Sequence[RolloutGroup]) -> None:
        """The iteration uses recorded groups."""
        with self._changed:
            self._used = iteration
            self._counts.submitted += len(groups)
            self._counts.accepted += len(groups)
            self._check()

    def unread(self, seeds: Set[int]) -> None:
        """Groups of these seeds are recorded, but cannot be used: their tickets are asked for again."""
        if seeds:
            again = [ticket for ticket in self._all_tickets() if self._rounds.seed(*ticket) in seeds]
            with self._changed:
                self._waiting.extendleft(reversed(again))

    def close(self) -> None:
        """Nobody waits here any more."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    @property
    def unasked(self) -> int:
        """Tickets that wait to be asked for."""
        return len(self._waiting)

    def _all_tickets(self) -> Iterator[Ticket]:
        return product(range(1, self._rounds.config.iterations + 1), range(self._size))

    def checked(self) -> int:
        """Groups that were asked for and are neither used nor dropped; raises `GroupsLost` when the counts do not add up."""
        with self._changed:
            self._check()
            return self._running()

    def _running(self) -> int:
        """Counted where they are."""
        return len(self._sampling) + len(self._unscored) + len(self._scoring) + len(self._ready)

    def _check(self) -> None:
        self._counts.check(self._running())

    def check_supply(self, iteration: int) -> None:
        """Raise `GroupsLost` when the iteration waits for groups that nobody will bring."""
        with self._changed:
            if self._running() < self._size and not self._waiting:
                raise GroupsLost(
                    f"expected {self._size} groups for iteration {iteration}, {self._running()} are under way and no ticket is "
                    "left; the recordings hold groups of other iterations twice, report it"
                )
