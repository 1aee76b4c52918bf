"""Group advantages on numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.config import AdvantageEstimator
from sedsft.grpo import collect, group_advantages, loss_denominator, mini_batches, share_in_band


def test_advantages_by_hand() -> None:
    # Mean 1/4, deviations (3, -1, -1, -1)/4, sample variance (9 + 3)/16/3 = 1/4, std 1/2.
    result = group_advantages([[1, 0, 0, 0]], np.ones((1, 4), bool))
    np.testing.assert_allclose(result.advantages_PG, [[1.5, -0.5, -0.5, -0.5]], rtol=3e-6)
    assert result.varied_share == 1.0
    assert not result.excluded_PG.any()


def test_std_and_epsilon_are_those_of_torch_std() -> None:
    rewards = torch.tensor([0.0, 1.0, 0.5, 1.0, -1.0], dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    result = group_advantages(rewards[None].numpy(), np.ones((1, 5), bool))
    np.testing.assert_allclose(result.advantages_PG[0], expected.numpy(), rtol=1e-12)


def test_invalid_samples_leave_the_statistics() -> None:
    rewards = [[1.0, math.nan, 0.0, 7.0], [1.0, 0.0, math.inf, 1.0]]
    valid = np.array([[True, False, True, False], [True, True, False, True]])
    result = group_advantages(rewards, valid)
    # First group: 1 and 0 remain, mean 1/2, std sqrt(1/2).
    np.testing.assert_allclose(result.advantages_PG[0], [math.sqrt(0.5), 0, -math.sqrt(0.5), 0], rtol=3e-6)
    # Second group: 1, 0, 1 remain, mean 2/3, variance (1/9 + 4/9 + 1/9)/2 = 1/3.
    np.testing.assert_allclose(result.advantages_PG[1], np.array([1, -2, 0, 1]) / 3 / math.sqrt(1 / 3), rtol=3e-6)
    np.testing.assert_array_equal(result.excluded_PG, ~valid)


def test_groups_that_do_not_vary_get_zero() -> None:
    rewards = [[0.1, 0.1, 0.1], [1, 0, 0], [1, 0, 1], [1, 0, 0]]
    valid = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
    result = group_advantages(rewards, valid)
    np.testing.assert_array_equal(result.varied_P, [False, False, False, True])
    assert (result.advantages_PG[:3] == 0).all()
    assert result.varied_share == 0.25


REWARDS = [[1.0, 0.0, 0.0, math.nan], [2.0, 2.0, 9.0, 9.0], [3.0, 1.0, 2.0, 2.0], [5.0, 9.0, 9.0, 9.0]]
VALID = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
# Groups: (1, 0, 0) of mean 1/3, (2, 2) which does not vary, (3, 1, 2, 2) of mean 2, and (5), alone.
CENTRED = np.array([[2 / 3, -1 / 3, -1 / 3, 0], [0, 0, 0, 0], [1, -1, 0, 0], [0, 0, 0, 0]])
BY_HAND: dict[AdvantageEstimator, npt.NDArray[np.float64]] = {
    # Sample variances (4/9 + 1/9 + 1/9) / 2 = 1/3 and 2 / 3.
    "grpo": CENTRED * np.array([[math.sqrt(3)], [0], [math.sqrt(1.5)], [0]]),
    "dr_grpo": CENTRED,
    # Less the mean of the others: 1 - 0, 0 - 1/2, 0 - 1/2; 3 - 5/3, 1 - 7/3, 2 - 2, 2 - 2.
    "rloo": np.array([[1, -1 / 2, -1 / 2, 0], [0, 0, 0, 0], [4 / 3, -4 / 3, 0, 0], [0, 0, 0, 0]]),
    # All ten: sum 18, mean 1.8, squares 1 + 4 + 4 + 9 + 1 + 4 + 4 + 25 = 52, less 10 * 1.8^2 = 19.6, variance 19.6 / 9.
    "reinforce_pp": np.where(VALID, np.nan_to_num(REWARDS) - 1.8, 0) / math.sqrt(19.6 / 9),
    # Squares 4/9 + 1/9 + 1/9 + 1 + 1 = 8/3 over the same ten, variance 8/27.
    "reinforce_pp_baseline": CENTRED / math.sqrt(8 / 27),
}


@pytest.mark.parametrize("estimator", BY_HAND)
def test_estimators_by_hand(estimator: AdvantageEstimator) -> None:
    result = group_advantages(REWARDS, VALID, estimator)
    np.testing.assert_allclose(result.advantages_PG, BY_HAND[estimator], rtol=3e-6, atol=1e-12)
    np.testing.assert_array_equal(result.excluded_PG, ~VALID)
    np.testing.assert_array_equal(result.varied_P, [True, False, True, False])
    # An invalid reward is not read, whatever it is.
    others = np.where(VALID, REWARDS, -1e9)
    np.testing.assert_array_equal(group_advantages(others, VALID, estimator).advantages_PG, result.advantages_PG)


@pytest.mark.parametrize("estimator", BY_HAND)
def test_equal_rewards_teach_nothing(estimator: AdvantageEstimator) -> None:
    valid = np.array([[1, 1, 1], [1, 0, 1]], bool)
    assert (group_advantages(np.full((2, 3), 0.1), valid, estimator).advantages_PG == 0).all()
    assert (group_advantages(np.full((2, 3), math.nan), np.zeros((2, 3), bool), estimator).advantages_PG == 0).all()


def test_only_reinforce_pp_compares_across_groups() -> None:
    rewards = np.array([[1.0, 1.0], [0.0, 0.0]])
    for estimator in BY_HAND:
        advantages = group_advantages(rewards, np.ones((2, 2), bool), estimator).advantages_PG
        assert (advantages != 0).all() == (estimator == "reinforce_pp")


def test_denominators_by_hand() -> None:
    assert loss_denominator("grpo", [3, 5], max_tokens=10) == 8
    assert loss_denominator("dr_grpo", [3, 5], max_tokens=10) == 20
    assert loss_denominator("rloo", [], max_tokens=10) == loss_denominator("dr_grpo", [], max_tokens=10) == 0


def test_mini_batches_are_even() -> None:
    assert mini_batches(8, 4) == [range(0, 4), range(4, 8)]
    assert [len(batch) for batch in mini_batches(33, 32)] == [16, 17]
    assert [len(batch) for batch in mini_batches(7, 3)] == [2, 2, 3]
    assert mini_batches(2, 32) == [range(0, 2)]
    assert mini_batches(0, 32) == []


class Source:
    """Groups 0, 1, 2, ... below `last`."""

    def __init__(self, last: int = 1000) -> None:
        self.last, self.next = last, 0
        self.asked: list[tuple[int, int]] = []

    def draw(self, refill: int, count: int) -> list[int]:
        self.asked.append((refill, count))
        drawn = list(range(self.next, min(self.next + count, self.last)))
        self.next += len(drawn)
        return drawn


def test_dynamic_sampling_draws_what_is_missing() -> None:
    source = Source()
    collected = collect(source.draw, lambda group: group % 2 == 0, wanted=8, max_refills=5)
    # 0..7 give 4, 8..11 give 2, 12..13 give 1, 14 gives 1.
    assert source.asked == [(0, 8), (1, 4), (2, 2), (3, 1)]
    assert (collected.kept, collected.refills) == ([0, 2, 4, 6, 8, 10, 12, 14], 3)
    assert collected.drawn == list(range(15))


@pytest.mark.parametrize(("max_refills", "last", "refills", "drawn"), [(0, 1000, 0, 8), (2, 1000, 2, 24), (5, 10, 1, 10)])
def test_dynamic_sampling_ends(max_refills: int, last: int, refills: int, drawn: int) -> None:
    collected = collect(Source(last).draw, lambda group: False, wanted=8, max_refills=max_refills)
    assert (collected.kept, collected.refills, len(collected.drawn)) == ([], refills, drawn)


def test_difficulty_band_by_hand() -> None:
    valid = [True, True, True, True]
    assert share_in_band([1, 0, 0, 0], valid, 0.25, 0.75) == (0.25, True)
    assert share_in_band([1, 1, 1, 1], valid, 0.25, 0.75) == (1.0, False)
    assert share_in_band([0, 0, 0, 0], valid, 0.25, 0.75) == (0.0, False)
    assert share_in_band([1, 0, 1, 1], [True, True, False, False], 0.25, 0.75) == (0.5, True)
    assert share_in_band([1, 0, 1, 1], [False] * 4, 0.0, 1.0) == (None, False)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.data())
def test_valid_advantages_sum_to_zero_and_do_not_depend_on_shift_or_order(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 8))
    rewards = np.array(data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=size, max_size=size)))
    valid = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    result = group_advantages(rewards[None], valid[None]).advantages_PG[0]
    assert abs(result.sum()) < 1e-9
    assert (result[~valid] == 0).all()
    np.testing.assert_allclose(group_advantages(rewards[None] + 3, valid[None]).advantages_PG[0], result, atol=1e-9)
    order = np.random.default_rng(0).permutation(size)
    np.testing.assert_allclose(
        group_advantages(rewards[None, order], valid[None, order]).advantages_PG[0], result[order], atol=1e-9
    )


@pytest.mark.parametrize(
    ("rewards", "valid", "message"),
    [
        ([1.0, 0.0], [True, True], r"\[P, G\]"),
        ([[1.0, 0.0]], [[True]], r"\[P, G\]"),
        (np.zeros((0, 4)), np.zeros((0, 4), bool), "not empty"),
        ([[1.0, math.nan]], [[True, True]], "finite"),
    ],
)
def test_errors(rewards: object, valid: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, valid)  # type: ignore[arg-type]


def test_group_advantages_do_not_load_torch() -> None:
    code = "import sys, sedsft.grpo, sedsft.exploration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
