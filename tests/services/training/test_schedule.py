from __future__ import annotations

import pytest

from sedsft.config import AdamWConfig
from services.training.schedule import learning_rate


def rates(config: AdamWConfig, total: int) -> list[float]:
    return [learning_rate(config, step, total) for step in range(1, total + 1)]


def test_warm_up_rises_to_the_peak_and_the_cosine_falls() -> None:
    config = AdamWConfig(learning_rate=1.0, warmup_steps=3)
    # (1 + cos(pi * x)) / 2 at x = 0, 1/4, 1/2, 3/4
    assert rates(config, 7) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.8535534, 0.5, 0.1464466])


def test_the_cosine_ends_above_its_floor() -> None:
    config = AdamWConfig(learning_rate=0.5, min_ratio=0.1)
    assert rates(config, 2) == pytest.approx([0.5, 0.5 * (0.1 + 0.9 * 0.5)])


def test_a_constant_rate_stays_and_outlives_the_schedule() -> None:
    config = AdamWConfig(learning_rate=0.5, warmup_steps=1, schedule="constant")
    assert [*rates(config, 3), learning_rate(config, 99, 3)] == [0.25, 0.5, 0.5, 0.5]


def test_a_warm_up_longer_than_training_never_reaches_the_peak() -> None:
    assert max(rates(AdamWConfig(learning_rate=1.0, warmup_steps=9), 4)) == pytest.approx(0.4)
