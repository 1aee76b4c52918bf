"""Scorers by the name that a job spec gives (`RewardConfig.name`). Importing this module loads no algebra system."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from sedsft.rewards.verdict import Verdict
from sedsft.tasks.countdown import countdown_verdict

Scorer = Callable[[str, str], Verdict]
"""(gold, response) -> verdict. May raise; whoever calls it bounds its time and memory and turns errors into a status."""


def score_math(gold: str, response: str) -> Verdict:
    """1 when the last boxed answer of `response` equals `gold`, else 0. Main thread of its process only; see `math_answer`."""
    verdict: Verdict = importlib.import_module("sedsft.rewards.math_answer").math_verdict(gold, response)
    return verdict


def score_countdown(gold: str, response: str) -> Verdict:
    """1 when `response` derives the target of the problem `gold` step by step, else 0.

    The answer is the derivation in canonical form, so that two valid paths count as two answers.
    """
    correct, derivation = countdown_verdict(gold, response)
    return Verdict(float(correct), derivation)


SCORERS: dict[str, Scorer] = {"math": score_math, "countdown": score_countdown}

_WARM_UP = {"math": ("x+1", r"\boxed{1+x}"), "countdown": ("1 2 3>6", "1+2=3,3+3=6")}


def load(name: str) -> Scorer:
    """The scorer `name`, called once so that its imports and tables (about 2 s for `math`) are not charged to a response.

    Raises:
        ValueError: no such scorer, or it fails on a response that is known to be right.
    """
    if name not in SCORERS:
        raise ValueError(f"expected one of the scorers {', '.join(SCORERS)}, got {name!r}")
    gold, response = _WARM_UP[name]
    verdict = SCORERS[name](gold, response)
    if verdict.reward != 1.0:
        raise ValueError(
            f"expected scorer {name!r} to accept {response!r} for {gold!r}, got {verdict}; its installation is broken"
        )
    return SCORERS[name]
