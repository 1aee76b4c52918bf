"""What travels between a loop and its trainer ranks. Imports neither torch nor DeepSpeed, so the driver stays light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from sedsft.config import GRPOConfig, SFTConfig
from services.buckets import WeightStream
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


class WeightSender(Protocol):
    """A rank's end of a transfer of weights to engines; the room of the engines knows how."""

    def send(self, targets: Any, version: int) -> None:
        """Send the weights of now. Collective."""


class SenderSetup(Protocol):
    """How a `WeightSender` is opened on a rank."""

    @property
    def bucket_bytes(self) -> int:
        """Bytes that are gathered and sent at a time."""

    def open(self, rank: int, weights: WeightStream) -> WeightSender:
        """The end of `rank`, which reads `weights`."""


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
