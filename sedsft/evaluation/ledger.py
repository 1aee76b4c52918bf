"""When the exploration ledger raises its alarm."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


def exploration_spent(
    entropies: Sequence[float], pass_1s: Sequence[float], entropy_share: float, smoothing_probes: int
) -> bool:
    """Whether entropy was spent without reward, by the probes of a run so far, the first of them taken before training.

        entropies[-1] < (1 - entropy_share) entropies[0]   and   mean(pass_1s[-smoothing_probes:]) <= pass_1s[0]

    Never before there are `smoothing_probes` probes behind the first: a single one says little about pass@1.
    """
    if len(entropies) <= smoothing_probes:
        return False
    return entropies[-1] < (1 - entropy_share) * entropies[0] and fmean(pass_1s[-smoothing_probes:]) <= pass_1s[0]
