"""Settings of the readiness gate between SFT and RL."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from sedsft.config import DataConfig, Precision, RewardConfig, SamplingConfig
from sedsft.config_base import Config

GateFigure = Literal["groups_with_variance", "pass_at_g", "entropy", "distinct_answers", "self_bleu"]


class GateConfig(Config):
    """Which figures a candidate must show on a short probe before RL starts from it, and which one is the best."""

    data: DataConfig
    """Prompts with their gold answers: those of the RL stage, or others like them."""
    reward: RewardConfig = RewardConfig()
    """Scorer of a response."""
    prompts: PositiveInt = 64
    """Prompts of the probe, drawn from the data with `seed`; all candidates get the same."""
    group_size: Annotated[int, Field(ge=2, le=256)] = 8
    """Responses per prompt: the G of pass@G and the group size of the RL stage."""
    sampling: SamplingConfig = SamplingConfig()
    """Temperature, nucleus and length of the responses: those of the RL stage."""
    min_pass_at_g: Annotated[float | None, Field(ge=0, le=1)] = None
    """Smallest share of prompts with a right sample among G."""
    min_groups_with_variance: Annotated[float | None, Field(ge=0, le=1)] = None
    """Smallest share of prompts whose rewards differ, those that a group-normalised advantage learns from."""
    min_distinct_answers: Annotated[float | None, Field(ge=0)] = None
    """Smallest mean number of different answers to a prompt, of G samples."""
    max_self_bleu: Annotated[float | None, Field(ge=0, le=100)] = None
    """Largest Self-BLEU of the responses to a prompt; it rises with G and has a meaning only between runs of one task."""
    min_entropy: Annotated[float | None, Field(ge=0)] = None
    """Smallest entropy per token, in nats."""
    rank_by: GateFigure = "groups_with_variance"
    """Figure by which the best of those that pass is promoted, Self-BLEU by the smallest, others by the largest value. Ties are
    settled by `groups_with_variance`, `pass_at_g` and `entropy` in this order, then by the order of the candidates."""
    max_prompt_tokens: PositiveInt = 1024
    """Prompts longer than this are dropped and counted."""
    precision: Precision = "bf16"
    """Arithmetic of the sampler."""
    max_logprob_gap: Annotated[float, Field(gt=0)] = 0.05
    """Largest mean |log p(sampler) - log p(transformers)| of the probe after a model is loaded; beyond it the job stops."""
    seed: int = 0
    """Seed of the choice of prompts and of sampling."""

    @model_validator(mode="after")
    def _distinct_answers_fit(self) -> GateConfig:
        if self.min_distinct_answers is not None and self.min_distinct_answers > self.group_size:
            raise ValueError(
                f"expected min_distinct_answers of at most group_size={self.group_size}, since G samples have no more answers, "
                f"got {self.min_distinct_answers}; lower it"
            )
        return self
