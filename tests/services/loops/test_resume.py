from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sedsft.data.store import write_store
from sedsft.records import Prompt
from services.checkpoints import CheckpointInfo, begin, identity_diff, on_disk, publish
from services.errors import CheckpointInvalid
from services.jobspec import JOB_SPEC, RLStage, SFTStage
from services.loops.resume import identity_of, policy_identity_of, resume_point
from services.run import Run
from tests.services.tiny_llama import random_llama, save_tiny_llama


def stage_with(**settings: object) -> SFTStage:
    sft = {"objective": {"type": "ce"}, "data": {"path": "rows.jsonl"}, "epochs": 1} | settings
    stage = JOB_SPEC.validate_python({"type": "sft", "model": {"path": "model"}, "sft": sft})
    assert isinstance(stage, SFTStage)
    return stage


def test_adapters_go_on_only_upon_the_weights_they_were_trained_on(tmp_path: Path) -> None:
    rows = write_store(tmp_path / "rows.arrow", [])
    model = save_tiny_llama(tmp_path / "model")
    full, lora = stage_with(), stage_with(lora={"rank": 4})
    before = [identity_of(stage, model, rows, rows) for stage in (full, lora)]
    assert [identity_of(stage, model, rows, rows) for stage in (full, lora)] == before
    random_llama(1).save_pretrained(model)
    after = [identity_of(stage, model, rows, rows) for stage in (full, lora)]
    # Without adapters the training state holds all weights.
    assert after[0] == before[0]
    assert {name for name in after[1] if after[1][name] != before[1][name]} == {"model_sha256"}


PROMPTS = [Prompt((1, 2), "one", "1", 1), Prompt((1, 3), "two", "2", 2)]


def rl_stage(model: Path, trainer: dict[str, int] | None = None, **changes: Any) -> RLStage:
    grpo = {"data": {"path": "prompts.jsonl"}, "iterations": 3, "prompts_per_iteration": 2, "mini_batch_prompts": 1} | changes
    spec = {"type": "rl", "model": {"path": str(model)}, "grpo": grpo, "trainer": trainer or {"workers": 2}}
    stage = JOB_SPEC.validate_python(spec)
    assert isinstance(stage, RLStage)
    return stage


def test_an_rl_stage_goes_on_with_other_machines_but_not_with_other_settings(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    stage = rl_stage(model)
    before = policy_identity_of(stage, model, PROMPTS)
    same = rl_stage(model, checkpoints={"every_steps": 1, "keep": 5}, ledger={"every_iterations": 3})
    same = same.model_copy(update={"rollout": same.rollout.model_copy(update={"workers": 7})})
    assert identity_diff(before, policy_identity_of(same, model, PROMPTS)) == ""

    def diff(changed: RLStage, prompts: list[Prompt] = PROMPTS) -> str:
        return identity_diff(before, policy_identity_of(changed, model, prompts))

    assert diff(rl_stage(model, seed=3)) == "stage.grpo.seed: 42 there, 3 here"
    assert diff(rl_stage(model, {"workers": 1})) == "stage.trainer.workers: 2 there, 1 here"
    assert diff(rl_stage(model, {"workers": 2, "zero_stage": 3})) == "stage.trainer.zero_stage: 2 there, 3 here"
    assert diff(stage, PROMPTS[::-1]).startswith("data_sha256: ")
    assert diff(stage, [Prompt((1, 2), "one", "7", 1), PROMPTS[1]]).startswith("data_sha256: ")
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    assert diff(stage).startswith("tokenizer_sha256: ")
    save_tiny_llama(model, seed=1)
    assert diff(stage).startswith("model_sha256: ")


def test_a_changed_rl_stage_is_refused_with_the_difference(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "model")
    stage = rl_stage(model)
    run_folder = tmp_path / "job" / "attempt-2"
    run_folder.mkdir(parents=True)
    (tmp_path / "job" / "spec.json").write_text(stage.model_dump_json())
    run = Run(run_folder, stage)
    identity = policy_identity_of(stage, model, PROMPTS)
    assert resume_point(run, stage, identity) is None
    writing = begin(tmp_path / "job" / "attempt-1" / "stages" / "rl" / "checkpoints", 2, 1)
    (writing / "model.safetensors").write_bytes(b"w")
    info = CheckpointInfo("rl", 2, "0" * 64, 32, weight_version=3, identity=identity)
    publish(writing, [on_disk(writing, "model.safetensors")], info)
    found = resume_point(run, stage, identity)
    assert found is not None
    assert (found[0].name, found[1].step, found[1].weight_version) == ("step-2", 2, 3)
    with pytest.raises(CheckpointInvalid, match=r"these differ: stage\.grpo\.clip_high: 0\.28 there, 0\.3 here"):
        resume_point(run, stage, policy_identity_of(rl_stage(model, clip_high=0.3), model, PROMPTS))
    run.finish("succeeded", None)
