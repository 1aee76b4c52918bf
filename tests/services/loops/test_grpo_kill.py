"""SIGKILL to the driver of an RL stage in the middle of each phase, against the run that was never killed; and its replay."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.checkpoints import verify
from services.jobspec import JOB_SPEC, RLStage
from services.rollout_record import read_rollouts, recorded_files, write_rollouts
from services.rundir import read_lines, read_result
from tests.services.loops.test_sft import sha256
from tests.services.tiny_llama import random_llama, save_tokenizer

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]

ITERATIONS = 6
# Ray would kill ranks of this test for memory that other processes of the machine use.
ENVIRONMENT = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_memory_monitor_refresh_ms": "0"}
PHASES = [("rollout", 2), ("score", 3), ("update", 4), ("sync", 5)]


def make_rl_spec(folder: Path, **grpo_settings: Any) -> RLStage:
    """Six prompts in iterations of four, two optimizer steps each, on two ranks in bf16; dropout draws random numbers."""
    if not (folder / "model").exists():
        model = random_llama(0)
        model.config.attention_dropout = 0.2
        model.save_pretrained(folder / "model")
        save_tokenizer(folder / "model")
        rows = [{"prompt": f"w{i} w{i + 1}", "answer": str(i)} for i in range(6)]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    grpo = {
        "data": {"path": str(folder / "prompts.jsonl")},
        "iterations": ITERATIONS,
        "prompts_per_iteration": 4,
        "group_size": 4,
        "mini_batch_prompts": 2,
        "max_tokens": 5,
        "max_prompt_tokens": 16,
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},
        "readiness_prompts": 2,
        "checkpoints": {"every_steps": 2, "keep": 9},
    } | grpo_settings
    trainer = {"workers": 2, "zero_stage": 2}
    stage = JOB_SPEC.validate_python({"type": "rl", "model": {"path": str(folder / "model")}, "grpo": grpo, "trainer": trainer})
    assert isinstance(stage, RLStage)
    return stage


def start(job: Path, number: int, *stuck_in: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.services.loops.grpo_main", str(job), str(number), *stuck_in]
    return subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True)


def kill_in(job: Path, number: int, phase: str, iteration: int) -> None:
    """Run an attempt until it is in the middle of the phase, then kill it."""
    (job / "stuck").unlink(missing_ok=True)
    process = start(job, number, phase, str(iteration))
    deadline = time.monotonic() + 200
    try:
        while not (job / "stuck").exists():
            assert process.poll() is None, f"attempt {number} ended before {phase} of iteration {iteration}"
            assert time.monotonic() < deadline, f"attempt {number} did not come to {phase} of iteration {iteration}"
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (job / "stuck_step").unlink(missing_ok=True)


def finish(job: Path, number: int) -> Path:
    assert start(job, number).wait(300) == 0
    result = read_result(job / f"attempt-{number}")
    assert result is not None
    return Path(result.checkpoints[-1].path)


def new_job(job: Path, stage: RLStage) -> Path:
    job.mkdir()
    (job / "spec.json").write_text(stage.model_dump_json())
    return job


def numbers(job: Path, attempt: int, kind: str, name: str) -> list[int]:
    """A number from every event of a kind."""
    events = read_lines(job / f"attempt-{attempt}" / "events.jsonl")
    return [event["data"][name] for event, _ in events if event["kind"] == kind]


def replayed(run: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "services.replay", str(run)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


def test_killed_in_every_phase_and_replayed(tmp_path: Path) -> None:
    stage = make_rl_spec(tmp_path)
    plain, killed = new_job(tmp_path / "plain", stage), new_job(tmp_path / "killed", stage)
    end = finish(plain, 1)
    for number, (phase, iteration) in enumerate(PHASES, start=1):
        kill_in(killed, number, phase, iteration)
    other = finish(killed, len(PHASES) + 1)

    # Nothing that was recorded is sampled again, and nothing is trained again that a checkpoint holds.
    assert [numbers(killed, n, "resumed", "step") for n in range(1, 6)] == [[], [], [2], [2], [4]]
    assert [numbers(killed, n, "rollouts_read", "iteration") for n in range(1, 6)] == [[], [1], [], [3, 4], [5]]
    for name in ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors"):
        assert sha256(end / name) == sha256(other / name), name
    infos = [verify(path).info for path in (end, other)]
    assert infos[0] == infos[1]
    assert (infos[0].step, infos[0].consumed_samples, infos[0].weight_version) == (ITERATIONS, 16 * ITERATIONS, 1 + ITERATIONS)
    files = [recorded_files(job / f"attempt-{n}", "rl") for job, n in ((plain, 1), (killed, len(PHASES) + 1))]
    assert list(files[0]) == list(files[1]) == list(range(1, ITERATIONS + 1))
    for iteration in files[0]:
        recorded = [read_rollouts(found[iteration]).groups for found in files]
        assert recorded[0] == recorded[1]
        assert {sample.weight_version for group in recorded[0] for sample in group.samples} == {iteration}
    assert (killed / "attempt-5" / "stages" / "rl" / "readiness.json").exists()
    seeds = {group.seed for path in files[0].values() for group in read_rollouts(path).groups}
    assert len(seeds) == 4 * ITERATIONS

    outcome = replayed(killed / "attempt-5")
    assert outcome.returncode == 0, outcome.stderr
    assert f"equal after {ITERATIONS} iterations" in outcome.stdout
    assert sha256(end / "model.safetensors") in outcome.stdout

    # A single reward that differs in the recording shows in the weights.
    last = read_rollouts(files[1][ITERATIONS])
    first, *rest = last.groups
    turned = replace(first, scores=(replace(first.scores[0], reward=1 - first.scores[0].reward), *first.scores[1:]))
    write_rollouts(files[1][ITERATIONS].parent, ITERATIONS, [turned, *rest], last.identity)
    outcome = replayed(killed / "attempt-5")
    assert outcome.returncode == 1
    assert "model.safetensors: model." in outcome.stdout
    assert "elements, by" in outcome.stdout
