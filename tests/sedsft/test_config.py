"""Settings that would do nothing, or could not work, are refused with what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sedsft.config import DataConfig, GRPOConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"advantage": "reinforce_pp", "max_refills": 0}, "groups that do not vary teach there as well"),
        ({"pack_tokens": 4096, "micro_batch_size": 4}, "either pack_tokens or micro_batch_size"),
        ({"pack_tokens": 2047}, r"at least max_prompt_tokens \+ max_tokens = 2048, so that all responses fit, got 2047"),
        ({"tis_cap": 0.5}, "greater than or equal to 1"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"kl_weight": -0.1}, "greater than or equal to 0"),
        ({"max_refills": -1}, "greater than or equal to 0"),
        ({"advantage": "gae"}, "'grpo', 'dr_grpo', 'rloo', 'reinforce_pp' or 'reinforce_pp_baseline'"),
    ],
)
def test_refused_policy_settings(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPOConfig(data=DataConfig(path="unused.jsonl"), iterations=1, **given)


def test_policy_settings_that_go_together_read_back() -> None:
    for given in (
        {"advantage": "reinforce_pp_baseline", "max_refills": 3},
        {"pack_tokens": 2048},
        {"tis_cap": None, "dual_clip": None, "kl_weight": 0.01, "mask_truncated": True},
    ):
        config = GRPOConfig.model_validate({"data": {"path": "unused.jsonl"}, "iterations": 1, **given})
        assert GRPOConfig.model_validate(config.model_dump()) == config
