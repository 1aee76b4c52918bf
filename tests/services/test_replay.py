"""What a replay refuses before it starts anything, and how it names a difference; test_grpo_kill.py trains again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services import replay
from services.checkpoints import CheckpointInfo, begin, describe, on_disk, publish, weights_sha256
from services.errors import CheckpointInvalid, RecordingInvalid
from services.jobspec import JOB_SPEC
from services.loops.recording import check_recorded
from services.rollout_record import read_rollouts, recorded_files, write_rollouts
from services.rundir import RunWriter

GROUP = RolloutGroup(Prompt((1,), "1", "1", 1), (Sample((2,), (-1.0,), "2", False, 1),), (Score(1.0, "scored"),))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An attempt that trained stage rl for two iterations, behind stage sft."""
    run = tmp_path / "job" / "attempt-1"
    started = checkpoint_of(run, "sft", 3, None)
    identity = {"model_sha256": weights_sha256(started)}
    checkpoint_of(run, "rl", 2, identity)
    for iteration in (1, 2):
        write_rollouts(run / "stages" / "rl" / "rollouts", iteration, [GROUP], identity)
    sft = {"objective": {"type": "ce"}, "data": {"path": "d"}, "steps": 3}
    stages = [
        {"type": "sft", "model": {"path": "m"}, "sft": sft},
        {"type": "rl", "model": {"stage": "sft"}, "grpo": {"data": {"path": "d"}, "iterations": 4}},
    ]
    spec = JOB_SPEC.validate_python({"type": "pipeline", "stages": stages})
    (run.parent / "spec.json").write_text(spec.model_dump_json())
    return run


def checkpoint_of(run: Path, stage: str, step: int, identity: dict[str, str] | None) -> Path:
    writing = begin(run / "stages" / stage / "checkpoints", step, 1)
    save_file({"a": torch.zeros(3), "b": torch.arange(4.0)}, writing / "model.safetensors")
    record = publish(writing, [on_disk(writing, "model.safetensors")], CheckpointInfo(stage, step, "0", 8, identity=identity))
    writer = RunWriter(run)
    writer.event("checkpoint", "published", stage=stage, step=step, path=record.path)
    writer.close()
    return Path(record.path)


def test_the_stage_is_found_with_all_that_it_needs(run: Path) -> None:
    for name in (None, "rl"):
        found = replay.find_stage(run, name)
        assert found.model_path.name == "step-3"
        assert found.checkpoint.name == "step-2"
        assert [path.name for path in found.rollouts] == ["iteration-000001.parquet", "iteration-000002.parquet"]


def test_behind_a_gate_it_is_the_winner_that_training_began_with(run: Path) -> None:
    spec = json.loads((run.parent / "spec.json").read_text())
    gate = {"type": "gate", "candidates": [{"path": "m"}, {"stage": "sft"}], "gate": {"data": {"path": "d"}}}
    spec["stages"] = [spec["stages"][0], gate, spec["stages"][1] | {"model": {"stage": "gate"}}]
    (run.parent / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(RecordingInvalid, match="checkpoint of stage 'gate'"):
        replay.find_stage(run, "rl")
    writer = RunWriter(run)
    writer.event("promoted", "sft", stage="gate", candidate="sft", path=str(run / "stages" / "sft" / "checkpoints" / "step-3"))
    writer.close()
    assert replay.find_stage(run, "rl").model_path.name == "step-3"


def test_what_cannot_be_replayed_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecordingInvalid, match="the job has rl; name it"):
        replay.find_stage(run, "other")
    with pytest.raises(RecordingInvalid, match="expected the folder of an attempt"):
        replay.find_stage(run / "stages", None)
    recorded_files(run, "rl")[1].unlink()
    with pytest.raises(RecordingInvalid, match="recorded rollouts of iteration 1, there are none"):
        replay.find_stage(run, None)
    weights = run / "stages" / "sft" / "checkpoints" / "step-3" / "model.safetensors"
    save_file({"a": torch.ones(3)}, weights)
    with pytest.raises(RecordingInvalid, match="expected the weights that training began with"):
        replay.find_stage(run, None)
    assert replay.main([str(run)]) == 1
    assert capsys.readouterr().err.startswith("error expected the weights")
    (run / "stages" / "rl" / "checkpoints" / "step-2" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointInvalid):
        replay.find_stage(run, None)
    (run / "events.jsonl").unlink()
    with pytest.raises(RecordingInvalid, match="expected a checkpoint of stage 'rl'"):
        replay.find_stage(run, None)


def test_rollouts_of_other_settings_or_another_iteration_are_refused(run: Path) -> None:
    path = recorded_files(run, "rl")[2]
    with pytest.raises(RecordingInvalid, match="seed: absent there, 4 here"):
        check_recorded(read_rollouts(path), read_rollouts(path).identity | {"seed": 4}, path)
    path.write_bytes(recorded_files(run, "rl")[1].read_bytes())
    with pytest.raises(RecordingInvalid, match="got: rollouts of iteration 1"):
        read_rollouts(path)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"a": torch.zeros(3), "b": torch.arange(4.0)}, None),
        ({"a": torch.zeros(3), "b": torch.tensor([0, 1, 2.5, 3])}, "b differs in 1 of 4 elements, by 0.5 at most"),
        ({"a": -torch.zeros(3), "b": torch.arange(4.0)}, "a differs in 0 of 3 elements, by 0 at most"),
        ({"a": torch.zeros(3)}, "b is in one of them alone"),
        ({"a": torch.zeros(3).half(), "b": torch.arange(4.0)}, "a is (3,) torch.float16, expected (3,) torch.float32"),
    ],
)
def test_the_first_difference_is_named(tmp_path: Path, tensors: dict[str, torch.Tensor], expected: str | None) -> None:
    folders = [tmp_path / "expected", tmp_path / "got"]
    for folder, content in zip(folders, ({"a": torch.zeros(3), "b": torch.arange(4.0)}, tensors), strict=True):
        folder.mkdir()
        save_file(content, folder / "model.safetensors")
    files = [describe(folders[0], "model.safetensors")]
    assert replay.first_difference(*folders, files) == (expected and f"model.safetensors: {expected}")
    (folders[1] / "model.safetensors").unlink()
    assert replay.first_difference(*folders, files) == "model.safetensors is missing"
