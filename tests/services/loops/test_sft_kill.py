"""SIGKILL to the driver of an SFT stage wherever it stands: later attempts end with the bits of the undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from services.checkpoints import verify
from services.rundir import read_result
from tests.services.loops.test_sft import make_spec, sha256

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(600)]

KILLS = 4
STEPS = 9


def start(job: Path, number: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.services.loops.sft_main", str(job), str(number)]
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, start_new_session=True)


def finish(job: Path, number: int) -> Path:
    assert start(job, number).wait(300) == 0
    result = read_result(job / f"attempt-{number}")
    assert result is not None
    return Path(result.checkpoints[-1].path)


def published(job: Path, number: int) -> int:
    return len(list((job / f"attempt-{number}" / "stages" / "sft" / "checkpoints").glob("step-?")))


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
