"""Group advantages on numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.grpo import group_advantages


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
