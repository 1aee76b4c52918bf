"""Faults of scorers never reach an advantage: they are counted, and above the share the job stops."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from sedsft.config import CodeReward, RewardConfig
from sedsft.grpo import group_advantages
from sedsft.records import Score, ScoringItem
from services.errors import RewardFailure
from services.loops.engines import check_errors
from services.scoring import worker as worker_module
from services.scoring.fleet import score_figures
from services.scoring.worker import ScoringWorker

FAULTS = {
    "raise": "invalid",
    "nan": "invalid",
    "none": "invalid",
    "sleep": "timeout",
    "kill": "crashed",
    "memory": "crashed",
    "garbage": "crashed",
}
FAULT_COMMAND = (sys.executable, "-m", "tests.sedsft.rewards.fault_child")


def faulty_scores(monkeypatch: pytest.MonkeyPatch, responses: list[str]) -> list[Score]:
    monkeypatch.setattr(worker_module, "scoring_command", lambda reward: FAULT_COMMAND)
    worker = ScoringWorker(0)
    worker.start(RewardConfig(timeout_s=0.5, memory_mb=512), 2)
    try:
        return worker.score([ScoringItem("x", response) for response in responses])
    finally:
        worker.stop()


def test_no_fault_reaches_an_advantage_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 7 groups of 4 holds one fault; the others are 1, 1 and 0, whose mean is 2/3 without the fault's sample."""
    responses = [response for fault in FAULTS for response in ("x", fault, "x", "y")]
    scores = faulty_scores(monkeypatch, responses)
    assert [score.status for score in scores[1::4]] == list(FAULTS.values())
    assert all(math.isnan(score.reward) for score in scores[1::4])
    rewards_PG = np.array([score.reward for score in scores]).reshape(7, 4)
    valid_PG = np.array([score.status == "scored" for score in scores]).reshape(7, 4)
    result = group_advantages(rewards_PG, valid_PG)
    assert result.excluded_PG.tolist() == [[False, True, False, False]] * 7
    # (1 - 2/3) / sqrt(1/3) with the deviation over n - 1
    for row in result.advantages_PG:
        np.testing.assert_allclose(row, [0.57735, 0.0, 0.57735, -1.15470], atol=1e-4)
    figures = score_figures(scores)
    assert {name: figures[name] for name in figures if name.startswith("scores_")} == {
        "scores_scored": 21.0,
        "scores_timeout": 1.0,
        "scores_crashed": 3.0,
        "scores_invalid": 3.0,
    }


def test_the_job_stops_above_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = faulty_scores(monkeypatch, ["x"] * 19 + ["raise"])
    check_errors(scores, max_error_share=0.05)
    with pytest.raises(RewardFailure, match=r"got 1 of 20 .*'invalid': 1.*first: ZeroDivisionError: planted"):
        check_errors(scores, max_error_share=0.049)


def test_a_scorer_that_cannot_start_is_a_failure_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_module, "scoring_command", lambda reward: (sys.executable, "-c", "raise SystemExit(5)"))
    worker = ScoringWorker(4)
    with pytest.raises(RewardFailure, match="reward-4: expected a scoring process to be ready"):
        worker.start(RewardConfig(), 1)
    worker.stop()


def test_code_of_ones_own_scores_and_its_faults_are_statuses(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, socket\n"
        "def score(response, gold, data_source, response_tokens):\n"
        "    if response == 'connect':\n"
        "        socket.create_connection(('127.0.0.1', 1))\n"
        "    if response == 'die':\n"
        "        os._exit(1)\n"
        "    while response == 'hang':\n"
        "        pass\n"
        "    return len(response) / 4\n"
    )
    worker = ScoringWorker(0)
    worker.start(RewardConfig(components=(CodeReward(path=str(tmp_path / "mine.py")),), timeout_s=1.0), 2)
    try:
        scores = worker.score([ScoringItem("", response) for response in ("ab", "connect", "die", "hang", "abcd")])
    finally:
        worker.stop()
    assert [score.status for score in scores] == ["scored", "invalid", "invalid", "timeout", "scored"]
    assert [score.reward for score in scores if score.status == "scored"] == [0.5, 1.0]
    assert "PermissionError" in scores[1].detail
