"""Scorers by the names that a job spec gives, and their weighted sum. Importing this module loads no algebra system."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial

from sedsft.records import ScoringItem
from sedsft.reward_config import AnswerReward, CodeReward, FormatReward, LengthReward, OverlongPenalty, RewardConfig, ScorerName
from sedsft.rewards.code import CodeScorer
from sedsft.rewards.components import format_reward, length_reward, overlong_penalty
from sedsft.rewards.remote import RemoteScorer
from sedsft.rewards.verdict import Reward, Verdict
from sedsft.rewards.verifier import judge
from sedsft.tasks.countdown import countdown_verdict

Scorer = Callable[[ScoringItem], Reward]
"""May raise; whoever calls it bounds its time and memory and turns errors into a status."""

AnswerScorer = Callable[[str, str], Verdict]
"""(gold, response) -> verdict. May raise, as a `Scorer` may. Main thread of its process only where algebra takes part."""

_WARM_UPS = 5
_GSM8K = re.compile(r"####\s*([-$]*[0-9.,]+)")


def score_countdown(gold: str, response: str) -> Verdict:
    """Whether `response` derives the target of the problem `gold` step by step.

    The answer is the derivation in canonical form, so that two valid paths count as two answers.
    """
    correct, derivation = countdown_verdict(gold, response)
    return Verdict("no_answer" if derivation is None else "scored", correct, derivation)


def score_gsm8k(gold: str, response: str) -> Verdict:
    """Whether the number behind the last `####` is the gold, as verl asks of answers to GSM8K."""
    found = _GSM8K.findall(response)
    return judge(gold, rf"\boxed{{{found[-1].rstrip('.,')}}}", "math_verify") if found else Verdict("no_answer", False, None)


SCORERS: dict[ScorerName, AnswerScorer] = {
    "math": partial(judge, mode="math_verify"),
    "math_strict": partial(judge, mode="strict"),
    "math_qwen": partial(judge, mode="qwen"),
    "gsm8k": score_gsm8k,
    "countdown": score_countdown,
}

DATA_SOURCES: dict[str, ScorerName] = {
    "math_dapo": "math_strict",
    "aime*": "math_strict",
    "lighteval/MATH": "math",
    "DigitalLearningGmbH/MATH-lighteval": "math",
    "HuggingFaceH4/MATH-500": "math",
    "numina_*": "math",
    "openai/gsm8k": "gsm8k",
    "countdown": "countdown",
}
"""Scorers of the data sources that verl files name, each the counterpart of the one that verl would take."""

_RIGHT: dict[ScorerName, tuple[str, str]] = {
    "math": ("x+1", r"\boxed{1+x}"),
    "math_strict": ("1", r"\boxed{1}"),
    "math_qwen": ("x+1", r"\boxed{1+x}"),
    "gsm8k": ("1", "#### 1"),
    "countdown": ("1 2 3>6", "1+2=3,3+3=6"),
}


def scorer_of(answer: AnswerReward, data_source: str) -> tuple[ScorerName, bool]:
    """Scorer of a row, and whether its data source is known (or does not matter)."""
    if not answer.by_data_source:
        return answer.scorer, True
    for sources in (answer.data_sources, DATA_SOURCES):
        if (name := _looked_up(sources, data_source)) is not None:
            return name, True
    return answer.scorer, False


def _looked_up(sources: Mapping[str, ScorerName], data_source: str) -> ScorerName | None:
    """Entry of the very name, otherwise of the longest beginning of it that is there with `*`."""
    if data_source in sources:
        return sources[data_source]
    fitting = [name for name in sources if name.endswith("*") and data_source.startswith(name[:-1])]
    return sources[max(fitting, key=len)] if fitting else None


def load(config: RewardConfig) -> Scorer:
    """The scorer that `config` describes, after each comparison was tried once.

    So imports and tables (about 2 s for the algebra) are not charged to a response.

    Raises:
        ValueError: a comparison fails on a response that is known to be right, or the user's code is not what was submitted.
        CodeError: the user's code does not load, or there is no sandbox for it.
    """
    answer = config.answer
    if answer is not None:
        names = {answer.scorer, *answer.data_sources.values(), *(DATA_SOURCES.values() if answer.by_data_source else ())}
        for name in sorted(names):
            gold, response = _RIGHT[name]
            verdict = _tried(SCORERS[name], gold, response)
            if verdict.correct is not True:
                raise ValueError(
                    f"expected scorer {name!r} to accept {response!r} for {gold!r}, got {verdict}; its installation is broken"
                )
    return _WeightedSum(config)


def _tried(scorer: AnswerScorer, gold: str, response: str) -> Verdict:
    for _ in range(_WARM_UPS - 1):
        # Building the algebra's tables can outlast its limit on a busy machine; every attempt gets further.
        with suppress(TimeoutError):
            return scorer(gold, response)
    return scorer(gold, response)


class _WeightedSum:
    """reward = sum over components of weight * reward."""

    def __init__(self, config: RewardConfig) -> None:
        self._components = config.summed
        self._remotes = {c.type: RemoteScorer(c) for c in config.summed if c.type == "remote"}
        self._codes = {c.type: CodeScorer(c, config.memory_mb) for c in config.summed if c.type == "code"}

    def __call__(self, item: ScoringItem) -> Reward:
        parts: dict[str, float] = {}
        verdict: Verdict | None = None
        for component in self._components:
            if isinstance(component, AnswerReward):
                verdict = SCORERS[scorer_of(component, item.data_source)[0]](item.gold, item.response)
                if verdict.correct is None:
                    raise RuntimeError(f"expected a comparison with the gold {item.gold!r}, got {verdict.status}")
                parts[component.type] = 1.0 if verdict.correct else component.wrong
            elif isinstance(component, FormatReward):
                parts[component.type] = format_reward(component, item.response)
            elif isinstance(component, LengthReward):
                parts[component.type] = length_reward(component, item.response_tokens)
            elif isinstance(component, OverlongPenalty):
                parts[component.type] = overlong_penalty(component, item.response_tokens)
            elif isinstance(component, CodeReward):
                parts[component.type] = self._codes[component.type](item)
            else:
                parts[component.type] = self._remotes[component.type](item)
        total = sum(component.weight * parts[component.type] for component in self._components)
        if verdict is None:
            return Reward(total, parts=parts)
        return Reward(total, verdict.extracted, verdict.correct, parts)
