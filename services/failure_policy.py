"""Whether a job goes on after a failure: a pure function of the failure, of those before it, and of the job's budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.errors import JobError, NoneLeft, PhaseTimeout, ResourceError, WorkerDied
from services.jobspec import Recovery
from services.rundir import Failure

_FIRST_WAIT_S, _LONGEST_WAIT_S = 1.0, 60.0
_TIMEOUTS = 1
"""Phases that missed their deadline which are tried again: a second one says that the limit is too short."""
_PASSING = frozenset((WorkerDied.code, PhaseTimeout.code, ResourceError.code, "driver_died"))


@dataclass(frozen=True)
class Retry:
    """Go on behind the newest checkpoint after `wait_s` seconds."""

    wait_s: float


@dataclass(frozen=True)
class GiveUp:
    """The failure stands. `why` says what kept it from being tried again; empty where that would be of no use."""

    why: str = ""


def cause_of(error: BaseException) -> str:
    """Code of an error of the job, name of the class of any other; both are stable."""
    if isinstance(error, NoneLeft) or not isinstance(error, JobError):
        return type(error).__name__
    return error.code


def decide(failure: Failure, before: Sequence[Failure], recovery: Recovery) -> Retry | GiveUp:
    """What follows on `failure`.

    Only deaths of processes pass by themselves, late phases once, and a lack of resources when it follows on a death, since
    the node may come back. Rows, models, rewards, weights that do not fit and a loss that diverged would fail again.
    """
    lacks = failure.cause == ResourceError.code
    if failure.cause not in _PASSING or (lacks and not before):
        return GiveUp()
    late = sum(earlier.cause == PhaseTimeout.code for earlier in before)
    if failure.cause == PhaseTimeout.code and late >= _TIMEOUTS:
        return GiveUp(f"{late + 1} phases were late")
    if len(before) >= recovery.restarts:
        return GiveUp(f"recovery.restarts={recovery.restarts} are used up")
    stuck = _stuck([*before, failure])
    if stuck >= recovery.no_progress:
        return GiveUp(
            f"{stuck} failures in a row came no further than step {max(_place(f) for f in (*before, failure))[1]}, "
            f"recovery.no_progress={recovery.no_progress}"
        )
    return Retry(min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 4.0 ** (stuck - 1)))


def _place(failure: Failure) -> tuple[int, int]:
    return failure.stage, failure.step


def _stuck(failures: Sequence[Failure]) -> int:
    """Failures from the first on that came as far as any has come."""
    places = [_place(failure) for failure in failures]
    return len(places) - places.index(max(places))
