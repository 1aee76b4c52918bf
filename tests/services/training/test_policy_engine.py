"""Every policy loss on real DeepSpeed ranks against plain PyTorch, and the reference policy that the trainer keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sedsft.objectives import PolicyObjective
from sedsft.reference import reference_losses
from tests.services.training.rank_main import TEMPERATURE, Case, filled_rows, policy_denominator
from tests.services.training.test_engine import model_path, run_ranks  # noqa: F401 - a fixture

# Two processes import torch, transformers and DeepSpeed for every test.
pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]

VARIANTS = {
    "all": Case("all", "", "policy_gradients", grpo={"dual_clip": 1.5, "tis_cap": 1.5, "kl_weight": 0.3}),
    "first": Case("first", "", "policy_gradients", grpo={"advantage": "dr_grpo", "tis_cap": 1.5}, filled=False),
    "sampler": Case("sampler", "", "policy_gradients", grpo={"tis_cap": None, "dual_clip": None}, filled=False),
}


def tensor(values: Any) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


def expected_gradients(variant: Case, path: str) -> tuple[float, dict[str, Tensor]]:
    """Sum of the losses, and the gradient of it over the denominator, by autograd on full logits, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    settings = {"dual_clip": 3.0, "tis_cap": 2.0, "kl_weight": 0.0} | variant.grpo
    capped = settings["tis_cap"] is not None
    total = torch.zeros(())
    for row in filled_rows(variant):
        ids_T = torch.from_numpy(np.concatenate([row.prompt_ids_T, row.response_ids_R])).long()
        logits_RV = model(input_ids=ids_T[None]).logits[0, len(row.prompt_ids_T) - 1 : -1].float() / TEMPERATURE
        objective = PolicyObjective(
            torch.full((len(row.response_ids_R),), row.advantage),
            tensor(row.old_log_probs_R if capped else row.sampler_log_probs_R),
            0.2,
            0.28,
            settings["dual_clip"],
            tensor(row.sampler_log_probs_R) if capped else None,
            settings["tis_cap"],
            tensor(row.reference_log_probs_R),
            settings["kl_weight"],
        )
        total = total + reference_losses(logits_RV, ids_T[len(row.prompt_ids_T) :], objective).sum()
    (total / policy_denominator(variant)).backward()
    return total.item(), {name: p.grad for name, p in model.named_parameters()}


def distance(path: Path, expected: dict[str, Tensor]) -> float:
    """Largest relative difference of any parameter's gradient, by the norm: entries are sums that cancel out."""
    found = load_file(path)
    assert found.keys() == expected.keys()
    return max(float((found[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items())


def test_gradient_does_not_depend_on_ranks_micro_batches_and_packing(tmp_path: Path, model_path: str) -> None:  # noqa: F811
    def layouts(variant: Case, **given: dict[str, Any]) -> list[Case]:
        return [replace(variant, name=f"{variant.name}-{name}", model=model_path, **how) for name, how in given.items()]

    found: dict[str, list[dict[str, Any]]] = {}
    for ranks, given in (
        (1, {"one": {}, "one-packed": {"pack_tokens": 16, "zero_stage": 1}}),
        (2, {"two": {"zero_stage": 2, "micro_batch_size": 2}, "two-packed": {"zero_stage": 3, "pack_tokens": 24}}),
    ):
        found |= run_ranks(tmp_path, ranks, [case for variant in VARIANTS.values() for case in layouts(variant, **given)])
    for name, variant in VARIANTS.items():
        loss, gradients = expected_gradients(variant, model_path)
        of_variant = {case: ranks for case, ranks in found.items() if case.startswith(f"{name}-")}
        assert len(of_variant) == 4
        for case, ranks in of_variant.items():
            assert sum(rank["loss"] for rank in ranks) == pytest.approx(loss, rel=1e-5)
            assert ("kl" in ranks[0], "tis_weight" in ranks[0]) == (name == "all", name != "sampler")
            assert distance(tmp_path / f"{case}.safetensors", gradients) < 1e-5, case


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_reference_is_the_starting_model_and_leaves_no_trace(tmp_path: Path, model_path: str, precision: str) -> None:  # noqa: F811
    cases = [
        Case(f"z{stage}", model_path, "reference", stage, precision, micro_batch_size=2, grpo={"kl_weight": 0.1})
        for stage in range(4)
    ]
    for name, ranks in run_ranks(tmp_path, 2, cases).items():
        for record in ranks:
            assert record["reference"] == record["reference again"] == record["start"] != record["trained"], name
            assert record["again"] == record["trained"], name
            assert record["differing"] == [], name
