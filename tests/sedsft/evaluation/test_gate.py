"""The gate's rules on figures made up for them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sedsft.config import DataConfig
from sedsft.evaluation.gate import Candidate, best, judged
from sedsft.gate_config import GateConfig, GateFigure

READY = {
    "pass@1": 0.3,
    "pass@G": 0.8,
    "groups_with_variance": 0.6,
    "distinct_answers": 4.0,
    "self_bleu": 40.0,
    "token_entropy": 0.5,
}


def config(**settings: object) -> GateConfig:
    return GateConfig.model_validate({"data": DataConfig(path="rl.jsonl")} | settings)


ALL = config(
    min_pass_at_g=0.8, min_groups_with_variance=0.6, min_distinct_answers=4, max_self_bleu=40, min_entropy=0.5, group_size=8
)


def test_a_figure_at_its_threshold_is_enough() -> None:
    assert judged("sed", READY, ALL).misses == ()
    assert judged("sed", dict.fromkeys(READY, 0.0), config()).misses == ()


@pytest.mark.parametrize(
    ("figure", "value", "advice"),
    [
        ("pass@G", 0.79, "a larger mask_ratio of SED, a lower learning rate or fewer epochs"),
        ("pass@G", 0.0, "no sample was right"),
        # 40% of the groups are equal in all samples, half of these or more because nothing is right.
        ("groups_with_variance", 0.59, "right in every sample"),
        ("distinct_answers", 3.9, "a smaller mask_ratio"),
        ("self_bleu", 40.1, "fewer epochs"),
        ("token_entropy", 0.49, "fewer epochs or at a lower learning rate"),
        ("token_entropy", None, "got unknown"),
    ],
)
def test_each_threshold_is_named_with_figure_and_advice(figure: str, value: float | None, advice: str) -> None:
    [miss] = judged("ce", READY | {figure: value}, ALL).misses
    assert (miss.figure, miss.value) == (figure, value)
    assert miss.threshold == (READY[figure] if figure != "self_bleu" else 40)
    assert advice in judged("ce", READY | {figure: value}, ALL).missed
    if value is not None:
        assert str(miss).startswith(
            f"expected {figure} of at {'most' if figure == 'self_bleu' else 'least'} {miss.threshold:g}"
        )


def test_equal_advice_is_given_once() -> None:
    missed = judged("ce", READY | {"token_entropy": 0.1, "self_bleu": 90.0, "pass@G": 0.0}, ALL).missed
    assert missed.count("the samples are too alike") == 1
    assert "expected self_bleu of at most 40, got 90, expected token_entropy of at least 0.5, got 0.1: the samples" in missed
    assert missed.startswith("expected pass@G of at least 0.8, got 0: no sample was right")


def test_advice_on_variance_follows_what_most_equal_groups_are() -> None:
    # 60% of groups are equal: 30% without a right sample, so 30% are all right; then 20% against 40%.
    for any_right, words in ((0.7, "take easier prompts or a larger group"), (0.8, "take harder prompts")):
        [miss] = judged(
            "ce", READY | {"groups_with_variance": 0.4, "pass@G": any_right}, config(min_groups_with_variance=0.5)
        ).misses
        assert words in miss.advice


def candidate(name: str, **figures: float) -> Candidate:
    return judged(
        name, READY | {figure.replace("_at_", "@"): value for figure, value in figures.items()}, config(min_entropy=0.4)
    )


@pytest.mark.parametrize(
    ("rank_by", "winner"),
    [("groups_with_variance", "b"), ("self_bleu", "c"), ("entropy", "a"), ("distinct_answers", "b")],
)
def test_the_best_of_those_that_pass_wins(rank_by: GateFigure, winner: str) -> None:
    candidates = [
        candidate("a", groups_with_variance=0.5, token_entropy=0.9),
        # Equal to d in all that is asked first, so entropy tells; all have as many distinct answers.
        candidate("b", groups_with_variance=0.7, token_entropy=0.6),
        candidate("c", groups_with_variance=0.4, self_bleu=20.0),
        candidate("d", groups_with_variance=0.7, token_entropy=0.5),
        candidate("spent", groups_with_variance=0.9, token_entropy=0.1, self_bleu=1.0),
    ]
    chosen = best(candidates, rank_by)
    assert chosen is not None
    assert chosen.name == winner


def test_equals_are_settled_by_their_order_and_none_may_pass() -> None:
    assert best([candidate("first"), candidate("second")], "groups_with_variance") == candidate("first")
    assert best([candidate("spent", token_entropy=0.1)], "groups_with_variance") is None


def test_more_distinct_answers_than_samples_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_distinct_answers of at most group_size=4"):
        config(group_size=4, min_distinct_answers=5)
