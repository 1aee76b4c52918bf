"""What a scorer returns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Verdict:
    """Reward of one response and the answer read from it.

    `extracted` is None when the response holds no answer; otherwise it is written so that answers which are the same to the
    scorer share one string, and counting different strings counts different answers.
    """

    reward: float
    extracted: str | None
