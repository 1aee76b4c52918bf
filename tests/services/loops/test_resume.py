from __future__ import annotations

from pathlib import Path

from sedsft.data.store import write_store
from services.jobspec import JOB_SPEC, SFTStage
from services.loops.resume import identity_of
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
