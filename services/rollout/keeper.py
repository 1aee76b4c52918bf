"""Keeps engines alive: heartbeats, restarts, refits, additions and removals, all in one loop of calls and answers.

One thread at a time: `pump` waits for answers and runs what follows from them. The state of each engine is `EngineHealth`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

from sedsft.records import Sample
from services.actor_group import WATCH_PERIOD_S, ActorGroup, check_groups, first_ready
from services.errors import JobError, ModelError, ResourceError, WorkerDied
from services.placement import reserve_member
from services.rollout.dispatch import Life
from services.rollout.health import EngineHealth, Event, HealthLimits, State
from services.rollout.transport import Target, WeightLoad
from services.rollout.worker import GenerateRequest, RolloutSetup

_ROUND_S = 1.0
_LAST_WORD_S = 1.0


class EventSink(Protocol):
    """Where what happens to engines is told: `Run.event`."""

    def __call__(self, kind: str, message: str, /, **data: Any) -> None:
        """Record one event."""


@dataclass(frozen=True)
class Refit:
    """How an engine that comes late gets the current weights without the trainer: what to load, and how to tell it worked."""

    load: WeightLoad
    request: GenerateRequest
    mismatch: Callable[[list[tuple[Sample, ...]]], str | None]
    """What is wrong with an engine that answers the request so; None when nothing is."""


@dataclass
class _Member:
    life: Life
    health: EngineHealth
    away_since_s: float | None
    """When it was lost or added; None once it serves."""
    failed_probes: int = 0
    cause: str = ""
    """What the last process died of."""


@dataclass(frozen=True)
class _Call:
    life: Life
    method: str
    done: Callable[[Any], None]
    late_too: bool


class Keeper:
    """All engines of a fleet, by index."""

    def __init__(self, group: ActorGroup, setup: RolloutSetup, limits: HealthLimits, event: EventSink) -> None:
        self._group = group
        self._setup = setup
        self._limits = limits
        self._event = event
        self._members: dict[int, _Member] = {}
        self._calls: dict[Any, _Call] = {}
        self._on_lost: Callable[[Life, bool], None] | None = None
        self._wanted: int | None = None
        self._checked_s = 0.0
        self.max_model_len = 0
        """Longest prompt plus response that every engine takes, in tokens; 0 until one is built."""
        self.refit: Refit | None = None
        self.held = False
        """While true no engine is refitted: somebody else is about to load weights into all of them."""
        for engine in range(len(group)):
            self._begin(Life(engine, 0), away_since_s=None)

    # ------------------------------------------------------------------------------------------ what there is

    def engines(self) -> list[int]:
        """Engines that were not removed."""
        # A copy, since any thread may ask while this one adds engines.
        return [engine for engine, member in list(self._members.items()) if not member.health.removed]

    def states(self) -> dict[int, State]:
        """State of every engine that was not removed."""
        return {engine: self._members[engine].health.state for engine in self.engines()}

    def lives(self, *states: State) -> list[Life]:
        """Engines in one of `states`."""
        return [member.life for member in self._members.values() if member.health.state in states]

    def alive(self, life: Life) -> bool:
        """True while this process of the engine has not been given up."""
        member = self._members[life.engine]
        return member.life == life and member.health.state is not State.DEAD

    def coming(self) -> list[Life]:
        """Engines that do not serve now, but may without anybody's doing."""
        stale = [State.STALE] if self.refit is not None else []
        dead = [m.life for m in self._members.values() if m.health.restart_in_s() is not None]
        return self.lives(State.STARTING, State.SYNCING, State.SUSPECT, *stale) + dead

    def causes(self) -> str:
        """What each engine that does not serve died of."""
        named = [f"{m.life}: {m.cause}" for m in self._members.values() if m.cause and m.health.state is not State.READY]
        return "; ".join(named) or "no engine holds verified weights; sync weights first"

    # ------------------------------------------------------------------------------------------ what is asked

    def call(self, life: Life, method: str, *args: Any, done: Callable[[Any], None], late_too: bool = False) -> None:
        """Call an engine; `pump` runs `done` on the answer, after the engine was given up only if `late_too`."""
        self._calls[self._group.start(life.engine, method, *args)] = _Call(life, method, done, late_too)

    def begin_load(self, life: Life) -> None:
        """The weights of an engine are about to change; `load` or `drop_unjudged` follows."""
        self._members[life.engine].health.apply(Event.SYNC_BEGUN)

    def load(self, life: Life, load: WeightLoad, then: Callable[[int], None]) -> None:
        """Let an engine load, then call `then` with the version that it holds."""

        def loaded(held: int) -> None:
            self._members[life.engine].health.apply(Event.SYNC_DONE)
            then(held)

        self.call(life, load.method, *load.args, done=loaded)

    def target(self, life: Life) -> Target:
        """The engine as trainers reach it."""
        return Target(str(life), self._group.actors[life.engine], self._setup.resources.tensor_parallel)

    def judge(self, life: Life, *, agrees: bool) -> None:
        """Take note of how an engine's probe after a load went; it serves when it agrees."""
        member = self._members[life.engine]
        member.health.apply(Event.PROBE_OK if agrees else Event.PROBE_FAILED)
        if not agrees:
            return
        member.failed_probes = 0
        if member.away_since_s is not None:
            seconds = time.monotonic() - member.away_since_s
            member.away_since_s = None
            self._event("engine_ready", f"{life} serves after {seconds:.1f} s", engine=life.engine, seconds=seconds)

    def drop_unjudged(self) -> None:
        """End a weight sync that was broken off: what was loaded but not judged is stale, what was loading is unknown."""
        for life in self.lives(State.SYNCING):
            if self._members[life.engine].health.loaded:
                self.judge(life, agrees=False)
            else:
                self.lose(life, "its weight sync was broken off", Event.SYNC_FAILED)

    def resize(self, engines: int) -> None:
        """Have so many engines from the next round on; those that died for good are replaced. Any thread may call it."""
        self._wanted = engines

    @contextmanager
    def losses_to(self, lost: Callable[[Life, bool], None]) -> Iterator[None]:
        """Tell `lost` of each engine that is given up: its process, and whether it is to blame."""
        self._on_lost = lost
        try:
            yield
        finally:
            self._on_lost = None

    # ------------------------------------------------------------------------------------------------- rounds

    def pump(self, timeout_s: float) -> None:
        """One round: mend what needs it, wait for an answer for at most `timeout_s` (1 s at most), act on all that are there.

        Raises:
            WorkerDied: a member of a group that is not elastic died.
            ModelError: vLLM does not take the model.
        """
        if time.monotonic() - self._checked_s >= WATCH_PERIOD_S:
            self._checked_s = time.monotonic()
            check_groups()
        self._mend()
        wait_s = min(timeout_s, _ROUND_S)
        if not self._calls:
            time.sleep(min(wait_s, 0.05))
        elif first_ready(list(self._calls), wait_s):
            answered, _ = ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)
            for ref in answered:
                self._settle(ref, self._calls.pop(ref))
        self._check_deadlines()

    def confirm(self) -> None:
        """Return when every engine has just answered, is being built, or was given up; none is in the middle of a refit, and
        none samples any more for a call that was broken off."""
        for life in self.lives(State.STALE, State.READY):
            self._ask(life)
        while self._sampling() or any(m.health.owes or m.health.state is State.SYNCING for m in self._members.values()):
            self.pump(_ROUND_S)

    def _sampling(self) -> bool:
        return any(call.method == "generate" and self.alive(call.life) for call in self._calls.values())

    def lose(self, life: Life, cause: str, event: Event = Event.KILLED) -> None:
        """Give up a process of an engine and end it; nothing happens if it was given up before."""
        if not self.alive(life):
            return
        member = self._members[life.engine]
        was = member.health.state
        member.health.apply(event)
        member.cause = cause
        member.away_since_s = member.away_since_s or time.monotonic()
        self._end_processes(life)
        self._group.end(life.engine)
        wait_s = member.health.restart_in_s()
        plan = "no restart is left" if wait_s is None else f"restarts in {wait_s:.1f} s"
        self._event("engine_dead", f"{life} died while {was.value}, {plan}: {cause}", engine=life.engine, cause=cause)
        if self._on_lost is not None:
            self._on_lost(life, True)

    def _end_processes(self, life: Life) -> None:
        """Have the actor kill what is below it, if it still answers."""
        ray.wait([self._group.start(life.engine, "end")], timeout=_LAST_WORD_S)

    def _settle(self, ref: Any, call: _Call) -> None:
        alive = self.alive(call.life)
        try:
            answer = self._group.wait([ref], [call.life.engine], call.method, 0.0)[0]
        except (JobError, RayError) as error:
            # The first engine that vLLM refuses to build says that the model is wrong; later ones lack memory, say.
            mendable = isinstance(error, WorkerDied) or (isinstance(error, ModelError) and self.max_model_len > 0)
            if alive and not mendable:
                raise
            self.lose(call.life, str(error))
            return
        if alive or call.late_too:
            call.done(answer)

    def _check_deadlines(self) -> None:
        for member in list(self._members.values()):
            event, health = member.health.overdue(), member.health
            if event is None:
                continue
            seconds = time.monotonic() - health.since_s
            if event is Event.MISSED:
                health.apply(event)
                self._event("engine_suspect", f"{member.life} owes a heartbeat", engine=member.life.engine)
            else:
                self.lose(member.life, f"no answer for {seconds:.1f} s while {health.state.value}", event)

    def _mend(self) -> None:
        """Whatever can be done now without waiting: change the size, restart, ask for heartbeats, refit."""
        if self._wanted is not None:
            wanted, self._wanted = self._wanted, None
            self._change_size(wanted)
        for member in list(self._members.values()):
            if member.health.restart_in_s() == 0.0:
                self._restart(member)
            if member.health.heartbeat_due():
                self._ask(member.life)
            if member.health.state is State.STALE and self.refit is not None and not self.held:
                self._refit(member.life, self.refit)

    def _ask(self, life: Life) -> None:
        health = self._members[life.engine].health

        def answered(_: Any) -> None:
            suspected_s = time.monotonic() - health.since_s if health.state is State.SUSPECT else None
            health.apply(Event.HEARTBEAT)
            if suspected_s is not None:
                self._event("engine_recovered", f"{life} answers again", engine=life.engine, seconds=suspected_s)

        health.asked()
        self.call(life, "heartbeat", done=answered)

    def _refit(self, life: Life, refit: Refit) -> None:
        def probed(groups: list[tuple[Sample, ...]]) -> None:
            mismatch = refit.mismatch(groups)
            self.judge(life, agrees=mismatch is None)
            if mismatch is not None:
                member = self._members[life.engine]
                member.failed_probes += 1
                self._event("engine_mismatch", f"{life} with weights {refit.load.version}: {mismatch}", engine=life.engine)
                if member.failed_probes > 1:
                    self.lose(life, f"two loads of weights {refit.load.version} failed the probe, {mismatch}")

        def loaded(held: int) -> None:
            if held == refit.load.version:
                self.call(life, "generate", refit.request, done=probed)
            else:
                self.lose(life, f"holds weights {held} after loading weights {refit.load.version}")

        self.begin_load(life)
        self.load(life, refit.load, loaded)

    # --------------------------------------------------------------------------------------- coming and going

    def _begin(self, life: Life, away_since_s: float | None) -> None:
        self._members[life.engine] = _Member(life, EngineHealth(self._limits), away_since_s)
        self._build(life)

    def _build(self, life: Life) -> None:
        def built(max_model_len: int) -> None:
            self._members[life.engine].health.apply(Event.STARTED)
            self.max_model_len = min(self.max_model_len or max_model_len, max_model_len)

        self.call(life, "start", self._setup, done=built)

    def _restart(self, member: _Member) -> None:
        self._group.replace(member.life.engine)
        member.health.apply(Event.RESTARTED)
        member.failed_probes = 0
        member.life = Life(member.life.engine, member.life.restarts + 1)
        self._event("engine_restarted", f"{member.life} is being built", engine=member.life.engine, cause=member.cause)
        self._build(member.life)

    def _change_size(self, wanted: int) -> None:
        """Remove those that died for good, then those that serve least, or add new ones."""
        states = self.states()
        gone = [e for e, s in states.items() if s is State.DEAD and self._members[e].health.restart_in_s() is None]
        rest = sorted((e for e in states if e not in gone), key=lambda e: (states[e] is State.READY, -e))
        for engine in gone + rest[: max(0, len(rest) - wanted)]:
            self._remove(self._members[engine])
        for _ in range(wanted - len(rest)):
            try:
                placement = reserve_member(self._group.spec)
            except ResourceError as error:
                self._event("engine_refused", f"{wanted} engines were asked for: {error.message}")
                return
            engine = self._group.add(placement)
            self._event("engine_added", f"rollout-{engine} is being built", engine=engine)
            self._begin(Life(engine, 0), time.monotonic())

    def _remove(self, member: _Member) -> None:
        member.health.apply(Event.REMOVED)
        self._end_processes(member.life)
        self._group.remove(member.life.engine)
        self._event("engine_removed", f"{member.life} is not wanted any more", engine=member.life.engine)
        if self._on_lost is not None:
            self._on_lost(member.life, False)
