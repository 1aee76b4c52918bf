"""Stacks of an actor that does not answer: a signal makes its process write them, and a task beside it reads them.

The process needs neither its GIL nor a free thread for that, so it works in a collective that waits for a dead peer as well.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

log = logging.getLogger("sedsft.stacks")

_WRITE_S = 1.0
_TASK_S = 20.0

_places: dict[Any, Any] = {}
"""Future `_Place` of each watched actor, by its id."""


@dataclass(frozen=True)
class _Place:
    """Where a process writes its stacks: a file in memory, reachable below /proc on its node."""

    node_id: str
    pid: int
    descriptor: int


def watch(actor: ActorHandle[Any]) -> None:
    """Prepare a fresh actor to be asked for its stacks; before any other call on it."""
    _places[actor._actor_id] = actor.__ray_call__.remote(_register)


def forget(actor: ActorHandle[Any]) -> None:
    """The actor is ended."""
    _places.pop(actor._actor_id, None)


def save_stacks(actors: Mapping[str, ActorHandle[Any]]) -> None:
    """Write the stacks of all threads of `actors`, given by name, to the log; what cannot be had is said there, not raised."""
    try:
        places = {name: _places[actor._actor_id] for name, actor in actors.items() if actor._actor_id in _places}
        known = dict(zip(places, ray.get(list(places.values()), timeout=_TASK_S), strict=True))
        tasks = {name: _take.options(scheduling_strategy=_beside(place)).remote(place) for name, place in known.items()}
        for name, text in zip(tasks, ray.get(list(tasks.values()), timeout=_TASK_S), strict=True):
            log.error("stacks of %s, innermost call first:\n%s", name, text)
    except RayError as error:
        log.error("expected the stacks of %s, got: %s", ", ".join(actors), error)


def _register(worker: Any) -> _Place:
    """Runs in the actor."""
    descriptor = os.memfd_create("stacks")
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)
    return _Place(ray.get_runtime_context().get_node_id(), os.getpid(), descriptor)


def _beside(place: _Place) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(place.node_id, soft=False)


@ray.remote(num_cpus=0)
def _take(place: _Place) -> str:
    """Runs on the actor's node."""
    try:
        os.kill(place.pid, signal.SIGUSR1)
        time.sleep(_WRITE_S)
        with open(f"/proc/{place.pid}/fd/{place.descriptor}", encoding="utf-8", errors="replace") as file:
            return file.read() or f"none: process {place.pid} does not run, it may be stopped"
    except OSError as error:
        return f"expected a live process {place.pid}, got: {error}"
