"""Health of one engine as a state machine: pure, with the transition table as data and an injected clock.

Nothing here talks to an engine. The fleet reports what it saw as events and asks, after each round, what is `overdue`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """What an engine can be used for. Only READY serves."""

    STARTING = "starting"
    """Is being built."""
    STALE = "stale"
    """Lives, holds weights that nobody vouches for."""
    READY = "ready"
    """Holds the current weights, which a probe has shown."""
    SYNCING = "syncing"
    """Loads weights, or has loaded them and is being probed."""
    SUSPECT = "suspect"
    """Owes a heartbeat; gets nothing new, and what it has is still waited for."""
    DEAD = "dead"
    """Its process ended, or was ended because it did not answer."""


class Event(Enum):
    """What happened to an engine."""

    STARTED = "started"
    HEARTBEAT = "heartbeat"
    MISSED = "missed"
    """A heartbeat is owed for longer than `suspect_after_s`."""
    SYNC_BEGUN = "sync_begun"
    SYNC_DONE = "sync_done"
    """The weights are loaded; the probe is next."""
    SYNC_FAILED = "sync_failed"
    """The load raised or ran out of time: what the engine holds now is unknown."""
    PROBE_OK = "probe_ok"
    PROBE_FAILED = "probe_failed"
    """Sampler and trainer disagree about the probe."""
    KILLED = "killed"
    """The process ended, whoever ended it."""
    RESTARTED = "restarted"
    """A new process took the dead one's place."""
    REMOVED = "removed"
    """The engine is not wanted any more; it never comes back."""


TRANSITIONS: dict[tuple[State, Event], State | None] = {
    (State.STARTING, Event.STARTED): State.STALE,
    (State.STARTING, Event.KILLED): State.DEAD,
    (State.STARTING, Event.REMOVED): State.DEAD,
    (State.STALE, Event.HEARTBEAT): State.STALE,
    (State.STALE, Event.MISSED): State.SUSPECT,
    (State.STALE, Event.SYNC_BEGUN): State.SYNCING,
    (State.STALE, Event.KILLED): State.DEAD,
    (State.STALE, Event.REMOVED): State.DEAD,
    (State.READY, Event.HEARTBEAT): State.READY,
    (State.READY, Event.MISSED): State.SUSPECT,
    (State.READY, Event.SYNC_BEGUN): State.SYNCING,
    (State.READY, Event.KILLED): State.DEAD,
    (State.READY, Event.REMOVED): State.DEAD,
    (State.SYNCING, Event.HEARTBEAT): State.SYNCING,
    (State.SYNCING, Event.SYNC_DONE): State.SYNCING,
    (State.SYNCING, Event.SYNC_FAILED): State.DEAD,
    (State.SYNCING, Event.PROBE_OK): State.READY,
    (State.SYNCING, Event.PROBE_FAILED): State.STALE,
    (State.SYNCING, Event.KILLED): State.DEAD,
    (State.SYNCING, Event.REMOVED): State.DEAD,
    (State.SUSPECT, Event.HEARTBEAT): None,
    (State.SUSPECT, Event.KILLED): State.DEAD,
    (State.SUSPECT, Event.REMOVED): State.DEAD,
    (State.DEAD, Event.RESTARTED): State.STARTING,
    (State.DEAD, Event.REMOVED): State.DEAD,
}
"""Every legal (state, event) with the next state; None is the state in which the engine became SUSPECT."""


class IllegalTransition(ValueError):
    """An event that cannot happen in this state: the fleet lost track of the engine."""


@dataclass(frozen=True)
class HealthLimits:
    """How long an engine may be silent, and how often it may come back."""

    heartbeat_s: float = 2.0
    """A heartbeat is asked for this long after the last answer."""
    suspect_after_s: float = 15.0
    """Seconds a heartbeat is owed until the engine gets nothing new. Above the longest forward pass of the engine."""
    dead_after_s: float = 60.0
    """Seconds a heartbeat is owed until the engine is ended."""
    start_timeout_s: float = 1800.0
    """Seconds to build an engine."""
    sync_timeout_s: float = 600.0
    """Seconds to load weights and sample the probe."""
    restarts: int = 3
    """Restarts of one engine within `restart_window_s`; the next death then is its last."""
    restart_window_s: float = 3600.0
    """Restarts longer ago are forgotten."""
    backoff_s: float = 1.0
    """Wait before a restart; doubles with every restart since the engine last served."""


class EngineHealth:
    """One engine's state and deadlines. `clock` gives seconds and never goes back."""

    def __init__(self, limits: HealthLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = State.STARTING
        self.removed = False
        self._limits = limits
        self._clock = clock
        self._since_s = clock()
        self._asked_s: float | None = None
        self._answered_s = clock()
        self._before_suspicion = State.STALE
        self.loaded = False
        """True from the end of a load until the next begins."""
        self._restarted_s: list[float] = []
        self._in_vain = 0

    @property
    def serves(self) -> bool:
        """True when the engine may be given prompts."""
        return self.state is State.READY

    @property
    def since_s(self) -> float:
        """When the engine came into its state, by the clock."""
        return self._since_s

    def apply(self, event: Event) -> State:
        """Take note of `event`; returns the state after it.

        Raises:
            IllegalTransition: the event cannot happen in this state, the engine was removed, or it is probed before it loaded.
        """
        before = self.state
        unloaded = event in (Event.PROBE_OK, Event.PROBE_FAILED) and not self.loaded
        if (before, event) not in TRANSITIONS or (self.removed and event is Event.RESTARTED) or unloaded:
            facts = " that was removed" * self.removed + " with nothing loaded" * unloaded
            raise IllegalTransition(f"expected an event that a {before.value} engine{facts} can have, got {event.value}")
        after = TRANSITIONS[before, event] or self._before_suspicion
        if event is Event.MISSED:
            self._before_suspicion = before
        if event in (Event.SYNC_BEGUN, Event.SYNC_DONE):
            self.loaded = event is Event.SYNC_DONE
        if event is Event.RESTARTED:
            self._restarted_s.append(self._clock())
            self._in_vain += 1
        if event is Event.PROBE_OK:
            self._in_vain = 0
        self.removed |= event is Event.REMOVED
        if event not in (Event.MISSED, Event.PROBE_OK, Event.PROBE_FAILED):
            self._asked_s, self._answered_s = None, self._clock()
        # A load that ended starts the probe's deadline, though the state stays.
        if after is not before or event is Event.SYNC_DONE:
            self._since_s = self._clock()
        self.state = after
        return after

    @property
    def owes(self) -> bool:
        """True while a heartbeat was asked for and has not come."""
        return self._asked_s is not None and self.state is not State.DEAD

    def heartbeat_due(self) -> bool:
        """True when a heartbeat should be asked for now; `asked` notes that it was."""
        idle = self.state in (State.STALE, State.READY) and self._asked_s is None
        return idle and self._clock() - self._answered_s >= self._limits.heartbeat_s

    def asked(self) -> None:
        """A heartbeat was asked for, and is owed from now on."""
        if self._asked_s is None:
            self._asked_s = self._clock()

    def overdue(self) -> Event | None:
        """The event that the passing of time means: MISSED, KILLED, SYNC_FAILED or none. The caller applies it.

        Answers that have arrived must be applied first: what counts is that an answer is owed, not that nobody looked.
        """
        limits, now_s = self._limits, self._clock()
        in_state_s = now_s - self._since_s
        if self.state is State.STARTING:
            return Event.KILLED if in_state_s >= limits.start_timeout_s else None
        if self.state is State.SYNCING:
            return Event.SYNC_FAILED if in_state_s >= limits.sync_timeout_s else None
        owed_s = now_s - self._asked_s if self._asked_s is not None else 0.0
        if self.state in (State.STALE, State.READY):
            return Event.MISSED if owed_s >= limits.suspect_after_s else None
        if self.state is State.SUSPECT:
            return Event.KILLED if owed_s >= limits.dead_after_s else None
        return None

    def restart_in_s(self) -> float | None:
        """Seconds until a dead engine may be restarted, 0 for now; None when it lives, was removed or has no restart left."""
        if self.state is not State.DEAD or self.removed:
            return None
        now_s = self._clock()
        self._restarted_s = [at_s for at_s in self._restarted_s if now_s - at_s < self._limits.restart_window_s]
        if len(self._restarted_s) >= self._limits.restarts:
            return None
        return max(0.0, self._since_s + self._limits.backoff_s * 2.0**self._in_vain - now_s)
