"""Which failures are tried again, how often, and when a job is stuck: one decision after the other, by hand."""

from __future__ import annotations

import pytest

from services import errors
from services.errors import JobError, NoneLeft, PhaseTimeout, ResourceError, WorkerDied
from services.failure_policy import GiveUp, Retry, cause_of, decide
from services.jobspec import Recovery
from services.rundir import Failure

ENOUGH = Recovery(restarts=100, no_progress=3)
PASSING = {"worker_died", "phase_timeout"}


def death(step: int, stage: int = 0, cause: str = "worker_died") -> Failure:
    return Failure(cause, stage, step)


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_only_deaths_and_late_phases_are_tried_again(kind: type) -> None:
    if not issubclass(kind, JobError):
        return
    cause = cause_of(kind("expected, got"))
    verdict = decide(death(5, cause=cause), [], ENOUGH)
    assert isinstance(verdict, Retry) == (kind in (WorkerDied, PhaseTimeout)), kind
    if isinstance(verdict, GiveUp):
        assert verdict.why == ""


def test_a_bug_is_not_tried_again() -> None:
    assert cause_of(ZeroDivisionError("x")) == "ZeroDivisionError"
    assert decide(death(5, cause="ZeroDivisionError"), [], ENOUGH) == GiveUp()


def test_engines_without_restarts_left_end_the_job() -> None:
    assert cause_of(NoneLeft("x")) == "NoneLeft"
    assert NoneLeft("x").code == "worker_died"


def test_a_node_may_come_back_but_a_plan_that_never_fitted_will_not() -> None:
    lacks = death(0, cause=cause_of(ResourceError("x")))
    assert decide(lacks, [], ENOUGH) == GiveUp()
    assert isinstance(decide(lacks, [death(4)], ENOUGH), Retry)


def test_a_late_phase_is_tried_again_once() -> None:
    late = death(7, cause="phase_timeout")
    assert isinstance(decide(late, [death(3)], ENOUGH), Retry)
    assert decide(death(9, cause="phase_timeout"), [late], ENOUGH) == GiveUp("2 phases were late")


def test_the_budget_counts_drivers_and_ranks_together() -> None:
    two = Recovery(restarts=2)
    before = [death(1), death(2, cause="driver_died")]
    assert isinstance(decide(before[1], before[:1], two), Retry)
    assert decide(death(3), before, two) == GiveUp("recovery.restarts=2 are used up")
    assert decide(death(3), [], Recovery(restarts=0)) == GiveUp("recovery.restarts=0 are used up")


def test_no_progress() -> None:
    """Steps 5, 5, 4: the third failure came no further than the first."""
    assert decide(death(5), [], ENOUGH) == Retry(1.0)
    assert decide(death(5), [death(5)], ENOUGH) == Retry(4.0)
    verdict = decide(death(4), [death(5), death(5)], ENOUGH)
    assert verdict == GiveUp("3 failures in a row came no further than step 5, recovery.no_progress=3")
    # One step further, and the count and the wait begin anew; so does another stage, whose steps count from 1.
    assert decide(death(6), [death(5), death(5)], ENOUGH) == Retry(1.0)
    assert decide(death(0, stage=1), [death(5), death(5)], ENOUGH) == Retry(1.0)
    assert isinstance(decide(death(6), [death(5)], Recovery(no_progress=1)), GiveUp)


def test_the_wait_has_a_limit() -> None:
    patient = Recovery(restarts=100, no_progress=50)
    assert [decide(death(1), [death(1)] * n, patient) for n in (1, 2, 3, 9)] == [
        Retry(4.0),
        Retry(16.0),
        Retry(60.0),
        Retry(60.0),
    ]
