"""What a job spec accepts, refuses and resolves to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from services.jobspec import JOB_SPEC, model_refs, stages_of

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.json"))
SFT: dict[str, Any] = {
    "type": "sft",
    "model": {"path": "/m"},
    "sft": {"objective": {"type": "sed"}, "data": {"path": "/d.jsonl"}, "steps": 3},
}
RL: dict[str, Any] = {
    "type": "rl",
    "model": {"path": "/m"},
    "grpo": {"data": {"path": "/d.jsonl"}, "iterations": 1, "max_tokens": 64},
    "rollout": {"max_model_len": 64},
}
EVAL: dict[str, Any] = {
    "type": "eval",
    "models": {"base": {"path": "/m"}},
    "eval": {"benchmarks": [{"name": "b", "path": "/b.jsonl"}], "sampling": {"max_tokens": 5000}},
}


def changed(**sft: Any) -> dict[str, Any]:
    return {**SFT, "sft": {**SFT["sft"], **sft}}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_shipped_example_is_valid(path: Path) -> None:
    assert stages_of(JOB_SPEC.validate_json(path.read_text(encoding="utf-8")))


def test_defaults_are_the_papers() -> None:
    spec = JOB_SPEC.validate_python(SFT)
    (stage,) = stages_of(spec)
    assert stage is spec
    objective = spec.sft.objective
    assert (objective.weight, objective.top_k, objective.mask_ratio, objective.mask) == (1.0, 2, 0.7, True)
    assert spec.sft.seed == 42
    assert spec.sft.optimizer.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({**SFT, "surprise": 1}, "Extra inputs are not permitted"),
        (changed(epochs=1), "exactly one of epochs and steps"),
        (changed(steps=None), "exactly one of epochs and steps"),
        (changed(objective={"type": "sed", "tau": 0.9, "mask_ratio": 0.5}), "no mask_ratio beside a fixed tau"),
        (changed(objective={"type": "sed", "tau": 0.9, "tau_mode": "running"}), "no tau_mode beside a fixed tau"),
        (changed(objective={"type": "sed", "tau_interval": 2}), "no tau_interval with tau_mode='initial'"),
        (changed(pack_tokens=4096, micro_batch_size=2), "either pack_tokens or micro_batch_size"),
        (changed(pack_tokens=64), "pack_tokens of at least max_length=2048"),
        (changed(checkpoints={"keep": 1}), "greater than or equal to 2"),
        (changed(objective={"type": "sed", "mask": False, "tau": 0.9}), "no tau with mask=false"),
        (changed(objective={"type": "ce", "beta": 1.0}), "Extra inputs are not permitted"),
        (changed(objective={"type": "nope"}), "does not match any of the expected tags"),
        (changed(optimizer={"learning_rate": float("nan")}), "finite"),
        (changed(optimizer={"schedule": "constant", "min_ratio": 0.1}), "no min_ratio"),
        (changed(optimizer={"warmup_steps": 3}), "warmup_steps below the 3 optimizer steps"),
        ({**SFT, "model": {}}, "exactly one of"),
        ({**SFT, "model": {"path": "/m", "stage": "a"}}, "exactly one of"),
        ({**SFT, "name": "Not A Name"}, "should match pattern"),
        ({**SFT, "trainer": {"zero_stage": 4}}, "less than or equal to 3"),
        (RL, "expected grpo.max_tokens below rollout.max_model_len=64, .* got 64; lower it"),
        (EVAL, "expected eval.sampling.max_tokens below rollout.max_model_len=4096, .* got 5000; lower it"),
        ({**SFT, "type": "train"}, "does not match any of the expected tags"),
    ],
)
def test_a_wrong_spec_is_refused_with_the_reason(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        JOB_SPEC.validate_python(spec)


def test_a_stage_can_only_start_from_an_earlier_trained_one() -> None:
    first, second = {**SFT, "name": "a"}, {**SFT, "name": "b", "model": {"stage": "a"}}
    spec = JOB_SPEC.validate_python({"type": "pipeline", "stages": [first, second]})
    assert [ref.stage for stage in stages_of(spec) for ref in model_refs(stage)] == [None, "a"]
    with pytest.raises(ValidationError, match=r"stages\[0\] \('b'\): expected model.stage to name an earlier .* got 'a'"):
        JOB_SPEC.validate_python({"type": "pipeline", "stages": [second, first]})
    gate = {"type": "gate", "candidates": [{"stage": "a"}, {"path": "/m"}], "gate": {"data": {"path": "/rl.jsonl"}}}
    spec = JOB_SPEC.validate_python(
        {"type": "pipeline", "stages": [first, gate, {**RL, "model": {"stage": "gate"}, "rollout": {}}]}
    )
    assert [ref.label for stage in stages_of(spec) for ref in model_refs(stage)] == ["/m", "a", "/m", "gate"]
    with pytest.raises(ValidationError, match="expected candidates to differ, got 'a' twice"):
        JOB_SPEC.validate_python({"type": "pipeline", "stages": [first, {**gate, "candidates": [{"stage": "a"}] * 2}]})
    with pytest.raises(ValidationError, match="names to differ"):
        JOB_SPEC.validate_python({"type": "pipeline", "stages": [first, first]})


@pytest.mark.parametrize(
    ("transport", "trainer_gpus", "engine_gpus", "outcome"),
    [
        ("auto", 0, 0, None),
        ("auto", 1, 1, "nccl"),
        ("auto", 0, 1, None),
        ("files", 1, 1, None),
        ("gloo", 0, 0, "gloo"),
        ("nccl", 1, 1, "nccl"),
        ("nccl", 0, 0, "expected rollout.gpus_per_worker of at least 1 with sync.transport='nccl', got 0"),
        ("nccl", 0, 1, "expected trainer.gpus_per_worker of at least 1 with sync.transport='nccl', got 0"),
        ("gloo", 0, 1, "expected rollout.gpus_per_worker=0 with sync.transport='gloo', got 1"),
        ("gloo", 1, 0, "expected trainer.gpus_per_worker=0 with sync.transport='gloo', got 1"),
    ],
)
def test_weights_travel_as_the_devices_allow(transport: str, trainer_gpus: int, engine_gpus: int, outcome: str | None) -> None:
    rollout = {"gpus_per_worker": engine_gpus, "sync": {"transport": transport}}
    spec = {**RL, "rollout": rollout, "trainer": {"gpus_per_worker": trainer_gpus}}
    if outcome is not None and outcome.startswith("expected"):
        with pytest.raises(ValidationError, match=outcome):
            JOB_SPEC.validate_python(spec)
    else:
        assert JOB_SPEC.validate_python(spec).transfer_backend == outcome


def test_a_spec_survives_json_and_cannot_be_changed() -> None:
    spec = JOB_SPEC.validate_python(SFT)
    for written in (SFT, changed(objective={"type": "sed", "tau": 0.9}), changed(optimizer={"schedule": "constant"})):
        spec = JOB_SPEC.validate_python(written)
        assert JOB_SPEC.validate_json(JOB_SPEC.dump_json(spec)) == spec
    with pytest.raises(ValidationError, match="frozen"):
        spec.name = "other"


def test_every_field_is_documented() -> None:
    schema = JOB_SPEC.json_schema()
    missing = [
        f"{name}.{field}"
        for name, model in schema["$defs"].items()
        for field, described in model["properties"].items()
        if field != "type" and "description" not in json.dumps(described)
    ]
    assert not missing
