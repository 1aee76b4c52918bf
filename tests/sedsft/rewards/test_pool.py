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

from sedsft.records import ScoringItem
from sedsft.reward_config import RewardConfig
from sedsft.rewards import pool as pool_module
from sedsft.rewards.pool import PoolLimits, ScorerStartError, ScoringPool, scoring_command

ROOT = Path(__file__).parents[3]
FAULT_COMMAND = (sys.executable, "-m", "tests.sedsft.rewards.fault_child")


def items(*pairs: tuple[str, str]) -> list[ScoringItem]:
    return [ScoringItem(*pair) for pair in pairs]


@pytest.fixture
def pool() -> Iterator[ScoringPool]:
    with ScoringPool(FAULT_COMMAND, PoolLimits(processes=2, timeout_s=0.5, memory_mb=512)) as built:
        yield built


def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_order_rewards_and_parts(pool: ScoringPool) -> None:
    asked = items(*[("a", "a" if i % 3 == 0 else f"{i}") for i in range(500)])
    scores = pool.score(asked)
    assert [s.reward for s in scores] == [1.0 if i % 3 == 0 else 0.0 for i in range(500)]
    assert [s.extracted for s in scores] == [item.response for item in asked]
    assert [s.correct for s in scores] == [i % 3 == 0 for i in range(500)]
    assert {s.status for s in scores} == {"scored"}
    assert scores[0].parts == {"answer": 1.0}
    assert all(0 <= s.seconds < 1 for s in scores)
    assert pool.score([]) == []


@pytest.mark.parametrize(
    ("response", "status", "detail"),
    [
        ("raise", "invalid", "ZeroDivisionError: planted"),
        ("nan", "invalid", "expected a finite reward, got nan"),
        ("none", "invalid", "TypeError"),
        ("loop", "timeout", "killed after 0.5 s"),
        ("sleep", "timeout", "killed after 0.5 s"),
        ("exit", "crashed", "ended with code 3"),
        ("kill", "crashed", "ended with code -9"),
        ("memory", "crashed", "memory limit of 512 MiB"),
        ("garbage", "crashed", "ended with code -9"),
        ("list", "crashed", "ended with code -9"),
    ],
)
def test_a_fault_is_the_status_of_its_item_alone(pool: ScoringPool, response: str, status: str, detail: str) -> None:
    asked = items(*[("x", "x")] * 100)
    asked[20] = asked[77] = ScoringItem("x", response)
    scores = pool.score(asked)
    assert len(scores) == 100
    for index, score in enumerate(scores):
        if index in (20, 77):
            assert score.status == status
            assert detail in score.detail
            assert math.isnan(score.reward)
        else:
            assert (score.status, score.reward) == ("scored", 1.0)
    assert len(pool.pids()) == 2


def test_more_answers_than_questions_never_become_rewards(pool: ScoringPool) -> None:
    scores = pool.score(items(*[("x", "x")] * 5, ("x", "twice"), *[("x", "x")] * 5))
    assert len(scores) == 11
    assert {(s.status, s.reward) for s in scores if s.status == "scored"} == {("scored", 1.0)}
    assert all(s.status == "invalid" for s in scores if s.status != "scored")


def test_a_time_for_all_leaves_no_item_without_a_status(pool: ScoringPool) -> None:
    started = time.monotonic()
    scores = pool.score(items(*[("x", "sleep")] * 50), total_timeout_s=1.2)
    assert time.monotonic() - started < 3
    assert {s.status for s in scores} == {"timeout"}
    assert "not scored within 1.2 s for all" in scores[-1].detail
    assert pool.score(items(("x", "x")))[0].reward == 1.0


def test_processes_are_replaced_after_many_items(pool: ScoringPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_RECYCLED_ITEMS", 100)
    before = pool.pids()
    assert {s.status for s in pool.score(items(*[("x", "x")] * 500))} == {"scored"}
    assert not set(before) & set(pool.pids())


def test_a_scoring_process_inherits_no_environment(pool: ScoringPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    [score] = pool.score(items(("x", "environment")))
    assert score.extracted is not None
    assert not set(score.extracted.split(",")) & {"HF_TOKEN", "PATH", "HOME"}


def test_what_a_scorer_prints_does_not_disturb(pool: ScoringPool) -> None:
    assert [s.reward for s in pool.score(items(("x", "print"), ("x", "x")))] == [0.0, 1.0]


def test_odd_text_survives(pool: ScoringPool) -> None:
    for text in ("", "\ud800", "\x00\n", "ü" * 300_000):
        assert pool.score(items((text, text)))[0].reward == 1.0


def test_processes_killed_between_calls_are_replaced(pool: ScoringPool) -> None:
    before = pool.pids()
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert {s.status for s in pool.score(items(*[("x", "x")] * 50))} == {"scored"}
    assert not set(before) & set(pool.pids())


def test_a_scorer_that_cannot_start_is_an_error() -> None:
    with (
        pytest.raises(ScorerStartError, match="expected a scoring process to be ready"),
        ScoringPool((sys.executable, "-c", "raise SystemExit(5)"), PoolLimits(1, 1.0, 512)),
    ):
        pass


def test_no_process_is_left_after_stop(pool: ScoringPool) -> None:
    pids = pool.pids()
    pool.stop()
    assert all(gone(pid, within_s=1) for pid in pids)


def test_processes_die_with_their_owner_even_in_the_middle_of_an_item() -> None:
    script = (
        "from tests.sedsft.rewards.test_pool import *\n"
        "p = ScoringPool(FAULT_COMMAND, PoolLimits(3, 100, 512)); p.start(); print(*p.pids(), flush=True)\n"
        "p.score(items(*[('x', 'loop')] * 3))\n"
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
    ("name", "right", "wrong"),
    [("countdown", ("1 2 3>6", "1+2=3,3+3=6"), ("1 2 3>6", "1+2=3")), ("math", ("4", r"\boxed{4}"), ("4", r"\boxed{5}"))],
)
def test_registered_scorers(name: str, right: tuple[str, str], wrong: tuple[str, str]) -> None:
    with ScoringPool(scoring_command(RewardConfig.model_validate({"name": name})), PoolLimits(1, 10, 2048)) as pool:
        scores = pool.score(items(right, wrong))
    assert [(s.status, s.reward, s.right) for s in scores] == [("scored", 1.0, True), ("scored", 0.0, False)]
