"""Every fault of a scorer is a status of its own item, and no process outlives its owner."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from services.errors import RewardFailure
from services.scoring.worker import ScoringWorker

ROOT = Path(__file__).parents[3]
FAULT_CHILD = (sys.executable, "-m", "tests.services.scoring.fault_child")


class FaultWorker(ScoringWorker):
    child_command = FAULT_CHILD


@pytest.fixture
def worker() -> Iterator[FaultWorker]:
    built = FaultWorker(0)
    built.start("fault", timeout_s=0.5, memory_mb=512, processes=2)
    yield built
    built.stop()


def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_order_and_rewards(worker: FaultWorker) -> None:
    items = [("a", "a" if i % 3 == 0 else f"{i}") for i in range(500)]
    scores = worker.score(items)
    assert [s.reward for s in scores] == [1.0 if i % 3 == 0 else 0.0 for i in range(500)]
    assert [s.extracted for s in scores] == [response for _, response in items]
    assert {s.status for s in scores} == {"scored"}
    assert worker.score([]) == []


@pytest.mark.parametrize(
    ("response", "status", "detail"),
    [
        ("raise", "invalid", "ZeroDivisionError: planted"),
        ("nan", "invalid", "expected a finite reward, got nan"),
        ("none", "invalid", "TypeError"),
        ("loop", "timeout", "killed after 0.5 s"),
        ("sleep", "timeout", "killed after 0.5 s"),
        ("exit", "crashed", "process ended with code 3"),
        ("kill", "crashed", "process ended with code -9"),
        ("memory", "crashed", "memory limit of 512 MiB"),
    ],
)
def test_a_fault_is_the_status_of_its_item_alone(worker: FaultWorker, response: str, status: str, detail: str) -> None:
    items = [("x", "x")] * 100
    items[20] = items[77] = ("x", response)
    scores = worker.score(items)
    assert len(scores) == 100
    for index, score in enumerate(scores):
        if index in (20, 77):
            assert score.status == status
            assert detail in score.detail
            assert math.isnan(score.reward)
        else:
            assert (score.status, score.reward) == ("scored", 1.0)
    assert len(worker.pids()) == 2


def test_what_a_scorer_prints_does_not_disturb(worker: FaultWorker) -> None:
    scores = worker.score([("x", "print"), ("x", "x")])
    assert [s.reward for s in scores] == [0.0, 1.0]


def test_odd_text_survives(worker: FaultWorker) -> None:
    for text in ("", "\ud800", "\x00\n", "ü" * 300_000):
        assert worker.score([(text, text)])[0].reward == 1.0


def test_processes_killed_between_calls_are_replaced(worker: FaultWorker) -> None:
    before = worker.pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert {s.status for s in worker.score([("x", "x")] * 50)} == {"scored"}
    assert not set(before) & set(worker.pids())


def test_a_scorer_that_cannot_start_is_an_error() -> None:
    worker = ScoringWorker(4)
    with pytest.raises(RewardFailure, match="expected a scoring process of reward-4 to be ready"):
        worker.start("no-such-scorer", timeout_s=1, memory_mb=512, processes=1)
    worker.stop()


def test_no_process_is_left_after_stop(worker: FaultWorker) -> None:
    pids = worker.pids()
    worker.stop()
    assert all(gone(pid, within_s=1) for pid in pids)


def test_processes_die_with_their_owner_even_in_the_middle_of_an_item() -> None:
    script = (
        "from tests.services.scoring.test_worker import FaultWorker\n"
        "w = FaultWorker(0); w.start('fault', 100, 512, 3); print(*w.pids(), flush=True); w.score([('x', 'loop')] * 3)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(pids) == 3
    time.sleep(0.2)
    assert all(psutil.pid_exists(pid) for pid in pids)
    owner.kill()
    owner.wait()
    assert all(gone(pid, within_s=2) for pid in pids)


@pytest.mark.parametrize(
    ("scorer", "right", "wrong"),
    [("countdown", ("1 2 3>6", "1+2=3,3+3=6"), ("1 2 3>6", "1+2=3")), ("math", ("4", r"\boxed{4}"), ("4", r"\boxed{5}"))],
)
def test_registered_scorers(scorer: str, right: tuple[str, str], wrong: tuple[str, str]) -> None:
    worker = ScoringWorker(0)
    worker.start(scorer, timeout_s=10, memory_mb=2048, processes=1)
    scores = worker.score([right, wrong])
    worker.stop()
    assert [(s.status, s.reward) for s in scores] == [("scored", 1.0), ("scored", 0.0)]
