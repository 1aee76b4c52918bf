"""Group-relative policy optimisation: advantages of a group of responses, and what to watch during the update.

Group advantages need numpy only, so that the driver does not load torch. The clipped loss is
`sedsft.objectives.PolicyObjective`.

Legend: P prompts, G samples per prompt, N response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

    from sedsft.objectives import PolicyObjective

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


@dataclass(frozen=True, slots=True)
class PolicyMetrics:
    """Means over tokens; weight by `num_tokens` to join micro-batches and ranks."""

    num_tokens: int
    clip_fraction: float
    """Share of tokens whose gradient the clip stops."""
    mean_ratio: float
    """Mean of r = p / p_old; 1 while the policy is the one that sampled."""
    approx_kl: float
    """Mean of r - 1 - log r: unbiased for KL(old || new) on tokens drawn from the old policy, and never negative."""


def policy_metrics(objective: PolicyObjective, log_prob_N: Tensor, active_N: Tensor) -> PolicyMetrics:
    """Metrics of an update from the head's detached outputs, over response tokens only: drop ignored labels first.

    Errors: ValueError for no token or lengths that differ. Source of the KL estimate: J. Schulman, "Approximating KL
    divergence", k3.
    """
    num_tokens = log_prob_N.numel()
    if not num_tokens or not objective.old_log_prob_N.shape == log_prob_N.shape == active_N.shape:
        shapes = [tuple(tensor.shape) for tensor in (objective.old_log_prob_N, log_prob_N, active_N)]
        raise ValueError(f"expected old log-probs, log-probs and activity of one shape [N], N >= 1, got {shapes}")
    log_ratio_N = log_prob_N.double() - objective.old_log_prob_N.double()
    return PolicyMetrics(
        num_tokens=num_tokens,
        clip_fraction=1 - float(active_N.double().mean()),
        mean_ratio=float(log_ratio_N.exp().mean()),
        approx_kl=float((log_ratio_N.expm1() - log_ratio_N).mean()),
    )
