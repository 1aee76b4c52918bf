"""What scorers take and return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VerdictStatus = Literal["scored", "no_answer", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether an output answers as the gold does.

    `scored`: compared. `no_answer`: the output holds no answer, which is wrong. `timeout` and `error`: not compared, so
    nothing is known and `correct` is None; neither may be taken for wrong.
    """

    status: VerdictStatus
    correct: bool | None
    extracted: str | None
    """The answer read from the output, written so that answers which are the same to the scorer share one string."""


@dataclass(frozen=True, slots=True)
class Reward:
    """Reward of one response: the weighted sum of its components."""

    reward: float
    extracted: str | None = None
    correct: bool | None = None
    """Whether the answer is right; None where no component reads an answer."""
    parts: dict[str, float] = field(default_factory=dict)
    """Each component's reward by its type, before its weight."""
