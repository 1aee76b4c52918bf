"""The ledger's alarm by hand."""

from __future__ import annotations

import pytest

from sedsft.evaluation.ledger import exploration_spent


@pytest.mark.parametrize(
    ("entropies", "pass_1s", "spent"),
    [
        # Half of 1.0 is gone and the mean of the last two, 0.2, is not above the first.
        ([1.0, 0.8, 0.49], [0.2, 0.1, 0.3], True),
        # Not more than half.
        ([1.0, 0.8, 0.5], [0.2, 0.1, 0.3], False),
        # Entropy became reward: 0.21 on average.
        ([1.0, 0.8, 0.4], [0.2, 0.1, 0.32], False),
        # What lies further back than two probes does not count, the first does.
        ([1.0, 0.8, 0.4, 0.3], [0.2, 0.9, 0.1, 0.2], True),
        # Entropy that came back is not spent.
        ([1.0, 0.1, 0.6], [0.2, 0.1, 0.1], False),
        # Two probes behind the first are needed.
        ([1.0, 0.1], [0.2, 0.1], False),
        ([], [], False),
    ],
)
def test_alarm_by_hand(entropies: list[float], pass_1s: list[float], spent: bool) -> None:
    assert exploration_spent(entropies, pass_1s, entropy_share=0.5, smoothing_probes=2) is spent
