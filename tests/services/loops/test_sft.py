"""The SFT stage through Ray: stopped, damaged and gone on with, against the run that was never stopped."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from services.checkpoints import CheckpointInfo, begin, describe, publish, verify
from services.errors import CheckpointInvalid, TrainingDiverged
from services.jobspec import JOB_SPEC, SFTStage
from services.loops import sft
from services.loops.resume import identity_of, resume_point
from services.run import Run
from services.rundir import read_lines
from tests.services.tiny_llama import random_llama, save_tokenizer

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def cluster() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="sf", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


def make_spec(folder: Path, **sft_settings: Any) -> SFTStage:
    if not (folder / "model").exists():
        model = random_llama(0)
        model.config.attention_dropout = 0.2
        model.save_pretrained(folder / "model")
        save_tokenizer(folder / "model")
        template = folder / "model" / "chat_template.jinja"
        ending = "{{ m.content }}{{ ' <eos>' if m.role == 'assistant' else '' }}"
        template.write_text(template.read_text().replace("{{ m.content }}", ending))
        rows = [{"prompt": f"w{i}", "completion": f"w{i + 1} w{i + 2}"} for i in range(9)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"objective": {"type": "sed"}, "data": {"path": str(folder / "rows.jsonl")}, "epochs": 1, "batch_size": 3}
    spec = {"type": "sft", "model": {"path": str(folder / "model")}, "sft": settings | sft_settings}
    spec["sft"].setdefault("optimizer", {"learning_rate": 1e-2})
    stage = JOB_SPEC.validate_python(spec)
    assert isinstance(stage, SFTStage)
    return stage


def attempt(job: Path, number: int, stage: SFTStage) -> Run:
    folder = job / f"attempt-{number}"
    folder.mkdir(parents=True)
    (job / "spec.json").write_text(stage.model_dump_json())
    return Run(folder, stage)


def run_stage(run: Run, stage: SFTStage) -> None:
    try:
        with run.stage(0, stage.name) as folder:
            sft.run_sft(run, stage, folder)
    finally:
        run.finish("succeeded", None)


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event, _ in read_lines(run.folder / "events.jsonl") if event["kind"] == kind]


def steps_of(run: Run) -> dict[int, dict[str, float]]:
    return {record["step"]: record["values"] for record, _ in read_lines(run.folder / "metrics.jsonl")}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_later_attempt_ends_as_if_nothing_had_happened(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = attempt(tmp_path / "plain", 1, make_spec(tmp_path))
    run_stage(plain, make_spec(tmp_path))
    stage = make_spec(tmp_path, checkpoints={"every_steps": 1})
    first, second = attempt(tmp_path / "job", 1, stage), attempt(tmp_path / "job", 2, stage)
    train_step = sft._train_step

    def stop(*args: Any) -> dict[str, float]:
        if args[-1] == 3:
            raise TrainingDiverged("stopped by the test")
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "_train_step", stop)
        with pytest.raises(TrainingDiverged):
            run_stage(first, stage)
    broken = Path(first.checkpoints[-1].path)
    (broken / "trainer" / "rank-0.safetensors").write_bytes(b"")
    run_stage(second, stage)
    assert [record.step for record in first.checkpoints] == [1, 2]
    assert events(second, "checkpoint_broken") == [{"path": str(broken)}]
    assert events(second, "resumed") == [{"path": str(broken.with_name("step-1")), "step": 1}]
    assert events(second, "calibrated") == []
    assert [record.step for record in second.checkpoints] == [2, 3]
    ends = [Path(run.checkpoints[-1].path) for run in (plain, second)]
    assert sha256(ends[0] / "model.safetensors") == sha256(ends[1] / "model.safetensors")
    infos = [verify(end).info for end in ends]
    assert infos[0].tau == infos[1].tau is not None
    assert infos[0].consumed_samples == infos[1].consumed_samples == 8
    steps = steps_of(second)
    assert list(steps) == [2, 3]
    timed = ("tokens_per_s",)
    assert [{k: v for k, v in steps[n].items() if k not in timed} for n in (2, 3)] == [
        {k: v for k, v in steps_of(plain)[n].items() if k not in timed} for n in (2, 3)
    ]
    assert {name for name in steps[3] if name.startswith("heldout")} == {
        "heldout_ce",
        "heldout_entropy",
        "heldout_masked_share",
    }
    assert not any(name.startswith("heldout") for name in steps[2])


def test_what_a_run_goes_on_from(tmp_path: Path) -> None:
    stage = make_spec(tmp_path)
    identity = identity_of(stage, tmp_path / "model", [], [])
    other = make_spec(tmp_path, checkpoints={"every_steps": 5, "keep": 3}, resume_from="elsewhere")
    assert identity_of(other, tmp_path / "model", [], []) == identity
    first = attempt(tmp_path / "job", 1, stage)
    assert resume_point(first, stage, identity) is None
    root = first.folder / "stages" / "sft" / "checkpoints"
    folder = begin(root, 7, attempt=1)
    (folder / "model.safetensors").write_bytes(b"w")
    info = CheckpointInfo("sft", 7, "0" * 64, 21, tau=0.5, identity=identity)
    published = Path(publish(folder, [describe(folder, "model.safetensors")], info).path)
    for source in (published, root):
        resumed = make_spec(tmp_path, resume_from=str(source))
        run = attempt(tmp_path / f"from-{source.name}", 1, resumed)
        found = resume_point(run, resumed, identity)
        assert found is not None
        assert (found[0], found[1].step, found[1].tau) == (published, 7, 0.5)
        run.finish("succeeded", None)
    changed = identity_of(make_spec(tmp_path, seed=3), tmp_path / "model", [], [])
    with pytest.raises(CheckpointInvalid, match=r"stage\.sft\.seed: 42 there, 3 here"):
        resume_point(first, stage, changed)
    first.finish("succeeded", None)
