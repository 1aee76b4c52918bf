"""The SFT stage through Ray: stopped, damaged and gone on with, against the run that was never stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sedsft.data.store import write_store
from services.checkpoints import CheckpointInfo, begin, describe, publish, verify
from services.errors import CheckpointInvalid, TrainingDiverged, WorkerDied
from services.jobspec import JOB_SPEC, SFTStage
from services.loops import sft
from services.loops.resume import identity_of, resume_point
from services.loops.saving import CheckpointSaver
from services.loops.sft_steps import StepOutcome, train_step
from services.run import Run
from services.rundir import read_lines
from tests.services.local_ray import local_ray
from tests.services.loops.poisoned_worker import PoisonedWorker
from tests.services.tiny_llama import random_llama, save_tokenizer

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def cluster() -> Iterator[None]:
    with local_ray():
        yield


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


@contextmanager
def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stage fails at `step`, when the checkpoint before it has been published."""

    def stop(*args: Any) -> StepOutcome:
        if args[-1] == step:
            raise WorkerDied("stopped by the test")
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "train_step", stop)
        patch.setattr(CheckpointSaver, "poll", CheckpointSaver.wait)
        with pytest.raises(WorkerDied):
            yield


@pytest.mark.slow
def test_a_later_attempt_ends_as_if_nothing_had_happened(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = attempt(tmp_path / "plain", 1, make_spec(tmp_path))
    run_stage(plain, make_spec(tmp_path))
    stage = make_spec(tmp_path, checkpoints={"every_steps": 1})
    first, second = attempt(tmp_path / "job", 1, stage), attempt(tmp_path / "job", 2, stage)
    with stopped_at(3, monkeypatch):
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
    timed = ("tokens_per_s", "save_wait_s")
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
    rows = write_store(tmp_path / "rows.arrow", [])
    identity = identity_of(stage, tmp_path / "model", rows, rows)
    other = make_spec(tmp_path, checkpoints={"every_steps": 5, "keep": 3}, resume_from="elsewhere", encode_processes=3)
    assert identity_of(other, tmp_path / "model", rows, rows) == identity
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
    changed = identity_of(make_spec(tmp_path, seed=3), tmp_path / "model", rows, rows)
    with pytest.raises(CheckpointInvalid, match=r"stage\.sft\.seed: 42 there, 3 here"):
        resume_point(first, stage, changed)
    first.finish("succeeded", None)


def end_of(run: Run) -> dict[str, Any]:
    """What a run ended with: hashes of weights and of training state, and what its checkpoint says."""
    path = Path(run.checkpoints[-1].path)
    info = verify(path).info
    hashes = [sha256(path / name) for name in ("model.safetensors", "trainer/rank-0.safetensors")]
    return {"hashes": hashes, "tau": info.tau_state, "samples": info.consumed_samples, "step": info.step}


@pytest.mark.slow
def test_saving_and_evaluating_on_the_way_change_nothing(cluster: None, tmp_path: Path) -> None:
    settings = {"epochs": 2, "objective": {"type": "sed", "tau_mode": "running"}}
    plain = attempt(tmp_path / "plain", 1, make_spec(tmp_path, **settings))
    run_stage(plain, make_spec(tmp_path, **settings))
    stage = make_spec(tmp_path, **settings, evaluate_every=2, checkpoints={"every_steps": 1, "keep": 3})
    busy = attempt(tmp_path / "busy", 1, stage)
    run_stage(busy, stage)
    assert end_of(busy) == end_of(plain)
    steps = steps_of(busy)
    assert [step for step, figures in steps.items() if "heldout_ce" in figures] == [2, 4, 6]
    assert [step for step, figures in steps_of(plain).items() if "heldout_ce" in figures] == [6]
    assert steps[6]["heldout_ce"] == steps_of(plain)[6]["heldout_ce"]
    assert [step for step, figures in steps.items() if "save_wait_s" in figures] == [1, 2, 3, 4, 5]
    assert [record.step for record in busy.checkpoints] == [4, 5, 6]
    for record in busy.checkpoints:
        card = (Path(record.path) / "README.md").read_text()
        assert "README.md" in [file.name for file in verify(Path(record.path)).files]
        assert f"## Figures of step {record.step}" in card
        assert str(tmp_path) not in card
    # Killed behind its last checkpoint: the next attempt has nothing left to do and writes nothing.
    again = attempt(tmp_path / "busy", 2, stage)
    run_stage(again, stage)
    assert again.checkpoints == busy.checkpoints[-1:]
    assert not (again.folder / "stages" / "sft" / "checkpoints").exists()
    assert (again.folder / "stages" / "sft" / "tokens.json").exists()


def poison(folder: Path, steps: list[int], *, once: bool) -> None:
    (folder / "poison.json").write_text(json.dumps({"steps": steps, "once": once}))


@pytest.mark.slow
def test_a_step_that_is_not_finite_is_skipped_the_same_way_after_a_kill(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "SFTWorker", PoisonedWorker)
    poison(tmp_path, [2, 3, 5], once=False)
    stage = make_spec(tmp_path, epochs=2, checkpoints={"every_steps": 1, "keep": 9})
    plain, first, second = (attempt(tmp_path / name, n, stage) for name, n in (("plain", 1), ("job", 1), ("job", 2)))
    run_stage(plain, stage)
    steps = steps_of(plain)
    assert {step: figures["skipped_steps"] for step, figures in steps.items()} == {1: 0, 2: 1, 3: 2, 4: 2, 5: 3, 6: 3}
    assert "loss" not in steps[2]
    assert steps[2]["tau"] == steps[1]["tau"]
    [two, three, five] = events(plain, "step_skipped")
    assert [(event["step"], event["in_a_row"], event["total"]) for event in (two, three, five)] == [
        (2, 1, 1),
        (3, 2, 2),
        (5, 1, 3),
    ]
    assert two["fault"] == "gradient"
    assert len(two["rows"]) == 3
    assert all(row.startswith("rows.jsonl:") for row in two["rows"])
    # No checkpoint between skipped steps: what training goes back to lies before the first of them.
    assert [record.step for record in plain.checkpoints] == [1, 4, 6]
    with stopped_at(5, monkeypatch):
        run_stage(first, stage)
    run_stage(second, stage)
    assert events(second, "resumed")[0]["step"] == 4
    assert end_of(second) == end_of(plain)
    assert verify(Path(second.checkpoints[-1].path)).info.skips == {"total": 3, "in_a_row": 0, "gone_back_from": 0}


@pytest.mark.slow
@pytest.mark.parametrize("every_steps", [None, 1])
def test_a_passing_fault_of_three_steps_leaves_the_weights_of_an_undisturbed_run(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_steps: int | None
) -> None:
    monkeypatch.setattr(sft, "SFTWorker", PoisonedWorker)
    stage = make_spec(tmp_path, epochs=2, checkpoints={"every_steps": every_steps})
    plain, healed = attempt(tmp_path / "plain", 1, stage), attempt(tmp_path / "healed", 1, stage)
    poison(tmp_path, [], once=True)
    run_stage(plain, stage)
    poison(tmp_path, [3, 4, 5], once=True)
    run_stage(healed, stage)
    [back] = events(healed, "rolled_back")
    root = healed.folder / "stages" / "sft" / "checkpoints"
    expected = (0, None) if every_steps is None else (2, str(root / "step-2"))
    assert (back["step"], back["to_step"], back["path"]) == (5, *expected)
    assert end_of(healed) == end_of(plain)
    assert verify(Path(healed.checkpoints[-1].path)).info.skips == {"total": 3, "in_a_row": 0, "gone_back_from": 5}


@pytest.mark.slow
def test_a_lasting_fault_ends_as_diverged(cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "SFTWorker", PoisonedWorker)
    poison(tmp_path, [3, 4, 5], once=False)
    stage = make_spec(tmp_path, epochs=2, checkpoints={"every_steps": 2})
    run = attempt(tmp_path / "job", 1, stage)
    with pytest.raises(
        TrainingDiverged, match="3 steps in a row up to step 5 without, again after training had gone back from"
    ):
        run_stage(run, stage)
    assert [event["to_step"] for event in events(run, "rolled_back")] == [2]
    assert [event["step"] for event in events(run, "step_skipped")] == [3, 4, 5, 3, 4, 5]
    assert [record.step for record in run.checkpoints] == [2]
