"""SIGKILL to driver and ranks of an SFT stage wherever they stand: it ends with the bits of the undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.checkpoints import verify
from services.jobspec import Recovery, SFTStage
from services.rundir import RESTARTED, read_lines, read_result
from tests.services.loops.dying_workers import plan_death
from tests.services.loops.test_sft import make_spec, sha256

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = 4
STEPS = 9


def start(job: Path, number: int, **streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.services.loops.sft_main", str(job), str(number)]
    # Ray would kill ranks of this test for memory that other processes of the machine use.
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
    return subprocess.Popen(command, env=env, start_new_session=True, **streams)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, "the run ended before"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finish(job: Path, number: int) -> Path:
    assert start(job, number).wait(300) == 0
    result = read_result(job / f"attempt-{number}")
    assert result is not None
    return Path(result.checkpoints[-1].path)


def published(job: Path, number: int) -> int:
    return len(list((job / f"attempt-{number}" / "stages" / "sft" / "checkpoints").glob("step-?")))


def events(job: Path, kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event, _ in read_lines(job / "attempt-1" / "events.jsonl") if event["kind"] == kind]


def two_ranks(folder: Path, **changes: Any) -> SFTStage:
    """Nine steps with a checkpoint behind every second."""
    sft = {"epochs": 3, "batch_size": 3, "checkpoints": {"every_steps": 2, "keep": 9}}
    spec = make_spec(folder, objective={"type": "sed", "tau_mode": "running"}, **sft)
    return spec.model_copy(update={"trainer": spec.trainer.model_copy(update={"workers": 2}), **changes})


def test_a_stage_whose_ranks_are_killed_ends_as_the_undisturbed_one_without_a_human(tmp_path: Path) -> None:
    """Rank 1 dies at step 5; then rank 0 at the second step behind the checkpoint; then rank 1 at the second save behind it."""
    spec = two_ranks(tmp_path)
    for name in ("plain", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(spec.model_dump_json())
    end = finish(tmp_path / "plain", 1)
    plan_death(tmp_path, 1, "train_step", 5)
    job = tmp_path / "killed"
    process = start(job, 1)
    wait_until(lambda: len(events(job, RESTARTED)) == 1, process)
    plan_death(tmp_path, 0, "train_step", 2)
    wait_until(lambda: len(events(job, RESTARTED)) == 2, process)
    plan_death(tmp_path, 1, "begin_save", 2)
    assert process.wait(300) == 0
    assert [event["failure"]["cause"] for event in events(job, RESTARTED)] == ["worker_died"] * 3
    # The checkpoint of step 4 is there when the rank that wrote it dies at step 5, or it is not.
    resumed = [event["step"] for event in events(job, "resumed")]
    assert resumed[0] in (2, 4)
    assert resumed[0] <= resumed[1] <= resumed[2]
    steps = [event["failure"]["step"] for event in events(job, RESTARTED)]
    assert steps == [4, resumed[0] + 1, resumed[1] + 3]
    result = read_result(job / "attempt-1")
    assert result is not None
    assert result.status == "succeeded"
    other = Path(result.checkpoints[-1].path)
    for file in ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors"):
        assert sha256(end / file) == sha256(other / file), file
    assert [record.step for record in result.checkpoints] == [2, 4, 6, 8, 9]
    *_, (last, _) = read_lines(job / "attempt-1" / "metrics.jsonl")
    assert last["values"]["recoveries_stages"] == 3


def test_a_rank_that_dies_at_the_same_step_again_and_again_ends_the_job_with_a_reason(tmp_path: Path) -> None:
    spec = two_ranks(tmp_path, recovery=Recovery(restarts=9, no_progress=2))
    job = tmp_path / "stuck"
    job.mkdir()
    (job / "spec.json").write_text(spec.model_dump_json())
    plan_death(tmp_path, 1, "train_step", 1, always=True)
    process = start(job, 1, stderr=subprocess.PIPE)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1
    assert b"expected trainer-1 to answer train_step, its process ended" in said
    assert b"2 failures in a row came no further than step 0, recovery.no_progress=2" in said
    assert len(events(job, RESTARTED)) == 1


@pytest.mark.parametrize(("zero_stage", "precision"), [(2, "bf16"), (3, "fp32")])
def test_killed_runs_end_as_the_undisturbed_one(tmp_path: Path, zero_stage: int, precision: str) -> None:
    settings: dict[str, Any] = {
        "objective": {"type": "sed", "tau_mode": "running"},
        "epochs": 3,
        "batch_size": 3,
        "pack_tokens": 32,
        "max_length": 16,
        "precision": precision,
        "checkpoints": {"every_steps": 1, "keep": 9},
    }
    spec = make_spec(tmp_path, **settings)
    spec = spec.model_copy(update={"trainer": spec.trainer.model_copy(update={"workers": 2, "zero_stage": zero_stage})})
    ends = []
    for name in ("plain", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "spec.json").write_text(spec.model_dump_json())
    ends.append(finish(tmp_path / "plain", 1))
    job, chance, steps = tmp_path / "killed", random.Random(zero_stage), []
    for number in range(1, KILLS + 1):
        process = start(job, number)
        wanted = chance.randint(0, 2)
        while published(job, number) < wanted and process.poll() is None:
            time.sleep(0.02)
        time.sleep(chance.random() * 0.5)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        steps.append(published(job, number))
    ends.append(finish(job, KILLS + 1))
    print(f"checkpoints published before each kill: {steps}")
    assert verify(ends[0]).info.step == verify(ends[1]).info.step == STEPS
    for file in ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors"):
        assert sha256(ends[0] / file) == sha256(ends[1] / file), file
    infos = [verify(end).info for end in ends]
    assert infos[0].tau_state == infos[1].tau_state is not None
    assert infos[0].consumed_samples == infos[1].consumed_samples == 24
