from __future__ import annotations

import pytest

from sedsft.reward_config import RewardConfig
from sedsft.rewards.registry import load


@pytest.fixture(scope="session")
def algebra() -> None:
    """Builds the tables of the algebra, so that no comparison is charged for it."""
    load(RewardConfig())
