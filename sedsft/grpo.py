"""Group-relative policy optimisation: advantages of a group of responses.

Numpy only, so that the driver does not load torch. The clipped loss is `sedsft.objectives.PolicyObjective`.

Legend: P prompts, G samples per prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_EPSILON = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class GroupAdvantages:
    """Advantages and which samples and groups they stand on."""

    advantages_PG: npt.NDArray[np.float64]
    """0 for excluded samples and for all samples of a group that did not vary."""
    excluded_PG: npt.NDArray[np.bool_]
    """Samples without a valid reward: they belong neither in the loss nor in its denominator."""
    varied_P: npt.NDArray[np.bool_]
    """Groups whose valid rewards differ; only they teach anything."""

    @property
    def varied_share(self) -> float:
        """Share of groups with non-zero variance."""
        return float(self.varied_P.mean())


def group_advantages(rewards_PG: npt.ArrayLike, valid_PG: npt.ArrayLike) -> GroupAdvantages:
    """Normalises rewards within each group over its valid samples.

        A_i = (r_i - mean) / (std + 1e-6),   std with n - 1 in the denominator, n valid samples

    The n - 1 and the 1e-6 are those of the paper's RL runs (verl, `compute_grpo_outcome_advantage`). Unlike there, a group
    with fewer than two valid samples gets 0 and not its raw reward: one sample says nothing relative to its group.
    What stands at an invalid place in `rewards_PG` is not read.

    Errors: ValueError for shapes other than [P, G] with P, G >= 1, or a valid reward that is not finite.
    """
    given_PG, valid = np.asarray(rewards_PG, dtype=np.float64), np.asarray(valid_PG, dtype=np.bool_)
    if given_PG.ndim != 2 or given_PG.shape != valid.shape or not given_PG.size:
        raise ValueError(
            f"expected rewards and validity of one shape [P, G], not empty, got {given_PG.shape} and {valid.shape}"
        )
    if not np.isfinite(given_PG[valid]).all():
        raise ValueError("expected finite rewards where valid, got NaN or infinity; mark such samples invalid instead")
    rewards = np.where(valid, given_PG, 0.0)
    num_valid_P1 = valid.sum(axis=1, keepdims=True)
    mean_P1 = rewards.sum(axis=1, keepdims=True) / np.maximum(num_valid_P1, 1)
    centred_PG = np.where(valid, rewards - mean_P1, 0.0)
    std_P1 = np.sqrt((centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(num_valid_P1 - 1, 1))
    # Compared and not computed: rounding gives three rewards of 0.1 a variance above zero.
    largest_P = np.where(valid, rewards, -np.inf).max(axis=1)
    varied_P = largest_P > np.where(valid, rewards, np.inf).min(axis=1)
    advantages_PG = np.where(varied_P[:, None], centred_PG / (std_P1 + _EPSILON), 0.0)
    return GroupAdvantages(advantages_PG, ~valid, varied_P)
