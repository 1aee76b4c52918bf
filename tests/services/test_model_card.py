from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from services.checkpoints import CheckpointInfo, installed_versions
from services.jobspec import JOB_SPEC, JobSpec, ModelRef, stages_of
from services.model_card import CardFacts, base_model, model_card

SFT: dict[str, Any] = {
    "type": "sft",
    "model": {"path": "/srv/private/models/SmolLM2-135M"},
    "sft": {"objective": {"type": "sed"}, "data": {"path": "/srv/private/rows.jsonl"}, "epochs": 1},
}
INFO = CheckpointInfo(
    "sft",
    10,
    "ab" * 32,
    320,
    tau=0.912345678,
    calibration={"tau": 0.91, "num_tokens": 512, "quantiles": [0.1, 0.2]},
)


def card(spec: dict[str, Any], facts: CardFacts, stage: int = 0) -> str:
    job: JobSpec = JOB_SPEC.validate_python(spec)
    return model_card(job, stages_of(job)[stage], facts)  # type: ignore[arg-type]


def test_a_card_of_sed_says_how_the_model_was_made() -> None:
    data = {
        "kept": 90,
        "skipped": 4,
        "dropped": 3,
        "cut": 2,
        "duplicates": 1,
        "tokens": {"total": 900},
        "trained": {"total": 400},
    }
    text = card(SFT, CardFacts(INFO, {"loss": 0.123456789, "grad_norm": 2.0}, data))
    front = ModelCard(text).data
    assert front.base_model == "SmolLM2-135M"
    assert front.library_name == "transformers"
    assert front.pipeline_tag == "text-generation"
    assert front.tags == ["sedsft", "sft-sed"]
    for line in (
        "`SmolLM2-135M` after 10 optimizer steps of supervised fine-tuning over 320 rows.",
        "Loss per response token: -log p + λ M (p - 1/2)², M = 1 where the top-k mass of the next-token distribution lies",
        "| objective.weight | 1 |",
        "| objective.top_k | 2 |",
        "| objective.mask_ratio | 0.7 |",
        "| optimizer.learning_rate | 2e-05 |",
        "| data | rows.jsonl |",
        "| tau | 0.912346 |",
        "| calibration.num_tokens | 512 |",
        "| skipped | 4 |",
        "| trained tokens | 400 |",
        "## Figures of step 10",
        "| loss | 0.123457 |",
        f"| torch | {installed_versions()['torch']} |",
        f"`{'ab' * 32}`",
    ):
        assert line in text, line
    assert "/srv" not in text
    assert "quantiles" not in text


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ({"type": "ce"}, "cross-entropy"),
        ({"type": "dft"}, "DFT"),
        ({"type": "gem"}, "GEM"),
        ({"type": "sed", "mask": False}, "SED-SFT without mask"),
    ],
)
def test_every_objective_has_a_name(objective: dict[str, Any], name: str) -> None:
    spec = SFT | {"sft": SFT["sft"] | {"objective": objective}}
    text = card(spec, CardFacts(CheckpointInfo("sft", 1, "0" * 64, 8), {}))
    assert f"# SmolLM2-135M, {name}\n" in text
    assert "τ and its calibration" not in text


def test_a_later_stage_names_the_model_that_the_first_began_with() -> None:
    rl = {"type": "rl", "name": "rl", "model": {"stage": "sft"}}
    rl["grpo"] = {"data": {"path": "/srv/private/prompts.jsonl"}, "iterations": 4}
    spec = {"type": "pipeline", "stages": [SFT | {"name": "sft"}, rl]}
    text = card(spec, CardFacts(CheckpointInfo("rl", 4, "0" * 64, 64, weight_version=5), {"reward": 0.5}), stage=1)
    assert "`SmolLM2-135M` after 4 iterations of reinforcement learning over 64 samples." in text
    assert ModelCard(text).data.tags == ["sedsft", "grpo"]
    assert "| clip_high | 0.28 |" in text
    assert "/srv" not in text


def test_behind_a_gate_stand_the_models_of_all_candidates() -> None:
    def base(candidates: list[dict[str, str]]) -> str:
        gate = {"type": "gate", "candidates": candidates, "gate": {"data": {"path": "/rl.jsonl"}}}
        spec = JOB_SPEC.validate_python({"type": "pipeline", "stages": [SFT, gate]})
        return base_model(spec, ModelRef(stage="gate"))

    assert base([{"stage": "sft"}, {"path": "/other/SmolLM2-135M"}]) == "SmolLM2-135M"
    assert base([{"stage": "sft"}, {"path": "/other/Llama"}]) == "SmolLM2-135M or Llama"


def test_a_name_that_is_none_on_the_hub_stays_out_of_the_front_matter() -> None:
    spec = SFT | {"model": {"path": "/srv/my: model--x"}}
    text = card(spec, CardFacts(INFO, {}))
    assert ModelCard(text).data.base_model is None
    assert base_model(JOB_SPEC.validate_python(spec), stages_of(JOB_SPEC.validate_python(spec))[0].model) == "my: model--x"
