"""Accuracy over several samples of one problem."""

from __future__ import annotations

from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right, from n samples of which c are right.

        pass@k = 1 - C(n - c, k) / C(n, k)

    Computed with integers, so exact up to the last division. Source: arXiv 2107.03374, section 2.1.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"expected 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}; draw at least k samples")
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def avg_at_n(n: int, c: int) -> float:
    """Share of right samples, c / n; equal to pass@1.

    Raises:
        ValueError: unless 0 <= c <= n and n >= 1.
    """
    return pass_at_k(n, c, 1)
