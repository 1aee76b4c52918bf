from __future__ import annotations

import pytest

from sedsft.reward_config import FormatReward, LengthReward, OverlongPenalty
from sedsft.rewards.components import format_reward, length_reward, overlong_penalty


@pytest.mark.parametrize(
    ("response", "box", "think_box"),
    [
        (r"so \boxed{5}", 1, 0),
        (r"<think>a</think> \boxed{5}", 1, 1),
        (r"<think>\boxed{4}</think> \boxed{5}", 0, 1),
        (r"<think>a</think> 5", 0, 0),
        (r"\boxed{4} \boxed{5}", 0, 0),
        (r"\boxed{\boxed{5}}", 1, 0),
        (r"\boxed{5", 0, 0),
        (r"<think>a<think>b</think> \boxed{5}", 1, 0),
        (r"Hm <think>a</think> \boxed{5}", 1, 0),
        ("", 0, 0),
    ],
)
def test_form(response: str, box: int, think_box: int) -> None:
    assert format_reward(FormatReward(), response) == box
    assert format_reward(FormatReward(form="think_box"), response) == think_box


@pytest.mark.parametrize(("tokens", "reward"), [(0, 1), (100, 1), (150, 0.75), (200, 0.5), (300, 0), (400, 0)])
def test_length(tokens: int, reward: float) -> None:
    assert length_reward(LengthReward(full_tokens=100, zero_tokens=300), tokens) == reward


@pytest.mark.parametrize(("tokens", "reward"), [(0, 0), (80, 0), (85, -0.25), (90, -0.5), (100, -1), (120, -1)])
def test_overlong(tokens: int, reward: float) -> None:
    assert overlong_penalty(OverlongPenalty(max_tokens=100, buffer_tokens=20), tokens) == reward
