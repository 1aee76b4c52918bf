"""What travels between a loop and its trainer ranks. Imports neither torch nor DeepSpeed, so the driver stays light."""

from __future__ import annotations

from dataclasses import dataclass

from sedsft.config import GRPOConfig, SFTConfig
from services.training.ranks import RankSetup


@dataclass(frozen=True)
class SFTSetup:
    """What an SFT rank needs before its first step. `total_steps` is the length of the learning-rate schedule."""

    ranks: RankSetup
    model_path: str
    config: SFTConfig
    zero_stage: int
    total_steps: int


@dataclass(frozen=True)
class PolicySetup:
    """What a policy rank needs before its first update. `total_steps` counts optimizer steps over all iterations."""

    ranks: RankSetup
    model_path: str
    config: GRPOConfig
    zero_stage: int
    total_steps: int


@dataclass(frozen=True)
class InspectedRow:
    """One row as the loss sees it, token by token; None where a token carries no loss."""

    line: int
    input_ids: tuple[int, ...]
    trained: tuple[bool, ...]
    probability: tuple[float | None, ...]
    """Probability of the token given those before it."""
    top_k_mass: tuple[float | None, ...]
    """Sum of the largest probabilities at its position."""
    active: tuple[bool, ...]
    """True where the diversity term applied (M = 1)."""
