"""Group-relative policy optimisation and its kin: advantages, the loss's denominator, mini-batches, dynamic sampling.

Numpy only, so that the driver does not load torch. The clipped loss is `sedsft.objectives.PolicyObjective`.

Legend: P prompts, G samples per prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from sedsft.config import AdvantageEstimator

_EPSILON = 1e-6

GroupT = TypeVar("GroupT")


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantages:
    """Advantages and which samples and groups they stand on."""

    advantages_PG: npt.NDArray[np.float64]
    """0 for excluded samples and, unless the estimator compares across groups, for all of a group that did not vary."""
    excluded_PG: npt.NDArray[np.bool_]
    """Samples without a valid reward: they belong neither in the loss nor in its denominator."""
    varied_P: npt.NDArray[np.bool_]
    """Groups whose valid rewards differ; relative to their own group, only they teach anything."""

    @property
    def varied_share(self) -> float:
        """Share of groups with non-zero variance."""
        return float(self.varied_P.mean())


def group_advantages(
    rewards_PG: npt.ArrayLike, valid_PG: npt.ArrayLike, estimator: AdvantageEstimator = "grpo"
) -> GroupAdvantages:
    """Advantages of all valid samples; n of them are in a group and N in all groups, and only they enter any figure below.

        grpo                   (r - mean_group) / (std_group + 1e-6)                    arXiv 2402.03300
        dr_grpo                r - mean_group                                           arXiv 2503.20783
        rloo                   r - mean of the group's others = n / (n - 1) (r - mean_group)    arXiv 2402.14740
        reinforce_pp           (r - mean_all) / (std_all + 1e-6)                        arXiv 2501.03262
        reinforce_pp_baseline  a / (std_all of a + 1e-6),  a = r - mean_group           arXiv 2501.03262

    std has n - 1, or N - 1, in its denominator. That and the 1e-6 are those of the paper's RL runs (verl,
    `compute_grpo_outcome_advantage`). Unlike there, a sample that is alone in its group gets 0 from every estimator that
    compares within groups, and not its raw reward. REINFORCE++ counts every response once in its mean and std, where some
    implementations weight it by its tokens; `mean_all` of a is 0 by construction.
    What stands at an invalid place in `rewards_PG` is not read.

    Errors: ValueError for shapes other than [P, G] with P, G >= 1, or a valid reward that is not finite.
    """
    rewards_PG, valid = _checked(rewards_PG, valid_PG)
    num_valid_P1 = valid.sum(axis=1, keepdims=True)
    # Compared and not computed: rounding gives three rewards of 0.1 a variance above zero.
    varied_P1 = _highest(rewards_PG, valid, axis=1) > -_highest(-rewards_PG, valid, axis=1)
    mean_P1 = rewards_PG.sum(axis=1, keepdims=True) / np.maximum(num_valid_P1, 1)
    centred_PG = np.where(valid & varied_P1, rewards_PG - mean_P1, 0.0)
    others_P1 = np.maximum(num_valid_P1 - 1, 1)
    match estimator:
        case "grpo":
            std_P1 = np.sqrt((centred_PG**2).sum(axis=1, keepdims=True) / others_P1)
            advantages_PG = centred_PG / (std_P1 + _EPSILON)
        case "dr_grpo":
            advantages_PG = centred_PG
        case "rloo":
            advantages_PG = centred_PG * num_valid_P1 / others_P1
        case "reinforce_pp":
            varied = bool(_highest(rewards_PG, valid, axis=None) > -_highest(-rewards_PG, valid, axis=None))
            mean = rewards_PG.sum() / max(valid.sum(), 1)
            advantages_PG = _scaled(np.where(valid & varied, rewards_PG - mean, 0.0), valid)
        case "reinforce_pp_baseline":
            advantages_PG = _scaled(centred_PG, valid)
    return GroupAdvantages(advantages_PG, ~valid, varied_P1[:, 0])


def _checked(rewards_PG: npt.ArrayLike, valid_PG: npt.ArrayLike) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Rewards, 0 where they are not valid, and where they are."""
    given_PG, valid = np.asarray(rewards_PG, dtype=np.float64), np.asarray(valid_PG, dtype=np.bool_)
    if given_PG.ndim != 2 or given_PG.shape != valid.shape or not given_PG.size:
        raise ValueError(
            f"expected rewards and validity of one shape [P, G], not empty, got {given_PG.shape} and {valid.shape}"
        )
    if not np.isfinite(given_PG[valid]).all():
        raise ValueError("expected finite rewards where valid, got NaN or infinity; mark such samples invalid instead")
    return np.where(valid, given_PG, 0.0), valid


def _highest(values_PG: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_], axis: int | None) -> npt.NDArray[np.float64]:
    """Largest valid value along `axis`, which is kept; -infinity without any."""
    highest: npt.NDArray[np.float64] = np.max(np.where(valid, values_PG, -np.inf), axis=axis, keepdims=True)
    return highest


def _scaled(centred_PG: npt.NDArray[np.float64], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Centred values in units of their standard deviation over all valid samples."""
    variance = float((centred_PG**2).sum()) / max(int(valid.sum()) - 1, 1)
    return centred_PG / (math.sqrt(variance) + _EPSILON)


def loss_denominator(estimator: AdvantageEstimator, response_lengths: Sequence[int], max_tokens: int) -> int:
    """What the token losses of an optimizer step are divided by; `response_lengths` are its responses on all ranks, in tokens.

        dr_grpo: responses * max_tokens, the budget that they had (arXiv 2503.20783)
        others:  the tokens that they have (arXiv 2503.14476)

    With the budget, a token weighs the same whatever the lengths of its own and the other responses are.
    """
    return len(response_lengths) * max_tokens if estimator == "dr_grpo" else sum(response_lengths)


def mini_batches(num_groups: int, largest: int) -> list[range]:
    """Consecutive groups of each optimizer step: as few steps as `largest` allows, of lengths that differ by at most one.

    Each step has its own denominator, so a short step at the end would move the weights as far as a full one on less evidence.
    """
    count = -(-num_groups // largest)
    borders = [num_groups * step // count for step in range(count + 1)] if count else [0]
    return [range(start, end) for start, end in pairwise(borders)]


@dataclass(frozen=True, slots=True)
class Collected(Generic[GroupT]):
    """What dynamic sampling has got together."""

    kept: list[GroupT]
    """Groups that teach, at most as many as were wanted."""
    drawn: list[GroupT]
    """All groups, the kept among them, in the order they were drawn: what figures about the policy are taken over."""
    refills: int
    """Rounds after the first."""


def collect(
    draw: Callable[[int, int], Sequence[GroupT]], teaches: Callable[[GroupT], bool], wanted: int, max_refills: int
) -> Collected[GroupT]:
    """Dynamic sampling (arXiv 2503.14476): groups that teach nothing are replaced by others, at most `max_refills` times.

    `draw(refill, count)` gives at most `count` scored groups, for refill 0 the first ones; where it gives none, it has no more.
    What is missing after the last refill stays missing: the update is then over fewer groups, normalised by what they hold.
    """
    drawn = list(draw(0, wanted))
    kept = [group for group in drawn if teaches(group)]
    refills = 0
    while len(kept) < wanted and refills < max_refills and (more := draw(refills + 1, wanted - len(kept))):
        refills += 1
        drawn += more
        kept += [group for group in more if teaches(group)]
    return Collected(kept, drawn, refills)


def share_in_band(right_G: npt.ArrayLike, valid_G: npt.ArrayLike, low: float, high: float) -> tuple[float | None, bool]:
    """Offline difficulty filter: the share of right answers among a prompt's valid samples, and whether low <= share <= high.

    Without a valid sample the share is None and the prompt is not in the band: nothing is known about its difficulty.
    0 < low and high < 1 drop prompts that are always or never solved, which have no gradient relative to their group.
    """
    valid = np.asarray(valid_G, dtype=np.bool_)
    if not valid.any():
        return None, False
    share = float(np.asarray(right_G, dtype=np.bool_)[valid].mean())
    return share, low <= share <= high
