"""SIGKILL to ranks of an RL stage in update, export and save: one driver ends it, with the bits of the undisturbed run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from services.rollout_record import read_rollouts, recorded_files
from services.rundir import RESTARTED, read_lines, read_result
from tests.services.loops.dying_workers import plan_death
from tests.services.loops.test_grpo_kill import ITERATIONS, finish, make_rl_spec, new_job, numbers, replayed, start
from tests.services.loops.test_sft import sha256

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

DEATHS = [(1, "update", 6), (0, "export_weights", 1), (1, "begin_save", 1)]
"""In the second step of iteration 3; in the sync behind it; in the save behind iteration 4. Checkpoints are behind 2, 4, 6."""


def restarts(job: Path) -> list[dict[str, object]]:
    events = read_lines(job / "attempt-1" / "events.jsonl")
    return [event["data"]["failure"] for event, _ in events if event["kind"] == RESTARTED]


def test_ranks_killed_in_one_attempt(tmp_path: Path) -> None:
    stage = make_rl_spec(tmp_path)
    plain, killed = new_job(tmp_path / "plain", stage), new_job(tmp_path / "killed", stage)
    end = finish(plain, 1)
    plan_death(tmp_path, *DEATHS[0])
    process = start(killed, 1)
    for count, death in enumerate(DEATHS[1:], start=1):
        while len(restarts(killed)) < count:
            assert process.poll() is None
            time.sleep(0.02)
        plan_death(tmp_path, *death)
    assert process.wait(600) == 0

    assert [(failure["cause"], failure["step"]) for failure in restarts(killed)] == [
        ("worker_died", 2),
        ("worker_died", 2),
        ("worker_died", 3),
    ]
    assert numbers(killed, 1, "resumed", "step") == [2, 2, 2]
    assert numbers(killed, 1, "rollouts_read", "iteration") == [3, 3, 3, 4]
    result = read_result(killed / "attempt-1")
    assert result is not None
    assert [record.step for record in result.checkpoints] == [2, 4, 6]
    other = Path(result.checkpoints[-1].path)
    for name in ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors"):
        assert sha256(end / name) == sha256(other / name), name
    files = [recorded_files(job / "attempt-1", "rl") for job in (plain, killed)]
    for iteration in range(1, ITERATIONS + 1):
        one, two = (read_rollouts(found[iteration]).groups for found in files)
        assert [group.scores for group in one] == [group.scores for group in two]
        for group, again in zip(one, two, strict=True):
            assert [sample.response_ids for sample in group.samples] == [sample.response_ids for sample in again.samples]
            assert [sample.log_probs for sample in group.samples] == [sample.log_probs for sample in again.samples]
    *_, (last, _) = read_lines(killed / "attempt-1" / "metrics.jsonl")
    assert last["values"]["recoveries_stages"] == 3
    outcome = replayed(killed / "attempt-1")
    assert outcome.returncode == 0, outcome.stderr
    assert f"equal after {ITERATIONS} iterations" in outcome.stdout
