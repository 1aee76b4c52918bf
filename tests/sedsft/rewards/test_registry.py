from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from sedsft.records import ScoringItem
from sedsft.reward_config import AnswerReward, RewardConfig, ScorerName
from sedsft.rewards import registry
from sedsft.rewards.registry import DATA_SOURCES, SCORERS, load, scorer_of
from sedsft.rewards.verdict import Reward, Verdict

REPO = Path(__file__).resolve().parents[3]


def config(*components: dict[str, Any], **settings: Any) -> RewardConfig:
    return RewardConfig.model_validate({"components": components} | settings)


def test_every_reward_of_the_job_spec_has_a_scorer() -> None:
    assert set(SCORERS) == set(get_args(ScorerName))
    assert set(DATA_SOURCES.values()) <= set(SCORERS)


def test_importing_the_registry_loads_no_algebra() -> None:
    code = "import sys, sedsft.rewards.registry; print([m for m in ('sympy', 'math_verify', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=REPO)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "gold", "response", "reward"),
    [
        ("math", "1/2", r"\boxed{0.5}", 1.0),
        ("math_strict", "1/2", r"\boxed{0.5}", 0.0),
        ("math_qwen", "5", "the answer is 5", 1.0),
        ("gsm8k", "1234", "so\n#### $1,234.", 1.0),
        ("gsm8k", "1234", r"\boxed{1234}", 0.0),
        ("countdown", "1 2 3>6", "1+2=3,3+3=6", 1.0),
    ],
)
def test_short_form(name: str, gold: str, response: str, reward: float) -> None:
    scored = load(RewardConfig.model_validate({"name": name}))(ScoringItem(gold, response))
    assert (scored.reward, scored.correct, scored.parts) == (reward, reward == 1.0, {"answer": reward})


def test_weighted_sum_by_hand() -> None:
    """2 x 1 (right) + 0.5 x 1 (one box) + 0.1 x (300 - 150) / (300 - 100) + 1 x (180 - 150) / 20 cut at 0."""
    scorer = load(
        config(
            {"type": "answer", "weight": 2, "wrong": -1},
            {"type": "format", "weight": 0.5},
            {"type": "length", "weight": 0.1, "full_tokens": 100, "zero_tokens": 300},
            {"type": "overlong", "max_tokens": 200, "buffer_tokens": 20},
        )
    )
    right = scorer(ScoringItem("5", r"\boxed{5}", 150))
    assert right == Reward(pytest.approx(2.575), "5", True, {"answer": 1.0, "format": 1.0, "length": 0.75, "overlong": 0.0})
    wrong = scorer(ScoringItem("5", "6", 190))
    assert wrong.parts == {"answer": -1.0, "format": 0.0, "length": 0.55, "overlong": -0.5}
    assert (wrong.reward, wrong.correct) == (pytest.approx(-2 + 0.055 - 0.5), False)


def test_without_an_answer_component_nothing_is_right_or_wrong() -> None:
    assert load(config({"type": "format", "weight": 1}))(ScoringItem("", r"\boxed{5}")) == Reward(1.0, parts={"format": 1.0})


def test_an_error_of_a_component_leaves_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = load(config({"type": "answer"}, {"type": "format"}))
    monkeypatch.setitem(SCORERS, "math", lambda gold, response: Verdict("timeout", None, None))
    with pytest.raises(RuntimeError, match="expected a comparison with the gold '5', got timeout"):
        scorer(ScoringItem("5", r"\boxed{5}"))


def test_data_sources() -> None:
    answer = AnswerReward(by_data_source=True, scorer="math_qwen", data_sources={"mine*": "countdown", "math_dapo": "math"})
    assert [scorer_of(answer, source) for source in ("math_dapo", "mine/7", "aime_2024", "openai/gsm8k", "other", "")] == [
        ("math", True),
        ("countdown", True),
        ("math_strict", True),
        ("gsm8k", True),
        ("math_qwen", False),
        ("math_qwen", False),
    ]
    assert scorer_of(AnswerReward(), "other") == ("math", True)
    scorer = load(config({"type": "answer", "by_data_source": True}))
    assert [scorer(ScoringItem("5", "#### 5", 0, source)).reward for source in ("openai/gsm8k", "math_dapo")] == [1.0, 0.0]


def test_a_broken_installation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.SCORERS, "math", lambda gold, response: Verdict("scored", False, None))
    with pytest.raises(ValueError, match="expected scorer 'math' to accept"):
        load(RewardConfig())


def test_a_slow_first_comparison_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter([TimeoutError("busy"), TimeoutError("busy"), Verdict("scored", True, "1")])

    def slow(gold: str, response: str) -> Verdict:
        if isinstance(verdict := next(verdicts), TimeoutError):
            raise verdict
        return verdict

    monkeypatch.setitem(registry.SCORERS, "math", slow)
    load(RewardConfig())
    assert next(verdicts, None) is None


def test_distinct_valid_derivations_are_distinct_answers() -> None:
    score = load(RewardConfig(name="countdown"))
    added, multiplied = (score(ScoringItem("1 2 3>6", text)) for text in ("2+1=3,3+3=6", "2*1=2,3*2=6"))
    assert added.reward == multiplied.reward == 1.0
    assert added.extracted != multiplied.extracted
    assert score(ScoringItem("1 2 3>6", "3+3=6")).reward == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "maths"}, "Input should be 'math'"),
        ({"name": "countdown", "components": [{"type": "format"}]}, "either name or components"),
        ({"components": [{"type": "format"}, {"type": "format"}]}, "at most once"),
        ({"components": [{"type": "answer", "data_sources": {"x": "math"}}]}, "by_data_source"),
        ({"components": [{"type": "length", "full_tokens": 5, "zero_tokens": 5}]}, "below zero_tokens=5"),
        ({"components": [{"type": "overlong", "max_tokens": 5, "buffer_tokens": 6}]}, "at most max_tokens=5"),
        ({"components": [{"type": "remote", "url": "ftp://host/"}]}, "String should match pattern"),
        ({"components": [{"type": "remote", "url": "http://user:secret@host/"}]}, "String should match pattern"),
        ({"components": [{"type": "remote", "url": "http://host/", "timeout_s": 2, "retries": 2}]}, "above the 6.3 s"),
        ({"components": [{"type": "code", "source": "x"}]}, "Field required"),
        ({"components": [{"type": "shell"}]}, "does not match any of the expected tags"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RewardConfig.model_validate(settings)
