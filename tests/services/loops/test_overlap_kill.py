"""SIGKILL to the driver of an RL stage that samples ahead, against the run that was never killed; and replays of both modes."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.checkpoints import verify
from services.loops.rounds import iteration_seed
from services.rollout.fleet import prompt_seed
from services.rollout_record import read_rollouts, recorded_files
from services.rundir import read_lines
from tests.services.loops.test_grpo_kill import ITERATIONS, finish, kill_in, make_rl_spec, new_job, numbers, replayed
from tests.services.loops.test_sft import sha256

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

PROMPTS = 4
"""Of an iteration."""
WEIGHTS = ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors")


def versions_by_iteration(run: Path) -> dict[int, set[int]]:
    files = recorded_files(run, "rl")
    return {i: {s.weight_version for g in read_rollouts(path).groups for s in g.samples} for i, path in files.items()}


def test_one_step_off_ends_with_the_bits_of_the_run_that_was_not_killed(tmp_path: Path) -> None:
    stage = make_rl_spec(tmp_path, overlap={"mode": "one_step_off"})
    plain, killed = new_job(tmp_path / "plain", stage), new_job(tmp_path / "killed", stage)
    end = finish(plain, 1)
    phases = [("rollout", 2), ("score", 3), ("update", 4), ("sync", 4)]
    for number, (phase, iteration) in enumerate(phases, start=1):
        kill_in(killed, number, phase, iteration)
    other = finish(killed, len(phases) + 1)
    assert any(numbers(killed, n, "resumed", "step") for n in range(2, 6)), "a checkpoint was gone on from"
    assert any(numbers(killed, n, "rollouts_read", "iteration") for n in range(2, 6))
    for name in WEIGHTS:
        assert sha256(end / name) == sha256(other / name), name
    assert verify(end).info == verify(other).info
    # Staleness 1 in every attempt, but for the first iteration.
    expected = {1: {1}} | {i: {i - 1} for i in range(2, ITERATIONS + 1)}
    assert versions_by_iteration(plain / "attempt-1") == versions_by_iteration(killed / "attempt-5") == expected
    figures = [line["values"] for line, _ in read_lines(plain / "attempt-1" / "metrics.jsonl")]
    assert [values["staleness_max"] for values in figures] == [0] + [1] * (ITERATIONS - 1)
    assert [values["groups_running"] for values in figures] == [PROMPTS] * (ITERATIONS - 1) + [0]
    for values in figures:
        counted = values["groups_accepted"] + values["groups_dropped"] + values["groups_running"]
        assert values["groups_submitted"] == counted
    outcome = replayed(killed / "attempt-5")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert sha256(end / "model.safetensors") in outcome.stdout


def test_async_goes_on_from_its_recording_and_replays(tmp_path: Path) -> None:
    stage = make_rl_spec(tmp_path, overlap={"mode": "async", "max_staleness": 2})
    # The name by which ranks know the job that they may be stuck in.
    job = new_job(tmp_path / "killed", stage)
    phases = [("rollout", 2), ("update", 4)]
    for number, (phase, iteration) in enumerate(phases, start=1):
        kill_in(job, number, phase, iteration)
    end = finish(job, len(phases) + 1)
    run = job / "attempt-3"
    groups = {i: read_rollouts(path).groups for i, path in recorded_files(run, "rl").items()}
    assert list(groups) == list(range(1, ITERATIONS + 1))
    seeds = [prompt_seed(iteration_seed(42, i), place) for i in range(1, ITERATIONS + 1) for place in range(PROMPTS)]
    assert sorted(group.seed for found in groups.values() for group in found) == sorted(seeds)
    for iteration, versions in versions_by_iteration(run).items():
        assert versions <= {iteration - 2, iteration - 1, iteration}
    assert verify(end).info.weight_version == 1 + ITERATIONS
    outcome = replayed(run)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert sha256(end / "model.safetensors") in outcome.stdout
