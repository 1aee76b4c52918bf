from __future__ import annotations

import json

import pytest

from sedsft.evaluation.metrics import mean_row, readiness, summarise, token_entropy
from sedsft.records import Prompt, RolloutGroup, Sample, Score


def sample(text: str, log_probs: tuple[float, ...], truncated: bool = False) -> Sample:
    return Sample(tuple(range(len(log_probs))), log_probs, text, truncated, 0)


def group(samples: list[Sample], scores: list[Score]) -> RolloutGroup:
    return RolloutGroup(Prompt((1,), "p", "a", 1), tuple(samples), tuple(scores))


RIGHT, WRONG = Score(1.0, "scored", "7"), Score(0.0, "scored", "8")
NO_ANSWER, LATE = Score(0.0, "scored", None), Score(0.0, "timeout")


def two_groups() -> list[RolloutGroup]:
    """Three scored samples with one right and a time-out; four scored ones, all wrong."""
    first = group(
        [
            sample("a b c d", (-1.0, -2.0)),
            sample("a b c d", (-3.0,)),
            sample("e f g h", (-2.0,), truncated=True),
            sample("z", ()),
        ],
        [RIGHT, WRONG, NO_ANSWER, LATE],
    )
    return [first, group([sample("x y", (-0.5, -0.5))] * 4, [WRONG, WRONG, WRONG, Score(0.0, "scored", "9")])]


def test_summary_by_hand() -> None:
    row = summarise(two_groups(), pass_k=(1, 2, 4))
    assert row["avg"] == pytest.approx((1 / 3 + 0) / 2)
    assert row["pass@1"] == row["avg"]
    assert row["pass@2"] == pytest.approx((2 / 3 + 0) / 2)
    assert row["pass@4"] == 0.0
    assert row["pass@4_left_out"] == 1
    assert "pass@2_left_out" not in row
    assert row["distinct_answers"] == 2.0
    assert row["distinct_correct"] == 0.5
    assert row["token_entropy"] == pytest.approx((1 + 2 + 3 + 2 + 4 * 1) / 12)
    assert row["response_tokens"] == pytest.approx((2 + 1 + 1 + 0 + 4 * 2) / 8)
    assert row["truncated"] == 1 / 8
    assert row["no_answer"] == 1 / 7
    assert row["self_bleu"] == pytest.approx((50 + 100) / 2)
    assert {name: row[name] for name in ("prompts", "samples", "scored", "timeout", "crashed", "invalid")} == {
        "prompts": 2, "samples": 8, "scored": 7, "timeout": 1, "crashed": 0, "invalid": 0,
    }  # fmt: skip
    json.dumps(row, allow_nan=False)


def test_an_error_is_never_a_zero() -> None:
    groups = [group([sample("a", (-1.0,)), sample("b", (-1.0,))], [RIGHT, Score(float("nan"), "invalid")])]
    row = summarise(groups, pass_k=(1,))
    assert row["avg"] == 1.0
    assert row["invalid"] == 1


def test_nothing_scored_gives_none() -> None:
    row = summarise([group([sample("a", (-1.0,))], [LATE])], pass_k=(1,))
    assert row["avg"] is row["pass@1"] is row["distinct_answers"] is row["no_answer"] is row["self_bleu"] is None
    assert summarise([], pass_k=(1,))["avg"] is None


def test_readiness_by_hand() -> None:
    figures = readiness(two_groups())
    assert figures["pass@1"] == pytest.approx(1 / 6)
    assert figures["pass@G"] == 0.5
    assert figures["groups_with_variance"] == 0.5
    assert figures["distinct_answers"] == 2.0
    assert figures["token_entropy"] == pytest.approx(1.0)
    assert figures["self_bleu"] == summarise(two_groups(), pass_k=())["self_bleu"]
    assert figures["group_size"] == 4
    assert figures["timeout"] == 1


def test_unscored_group_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one score per sample, got 0 scores for 1 samples"):
        summarise([group([sample("a", (-1.0,))], [])], pass_k=(1,))


def test_token_entropy_of_nothing_and_of_infinity() -> None:
    assert token_entropy([]) is None
    with pytest.raises(ValueError, match="expected finite log-probabilities"):
        token_entropy([sample("a", (float("-inf"),))])


def test_mean_row_averages_figures_and_adds_counts() -> None:
    row = mean_row(
        [
            {"avg": 0.5, "self_bleu": 40.0, "samples": 8, "timeout": 1, "self_bleu_signature": "s", "pass@8_left_out": 1},
            {"avg": 0.0, "self_bleu": None, "samples": 16, "timeout": 0, "self_bleu_signature": "s"},
        ]
    )
    assert row == {
        "avg": 0.25, "self_bleu": None, "samples": 24, "timeout": 1, "self_bleu_signature": "s", "pass@8_left_out": 1,
    }  # fmt: skip
