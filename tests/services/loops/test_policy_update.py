"""From scored groups to updates, with ranks that note what they are asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sedsft.config import DataConfig, GRPOConfig
from sedsft.records import PolicyRow, Prompt, RolloutGroup, Sample, Score
from services.loops.policy_update import advantages_of, kept_groups, policy_rows, rollout_figures, update_policy

RIGHT, WRONG, LATE = Score(1.0, "scored", "3"), Score(0.0, "scored", "4"), Score(float("nan"), "timeout")


def sample(*ids: int, truncated: bool = False) -> Sample:
    return Sample(ids, (-0.5,) * len(ids), "", truncated, 7)


def group(*scored: tuple[Sample, Score]) -> RolloutGroup:
    return RolloutGroup(Prompt((1, 2), "12", "3", 1), tuple(s for s, _ in scored), tuple(score for _, score in scored))


GROUPS = [
    group((sample(5), RIGHT), (sample(5, 6), WRONG), (sample(5, 6, 7), LATE)),
    group((sample(8), RIGHT), (sample(9), RIGHT), (sample(9, 9, truncated=True), WRONG)),
]


def config(**given: Any) -> GRPOConfig:
    sizes = {"prompts_per_iteration": 2, "mini_batch_prompts": 1, "max_tokens": 10}
    return GRPOConfig(data=DataConfig(path="unused.jsonl"), iterations=1, **(sizes | given))


class Ranks:
    """Two ranks that share out work as trainer ranks do. A response's log-probabilities are -ids, its reference's -2 ids."""

    def __init__(self) -> None:
        self.updates: list[tuple[list[PolicyRow], int, int]] = []
        self.asked: list[tuple[list[list[int]], bool]] = []

    def __len__(self) -> int:
        return 2

    def scatter(self, method: str, shards: list[Any], *, timeout_s: float) -> list[Any]:
        if method == "log_probs":
            self.asked.append(([response.tolist() for pairs, _ in shards for _, response in pairs], shards[0][1]))
            return [[-(1 + reference) * np.float32(response) for _, response in pairs] for pairs, reference in shards]
        assert method == "update"
        self.updates.append(([row for rows, _, _ in shards for row in rows], shards[0][1], shards[0][2]))
        sums = {"loss": 2.0, "entropy": 3.0, "clipped": 1.0, "tokens": 2.0, "logprob_gap": 0.5 * len(self.updates)}
        return [sums | {"tis_weight": 2.5, "tis_truncated": 0.5, "grad_norm": 1.5, "learning_rate": 1e-6}] * 2


def update(groups: list[RolloutGroup], settings: GRPOConfig) -> tuple[Ranks, dict[str, float]]:
    ranks = Ranks()
    return ranks, update_policy(ranks, settings, groups, first_step=5)  # type: ignore[arg-type]


def test_an_unscored_sample_never_reaches_the_update() -> None:
    advantages = advantages_of(GROUPS, config())
    rows = policy_rows(GROUPS, advantages, range(2))
    assert [row.response_ids_R.tolist() for row in rows] == [[5], [5, 6], [8], [9], [9, 9]]
    # (1 - 1/2) / (sqrt(1/2) + 1e-6), over the two scored samples; then mean 2/3, deviations (1, 1, -2)/3, variance 1/3.
    expected = [0.7071058, -0.7071058, *np.array([1, 1, -2]) / np.sqrt(3)]
    assert [row.advantage for row in rows] == pytest.approx(expected, abs=2e-6)


def test_truncated_responses_leave_loss_and_statistics() -> None:
    settings = config(mask_truncated=True)
    advantages = advantages_of(GROUPS, settings)
    assert [row.response_ids_R.tolist() for row in policy_rows(GROUPS, advantages, range(2))] == [[5], [5, 6], [8], [9]]
    # The cut answer was the only wrong one: without it the second group does not vary.
    assert advantages.varied_P.tolist() == [True, False]
    assert kept_groups(GROUPS, settings) == GROUPS
    assert kept_groups(GROUPS, config(mask_truncated=True, max_refills=0)) == GROUPS[:1]
    assert rollout_figures(GROUPS, advantages, settings)["masked_truncated"] == 1


def test_figures_count_errors_apart_from_rewards() -> None:
    assert rollout_figures(GROUPS, advantages_of(GROUPS, config()), config()) == {
        "reward": 3 / 5,
        "groups_with_variance": 1.0,
        "response_tokens": 10 / 6,
        "truncated": 1 / 6,
        "score_errors": 1.0,
        "scores_scored": 5.0,
        "scores_timeout": 1.0,
        "scores_crashed": 0.0,
        "scores_invalid": 0.0,
        "score_seconds_max": 0.0,
    }


def test_only_later_mini_batches_need_another_pass() -> None:
    ranks, figures = update(GROUPS, config())
    assert ranks.asked == [([[8], [9, 9], [9]], False)]
    assert [(denominator, step) for _, denominator, step in ranks.updates] == [(3, 5), (4, 6)]
    first, second = (rows for rows, _, _ in ranks.updates)
    assert [row.old_log_probs_R for row in first] == [None, None]
    for row in second:
        assert row.old_log_probs_R is not None
        assert row.old_log_probs_R.tolist() == (-row.response_ids_R).tolist()
    # Sums of two ranks and two updates: losses 8 over 3 + 4 tokens, others over the 8 that the ranks counted; gaps 1 and 2.
    expected = {"policy_loss": 8 / 7, "entropy": 1.5, "clip_fraction": 0.5, "logprob_gap": 3 / 8, "tis_weight": 1.25}
    assert figures == pytest.approx(expected | {"tis_truncated": 0.25, "grad_norm": 1.5, "learning_rate": 1e-6})


def test_the_samplers_distribution_needs_no_pass() -> None:
    ranks, figures = update(GROUPS, config(tis_cap=None))
    assert ranks.asked == []
    assert figures["logprob_gap"] == 1 / 4


def test_a_divergence_asks_for_the_reference_once() -> None:
    ranks, _ = update(GROUPS, config(kl_weight=0.1, tis_cap=None))
    assert [(len(responses), reference) for responses, reference in ranks.asked] == [(5, True)]
    rows = [row for rows, _, _ in ranks.updates for row in rows]
    assert [row.reference_log_probs_R.tolist() for row in rows if row.reference_log_probs_R is not None] == [
        (-2 * row.response_ids_R).tolist() for row in rows
    ]


def test_a_budget_is_the_denominator_of_dr_grpo() -> None:
    ranks, _ = update(GROUPS, config(advantage="dr_grpo"))
    assert [denominator for _, denominator, _ in ranks.updates] == [20, 30]
    ranks, _ = update(GROUPS, config(advantage="dr_grpo", mask_truncated=True, mini_batch_prompts=2))
    assert [denominator for _, denominator, _ in ranks.updates] == [40]


def test_what_is_left_is_normalised_by_itself_and_nothing_makes_no_step() -> None:
    settings = config(max_refills=0, mask_truncated=True, mini_batch_prompts=2)
    ranks, _ = update(kept_groups(GROUPS, settings), settings)
    assert [(len(rows), denominator) for rows, denominator, _ in ranks.updates] == [(2, 3)]
    ranks, figures = update([], settings)
    assert (ranks.updates, figures) == ([], {})
    unscored = group((sample(5), LATE), (sample(6), LATE), (sample(7), LATE))
    ranks, _ = update([unscored, GROUPS[0]], config())
    assert [(denominator, step) for _, denominator, step in ranks.updates] == [(3, 5)]
