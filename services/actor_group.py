"""Spawn, call, watch and kill groups of equal actors.

The first failure of any member ends a call at once, whatever the others do: in a collective they would wait forever. While one
group works, the members of all others are asked for a sign of life, so that a death is noticed where nobody waits for it.
Members of an elastic group come and go one by one: their deaths are for the group's owner to notice and to mend.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorAlreadyExistsError, OutOfMemoryError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from services.errors import JobError, PhaseTimeout, WorkerDied
from services.stacks import forget, save_stacks, watch

DEATH_GRACE_S = 5.0
NAME_GRACE_S = 30.0
WATCH_PERIOD_S = 2.0

_live: list[ActorGroup] = []
"""Groups that were spawned and not killed, in this process."""

_tended: list[Callable[[], None]] = []
"""Called while somebody waits for another group's work."""


@dataclass(frozen=True)
class ActorSpec:
    """How one kind of actor is spawned: `role` gives the names `<role>-0`, `<role>-1`, ...

    The driver imports `worker`'s module too, so it must not load DeepSpeed or vLLM at its top.
    """

    role: str
    worker: type[Any]
    count: int
    cpus: float
    gpus: int = 0
    env: Mapping[str, str] = field(default_factory=dict)
    max_concurrency: int = 1
    elastic: bool = False
    """Each member has a placement group of its own and can be replaced, added and removed; `check` leaves it alone."""


def tend_while_waiting(tend: Callable[[], None]) -> Callable[[], None]:
    """Have `tend` called every 2 s while `first_ready` waits, on the waiting thread; returns a function that ends it."""
    _tended.append(tend)
    return lambda: _tended.remove(tend)


def check_groups() -> None:
    """Raise `WorkerDied` if a member of any group that is not elastic died; never waits."""
    for group in list(_live):
        group.check()


def first_ready(refs: Sequence[Any], timeout_s: float) -> list[Any]:
    """The first of `refs` to be ready, empty when none is within `timeout_s` seconds; watches all groups meanwhile.

    Raises:
        WorkerDied: a member of any group died or says that it cannot work.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = max(0.0, deadline - time.monotonic())
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=min(WATCH_PERIOD_S, left))
        if ready or left <= WATCH_PERIOD_S:
            return list(ready)
        check_groups()
        for tend in list(_tended):
            tend()


def _spawn(spec: ActorSpec, name: str, index: int, placement: PlacementGroup, bundle: int) -> ActorHandle[Any]:
    """One actor. Ray frees the name of a killed actor late, so a stage that follows another may have to wait for it."""
    actor = ray.remote(spec.worker).options(
        name=name,
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        max_restarts=0,
        max_task_retries=0,
        max_concurrency=spec.max_concurrency,
        runtime_env={"env_vars": dict(spec.env)},
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            placement_group=placement, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
        ),
    )
    deadline = time.monotonic() + NAME_GRACE_S
    while True:
        try:
            spawned: ActorHandle[Any] = actor.remote(index)
            watch(spawned)
            return spawned
        except ActorAlreadyExistsError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


class ActorGroup:
    """Actors of one class: `count` of them, each in its own bundle of `placement`, or none yet when that is None.

    The worker class is built with its index: `Worker(index)`. Actors are neither restarted by Ray nor detached: they die with
    the driver, and a death is an error of the next call or `check`. Members keep their index when others are removed.
    """

    def __init__(self, spec: ActorSpec, placement: PlacementGroup | None, first_bundle: int) -> None:
        self.role = spec.role
        self.spec = spec
        self._asked: dict[int, Any] = {}
        self._check_lock = threading.Lock()
        self._slots = [] if placement is None else [(placement, first_bundle + index) for index in range(spec.count)]
        self._owned: dict[int, PlacementGroup] = {}
        self._replaced = 0
        self.actors: list[ActorHandle[Any]] = [
            _spawn(spec, f"{spec.role}-{index}", index, *slot) for index, slot in enumerate(self._slots)
        ]
        if not spec.elastic:
            _live.append(self)

    def __len__(self) -> int:
        return len(self.actors)

    def call(self, method: str, *args: Any, timeout_s: float) -> list[Any]:
        """Call `method(*args)` on every member; results in member order."""
        return self.scatter(method, [args] * len(self.actors), timeout_s=timeout_s)

    def call_one(self, index: int, method: str, *args: Any, timeout_s: float) -> Any:
        """Call `method(*args)` on one member."""
        return self.wait([self.start(index, method, *args)], [index], method, timeout_s)[0]

    def scatter(self, method: str, args_per_member: Sequence[Sequence[Any]], *, timeout_s: float) -> list[Any]:
        """Call `method` on every member with that member's arguments; results in member order."""
        if len(args_per_member) != len(self.actors):
            raise ValueError(f"expected arguments for {len(self.actors)} members of {self.role}, got {len(args_per_member)}")
        refs = [self.start(index, method, *args) for index, args in enumerate(args_per_member)]
        return self.wait(refs, list(range(len(self.actors))), method, timeout_s)

    def start(self, index: int, method: str, *args: Any) -> Any:
        """Begin a call on one member; `wait` gives its result."""
        return getattr(self.actors[index], method).remote(*args)

    def wait(self, refs: list[Any], members: list[int], method: str, timeout_s: float) -> list[Any]:
        """Results of calls already made on `members`, in order.

        Raises:
            WorkerDied: a member's process ended.
            PhaseTimeout: not all answered within `timeout_s` seconds.
            JobError: as raised by the worker.
        """
        deadline = time.monotonic() + timeout_s
        results: dict[Any, Any] = {}
        pending = list(refs)
        while pending:
            ready = first_ready(pending, max(0.0, deadline - time.monotonic()))
            if not ready:
                late = [f"{self.role}-{members[refs.index(ref)]}" for ref in pending]
                save_stacks({name: self.actors[members[refs.index(ref)]] for name, ref in zip(late, pending, strict=True)})
                raise PhaseTimeout(
                    f"expected {method} to end within {timeout_s:.0f} s, {', '.join(late)} did not answer; "
                    "the job's log has the stacks; look there, or raise the limit if the work is simply that long"
                )
            pending.remove(ready[0])
            name = f"{self.role}-{members[refs.index(ready[0])]}"
            try:
                results[ready[0]] = self._result(ready[0], name, method)
            except RayTaskError:
                self._raise_first_death(refs, members, method)
                raise
        return [results[ref] for ref in refs]

    def _raise_first_death(self, refs: list[Any], members: list[int], method: str) -> None:
        """A member whose peer died reports a broken collective, often before Ray reports the death: name the death."""
        deadline = time.monotonic() + DEATH_GRACE_S
        pending = list(refs)
        while pending and time.monotonic() < deadline:
            ready, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            for ref in ready:
                try:
                    self._result(ref, f"{self.role}-{members[refs.index(ref)]}", method)
                except RayTaskError:
                    continue

    def _result(self, ref: Any, name: str, method: str) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, JobError):
                raise cause from None
            raise
        # Every other error of Ray means that the member cannot answer: process, node or memory are gone.
        except RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            # Of a process that was killed for memory, the last line is a page of advice.
            cause = lines[0] if isinstance(error, OutOfMemoryError) else lines[-1]
            raise WorkerDied(
                f"expected {name} to answer {method}, its process ended: {cause}. Its log says more (memory, signal, node loss)"
            ) from error

    def check(self) -> None:
        """Raise `WorkerDied` if a member that was asked for a sign of life has died since; asks those that were not.

        Never waits: a busy member answers when it is done, which is soon enough, since its work is waited for anyway.
        """
        with self._check_lock:
            for index, actor in enumerate(self.actors):
                if index not in self._asked:
                    self._asked[index] = actor.__ray_ready__.remote()
                elif ray.wait([self._asked[index]], timeout=0)[0]:
                    self._result(self._asked.pop(index), f"{self.role}-{index}", "a sign of life")

    def add(self, placement: PlacementGroup) -> int:
        """Spawn one more member in bundle 0 of `placement`, which goes with the member; returns its index."""
        index = len(self.actors)
        self._slots.append((placement, 0))
        self._owned[index] = placement
        self.actors.append(_spawn(self.spec, f"{self.role}-{index}", index, placement, 0))
        return index

    def replace(self, index: int) -> None:
        """Spawn a new process in a member's place; its process must have been ended. Ray's name of it gets a suffix."""
        self._replaced += 1
        self.actors[index] = _spawn(self.spec, f"{self.role}-{index}.{self._replaced}", index, *self._slots[index])

    def end(self, index: int) -> None:
        """End a member's process; it keeps its place."""
        forget(self.actors[index])
        ray.kill(self.actors[index], no_restart=True)

    def remove(self, index: int) -> None:
        """End a member's process for good and free what was reserved for it alone."""
        self.end(index)
        if index in self._owned:
            remove_placement_group(self._owned.pop(index))

    def kill(self) -> None:
        """End every member's process; a group can be killed more than once."""
        if self in _live:
            _live.remove(self)
        for index in range(len(self.actors)):
            self.remove(index)
