"""The readiness gate's rules: what a candidate misses and what to do about it, and which of those that pass is the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sedsft.evaluation.metrics import Figure
from sedsft.gate_config import GateConfig, GateFigure

# Name in the table of figures, and whether a candidate is better for having more of it.
FIGURES: Mapping[GateFigure, tuple[str, bool]] = {
    "pass_at_g": ("pass@G", True),
    "groups_with_variance": ("groups_with_variance", True),
    "distinct_answers": ("distinct_answers", True),
    "self_bleu": ("self_bleu", False),
    "entropy": ("token_entropy", True),
}
_TIES: tuple[GateFigure, ...] = ("groups_with_variance", "pass_at_g", "entropy")


@dataclass(frozen=True)
class Miss:
    """A figure on the wrong side of its threshold; `value` is None where no sample tells it."""

    figure: str
    value: float | None
    threshold: float
    advice: str

    def __str__(self) -> str:
        bound = "at most" if self.figure == "self_bleu" else "at least"
        value = "unknown" if self.value is None else f"{self.value:.3g}"
        return f"expected {self.figure} of {bound} {self.threshold:g}, got {value}"


@dataclass(frozen=True)
class Candidate:
    """A probed model: its figures as `metrics.readiness` gives them, and what it misses."""

    name: str
    figures: Mapping[str, Figure]
    misses: tuple[Miss, ...]

    @property
    def missed(self) -> str:
        """What it misses and what to do about it; the same advice once. Empty where it misses nothing."""
        advised: dict[str, list[str]] = {}
        for miss in self.misses:
            advised.setdefault(miss.advice, []).append(str(miss))
        return "; ".join(f"{', '.join(missed)}: {advice}" for advice, missed in advised.items())


def judged(name: str, figures: Mapping[str, Figure], config: GateConfig) -> Candidate:
    """`name` with every figure that `config` sets a threshold for and that lies beyond it."""
    misses = []
    for figure, threshold in thresholds(config).items():
        label, more_is_better = FIGURES[figure]
        value = _number(figures[label])
        if value is None or (value < threshold if more_is_better else value > threshold):
            misses.append(Miss(label, value, threshold, _advice(figure, figures)))
    return Candidate(name, figures, tuple(misses))


def thresholds(config: GateConfig) -> dict[GateFigure, float]:
    """The thresholds that are set."""
    given: dict[GateFigure, float | None] = {
        "pass_at_g": config.min_pass_at_g,
        "groups_with_variance": config.min_groups_with_variance,
        "distinct_answers": config.min_distinct_answers,
        "self_bleu": config.max_self_bleu,
        "entropy": config.min_entropy,
    }
    return {figure: threshold for figure, threshold in given.items() if threshold is not None}


def best(candidates: Sequence[Candidate], rank_by: GateFigure) -> Candidate | None:
    """The candidate to promote among those that miss nothing; None when all miss something.

    Largest `rank_by` first (smallest, for Self-BLEU), then share of groups with variance, pass@G, entropy, place in the list.
    """

    def rank(candidate: Candidate) -> tuple[float, ...]:
        key = []
        for figure in (rank_by, *_TIES):
            label, more_is_better = FIGURES[figure]
            value = _number(candidate.figures[label])
            key.append(-math.inf if value is None else value if more_is_better else -value)
        return tuple(key)

    passed = [candidate for candidate in candidates if not candidate.misses]
    return max(passed, key=rank) if passed else None


def _advice(figure: GateFigure, figures: Mapping[str, Figure]) -> str:
    any_right, variance = _number(figures["pass@G"]) or 0.0, _number(figures["groups_with_variance"]) or 0.0
    if figure == "pass_at_g" and any_right == 0:
        return (
            "no sample was right, so there is nothing to reinforce; take easier prompts, a larger group or more max_tokens, or "
            "train SFT on rows that show how such prompts are answered"
        )
    if figure == "pass_at_g":
        return (
            "too many prompts are never answered right; where SFT cost accuracy, take a smaller weight or a larger mask_ratio "
            "of SED, a lower learning rate or fewer epochs, else easier prompts or a larger group"
        )
    if figure == "groups_with_variance" and 2 * (1 - any_right) >= 1 - variance:
        return "most groups without variance have no right sample; take easier prompts or a larger group"
    if figure == "groups_with_variance":
        return "most groups without variance are right in every sample; take harder prompts or drop these with a filter stage"
    return (
        "the samples are too alike: SFT has spent what RL would explore; train fewer epochs or at a lower learning rate, or "
        "with SED at a smaller mask_ratio"
    )


def _number(figure: Figure) -> float | None:
    return float(figure) if isinstance(figure, int | float) else None
