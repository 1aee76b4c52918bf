"""The health of an engine, row by row and over random histories, without an engine."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from services.rollout.health import TRANSITIONS, EngineHealth, Event, HealthLimits, IllegalTransition, State

LIMITS = HealthLimits(
    heartbeat_s=2,
    suspect_after_s=10,
    dead_after_s=40,
    start_timeout_s=100,
    sync_timeout_s=50,
    restarts=2,
    restart_window_s=1000,
    backoff_s=3,
)

# One column per event in the order of the enum; a dash is an event that cannot happen. `before` is the state left by MISSED.
TABLE = """
           started  heartbeat  missed   sync_begun  sync_done  sync_failed  probe_ok  probe_failed  killed  restarted  removed
starting   stale    -          -        -           -          -            -         -             dead    -          dead
stale      -        stale      suspect  syncing     -          -            -         -             dead    -          dead
ready      -        ready      suspect  syncing     -          -            -         -             dead    -          dead
syncing    -        syncing    -        -           syncing    dead         ready     stale         dead    -          dead
suspect    -        before     -        -           -          -            -         -             dead    -          dead
dead       -        -          -        -           -          -            -         -             -       starting   dead
"""
ROWS = [line.split() for line in TABLE.strip().splitlines()]
CELLS = [(State(row[0]), Event(event), cell) for row in ROWS[1:] for event, cell in zip(ROWS[0], row[1:], strict=True)]
PATHS = {
    State.STARTING: [],
    State.STALE: [Event.STARTED],
    State.SYNCING: [Event.STARTED, Event.SYNC_BEGUN, Event.SYNC_DONE],
    State.READY: [Event.STARTED, Event.SYNC_BEGUN, Event.SYNC_DONE, Event.PROBE_OK],
    State.SUSPECT: [Event.STARTED, Event.SYNC_BEGUN, Event.SYNC_DONE, Event.PROBE_OK, Event.MISSED],
    State.DEAD: [Event.KILLED],
}


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def engine_in(state: State, clock: Clock | None = None) -> EngineHealth:
    health = EngineHealth(LIMITS, clock or Clock())
    for event in PATHS[state]:
        health.apply(event)
    assert health.state is state
    return health


def test_the_table_covers_every_pair() -> None:
    assert len(CELLS) == len(State) * len(Event) == 66
    assert {(state, event) for state, event, cell in CELLS if cell != "-"} == set(TRANSITIONS)


@pytest.mark.parametrize(("state", "event", "cell"), CELLS)
def test_every_row(state: State, event: Event, cell: str) -> None:
    health = engine_in(state)
    if cell == "-":
        with pytest.raises(IllegalTransition, match=f"a {state.value} engine can have, got {event.value}|with nothing loaded"):
            health.apply(event)
        assert health.state is state
        return
    after = State.READY if cell == "before" else State(cell)
    assert health.apply(event) is after
    assert health.serves == (after is State.READY)


def test_a_stale_suspect_comes_back_stale() -> None:
    health = engine_in(State.STALE)
    health.apply(Event.MISSED)
    assert health.apply(Event.HEARTBEAT) is State.STALE


def test_no_verdict_without_a_load() -> None:
    health = engine_in(State.READY)
    health.apply(Event.SYNC_BEGUN)
    with pytest.raises(IllegalTransition, match="with nothing loaded"):
        health.apply(Event.PROBE_OK)


def test_a_heartbeat_is_owed_from_the_asking_on() -> None:
    clock = Clock()
    health = engine_in(State.READY, clock)
    assert not health.heartbeat_due()
    clock.now_s = 2.0
    assert health.heartbeat_due()
    # Nobody asked for 500 s: that is not the engine's fault.
    clock.now_s = 500.0
    assert health.overdue() is None
    health.asked()
    assert health.owes
    assert not health.heartbeat_due()
    clock.now_s = 509.9
    health.asked()
    assert health.overdue() is None
    clock.now_s = 510.0
    assert health.overdue() is Event.MISSED
    health.apply(Event.MISSED)
    clock.now_s = 539.9
    assert health.overdue() is None
    clock.now_s = 540.0
    assert health.overdue() is Event.KILLED


def test_an_answer_clears_the_debt() -> None:
    clock = Clock()
    health = engine_in(State.READY, clock)
    health.asked()
    clock.now_s = 12.0
    health.apply(Event.MISSED)
    clock.now_s = 39.0
    assert health.apply(Event.HEARTBEAT) is State.READY
    clock.now_s = 40.9
    assert (health.overdue(), health.owes, health.heartbeat_due()) == (None, False, False)
    clock.now_s = 41.0
    assert health.heartbeat_due()


def test_building_loading_and_probing_have_a_deadline_each() -> None:
    clock = Clock()
    health = EngineHealth(LIMITS, clock)
    clock.now_s = 99.9
    assert health.overdue() is None
    clock.now_s = 100.0
    assert health.overdue() is Event.KILLED
    health.apply(Event.STARTED)
    health.apply(Event.SYNC_BEGUN)
    clock.now_s = 149.9
    assert health.overdue() is None
    health.apply(Event.SYNC_DONE)
    clock.now_s = 199.8
    assert health.overdue() is None
    clock.now_s = 199.9
    assert health.overdue() is Event.SYNC_FAILED


def test_restarts_wait_twice_as_long_each_time_until_none_is_left() -> None:
    clock = Clock()
    health = EngineHealth(LIMITS, clock)
    assert health.restart_in_s() is None
    for wait_s in (3.0, 6.0):
        health.apply(Event.KILLED)
        assert health.restart_in_s() == wait_s
        clock.now_s += wait_s
        assert health.restart_in_s() == 0.0
        health.apply(Event.RESTARTED)
    health.apply(Event.KILLED)
    assert health.restart_in_s() is None
    # Those two are forgotten at 1003 and 1009 s.
    clock.now_s = 1003.0
    assert health.restart_in_s() == 0.0


def test_an_engine_that_served_waits_as_if_for_the_first_time() -> None:
    clock = Clock()
    health = EngineHealth(LIMITS, clock)
    health.apply(Event.KILLED)
    clock.now_s = 3.0
    for event in (Event.RESTARTED, Event.STARTED, Event.SYNC_BEGUN, Event.SYNC_DONE, Event.PROBE_OK, Event.KILLED):
        health.apply(event)
    assert health.restart_in_s() == 3.0


def test_a_removed_engine_never_comes_back() -> None:
    health = engine_in(State.READY)
    health.apply(Event.REMOVED)
    assert health.restart_in_s() is None
    with pytest.raises(IllegalTransition, match="a dead engine that was removed can have, got restarted"):
        health.apply(Event.RESTARTED)


class Histories(RuleBasedStateMachine):
    """Any events at any times, against a memory of the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.health = EngineHealth(LIMITS, self.clock)
        self.loaded: list[Event] = []
        self.restarts_s: list[float] = []
        self.died = False

    @rule(event=st.sampled_from(list(Event)))
    def any_event(self, event: Event) -> None:
        before = self.health.state
        try:
            self.health.apply(event)
        except IllegalTransition:
            assert self.health.state is before
            return
        if event is Event.RESTARTED:
            self.loaded.clear()
            self.restarts_s.append(self.clock.now_s)
        if event in (Event.STARTED, Event.SYNC_BEGUN, Event.SYNC_DONE, Event.PROBE_OK, Event.PROBE_FAILED):
            self.loaded.append(event)
        self.died |= event is Event.REMOVED

    @rule(seconds=st.sampled_from([0.5, 2.0, 10.0, 50.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def a_heartbeat_is_asked_for(self) -> None:
        if self.health.heartbeat_due():
            self.health.asked()

    @precondition(lambda self: self.health.overdue() is not None)
    @rule()
    def a_deadline_passes(self) -> None:
        event = self.health.overdue()
        assert event is not None
        assert self.health.apply(event) in (State.SUSPECT, State.DEAD)

    @precondition(lambda self: self.health.restart_in_s() == 0.0)
    @rule()
    def it_is_restarted(self) -> None:
        recent = [at_s for at_s in self.restarts_s if self.clock.now_s - at_s < LIMITS.restart_window_s]
        assert len(recent) < LIMITS.restarts
        self.any_event(Event.RESTARTED)
        assert self.health.state is State.STARTING

    @invariant()
    def only_verified_weights_serve(self) -> None:
        if self.health.serves:
            assert self.loaded[-3:] == [Event.SYNC_BEGUN, Event.SYNC_DONE, Event.PROBE_OK]

    @invariant()
    def a_removed_engine_stays_dead(self) -> None:
        if self.died:
            assert self.health.state is State.DEAD
            assert self.health.restart_in_s() is None


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
