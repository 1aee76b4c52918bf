from __future__ import annotations

from itertools import combinations

import pytest

from sedsft.evaluation.passk import avg_at_n, pass_at_k


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [(8, 0, 4, 0.0), (8, 8, 1, 1.0), (8, 2, 1, 0.25), (4, 1, 2, 0.5), (5, 2, 3, 0.9), (8, 1, 8, 1.0), (10, 3, 2, 8 / 15)],
)
def test_hand_computed(n: int, c: int, k: int, value: float) -> None:
    assert pass_at_k(n, c, k) == value


def test_equals_the_mean_over_all_subsets() -> None:
    rights = [1, 0, 0, 1, 0, 0]
    for k in range(1, 7):
        subsets = list(combinations(rights, k))
        assert pass_at_k(6, 2, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-15)


def test_large_counts_stay_exact() -> None:
    assert pass_at_k(2_000, 1, 1_000) == 0.5


def test_avg() -> None:
    assert avg_at_n(8, 3) == 0.375


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0), (0, 0, 1)])
def test_impossible_counts(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= c <= n"):
        pass_at_k(n, c, k)
