"""Training objectives as functions of what one pass over the vocabulary yields.

Every objective but GEM needs only scalars of a token, so its gradient is the cross-entropy gradient times one number:

    dL/dz = dL/dlog p_y * (onehot(y) - pi),   pi = softmax(z)

GEM subtracts another distribution than pi and so has a row function of its own.

Legend: N tokens, V vocabulary; p = exp(log_prob) is the probability of the target y.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sedsft.config import CEObjective, DFTObjective, GEMObjective, SEDObjective


@dataclass(frozen=True, slots=True, eq=False)
class TokenStatistics:
    """What one pass over the vocabulary says about each token. Carries no gradient; entropy in nats."""

    log_prob_N: Tensor
    topk_mass_N: Tensor | None
    """Sum of the k largest probabilities; None where the caller needs no top-k."""
    entropy_N: Tensor
    argmax_N: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TokenLoss:
    """Loss of each token and its derivative with respect to the target's log-probability."""

    loss_N: Tensor
    dloss_dlogp_N: Tensor
    active_N: Tensor
    """SED: the diversity term applies (M = 1). Policy: the clip does not stop the gradient. Elsewhere: False."""


@dataclass(frozen=True, slots=True, eq=False)
class PolicyObjective:
    """Token-level clipped policy loss, weighted by how far the sampler is from the trainer, plus a divergence.

        -w clipped(r) A + kl_weight * k3
        clipped(r) A = min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), and for A < 0 no less than dual_clip * A
        r  = p / p_old
        w  = min(p_old / p_sampler, tis_cap), without gradient; 1 without `tis_cap`
        k3 = p_ref / p - log(p_ref / p) - 1

    Separate bounds are DAPO's clip-higher (arXiv 2503.14476), the bound for A < 0 is dual-clip PPO's (arXiv 1912.09729), k3 is
    the estimate in GRPO's loss (arXiv 2402.03300). With p_old that of the sampler itself, `tis_cap` is left out: w would be 1.

    Shapes: all tensors [N], aligned with the labels that the head is given.
    """

    advantage_N: Tensor
    old_log_prob_N: Tensor | None
    """None: the weights are those of p_old, so r = 1 with the gradient of log p."""
    clip_low: float
    clip_high: float
    dual_clip: float | None = None
    sampler_log_prob_N: Tensor | None = None
    tis_cap: float | None = None
    reference_log_prob_N: Tensor | None = None
    kl_weight: float = 0.0

    def __post_init__(self) -> None:
        given = [tensor for tensor in self._tensors().values() if tensor is not None]
        if any(tensor.dim() != 1 or tensor.shape != self.advantage_N.shape for tensor in given):
            raise ValueError(
                f"expected advantage and log-probabilities of one shape [N], got {[tuple(tensor.shape) for tensor in given]}; "
                "flatten and align them"
            )
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise ValueError(f"expected 0 < clip_low < 1 and clip_high > 0, got {self.clip_low} and {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"expected dual_clip above 1, got {self.dual_clip}; leave it out for no bound")
        if (self.tis_cap is None) != (self.sampler_log_prob_N is None) or (self.tis_cap is not None and not self.tis_cap >= 1):
            raise ValueError(
                f"expected sampler_log_prob_N and tis_cap of at least 1, or neither, got a cap of {self.tis_cap} and "
                f"{'no ' if self.sampler_log_prob_N is None else ''}log-probabilities"
            )
        if (self.kl_weight > 0) != (self.reference_log_prob_N is not None):
            raise ValueError(
                f"expected reference_log_prob_N with a positive kl_weight, or neither, got a weight of {self.kl_weight} and "
                f"{'no ' if self.reference_log_prob_N is None else ''}log-probabilities"
            )

    def _tensors(self) -> dict[str, Tensor | None]:
        names = ("advantage_N", "old_log_prob_N", "sampler_log_prob_N", "reference_log_prob_N")
        return {name: getattr(self, name) for name in names}

    def at(self, rows_C: Tensor) -> PolicyObjective:
        """The same objective for the tokens with these indices."""
        chosen: dict[str, Any] = {name: None if tensor is None else tensor[rows_C] for name, tensor in self._tensors().items()}
        return replace(self, **chosen)


ScalarObjective = CEObjective | SEDObjective | DFTObjective | PolicyObjective
TokenObjective = ScalarObjective | GEMObjective


def token_loss(objective: ScalarObjective, statistics: TokenStatistics, tau: float | Tensor | None) -> TokenLoss:
    """Loss and derivative of every token under an objective of token scalars.

        CE      -log p                              d/dlog p = -1
        SED     -log p + lambda M (p - 1/2)^2                  -(1 - 2 lambda M p (p - 1/2)),   M = 1[top-k mass < tau]
        DFT     -sg(p) log p                                   -p
        policy  see `PolicyObjective`                          -w r A, or 0 where a clip holds, + kl_weight (1 - p_ref / p)

    `tau` is read by SED with its mask only. Errors: ValueError when SED with its mask lacks tau or the top-k mass.
    Sources: SED arXiv 2602.07464, DFT arXiv 2508.05629.
    """
    log_prob_N = statistics.log_prob_N
    nowhere_N = torch.zeros_like(log_prob_N, dtype=torch.bool)
    match objective:
        case CEObjective():
            return TokenLoss(-log_prob_N, torch.full_like(log_prob_N, -1.0), nowhere_N)
        case DFTObjective():
            prob_N = log_prob_N.exp()
            return TokenLoss(-prob_N * log_prob_N, -prob_N, nowhere_N)
        case SEDObjective():
            return _sed_loss(objective, log_prob_N, _sed_mask(objective, statistics, tau))
        case PolicyObjective():
            return _policy_loss(objective, log_prob_N)


def _sed_mask(objective: SEDObjective, statistics: TokenStatistics, tau: float | Tensor | None) -> Tensor:
    if not objective.mask:
        return torch.ones_like(statistics.log_prob_N, dtype=torch.bool)
    if tau is None or statistics.topk_mass_N is None:
        missing = "tau" if tau is None else "topk_mass_N"
        raise ValueError(f"expected tau and the top-k mass for SED with its mask, got no {missing}; calibrate tau first")
    return statistics.topk_mass_N < tau


def _sed_loss(objective: SEDObjective, log_prob_N: Tensor, active_N: Tensor) -> TokenLoss:
    prob_N = log_prob_N.exp()
    # Cast first: a bool times a Python number is fp32 whatever the dtype of the rest.
    weight_N = objective.weight * active_N.to(log_prob_N)
    excess_N = prob_N - 0.5
    return TokenLoss(weight_N * excess_N.square() - log_prob_N, 2 * weight_N * prob_N * excess_N - 1, active_N)


def _policy_loss(objective: PolicyObjective, log_prob_N: Tensor) -> TokenLoss:
    advantage_N = objective.advantage_N.to(log_prob_N)
    old_log_prob_N = log_prob_N if objective.old_log_prob_N is None else objective.old_log_prob_N.to(log_prob_N)
    ratio_N = (log_prob_N - old_log_prob_N).exp()
    plain_N = ratio_N * advantage_N
    clipped_N = ratio_N.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantage_N
    active_N = plain_N <= clipped_N
    gain_N = torch.minimum(plain_N, clipped_N)
    if objective.dual_clip is not None:
        bounded_N = (advantage_N < 0) & (ratio_N > objective.dual_clip)
        gain_N = torch.where(bounded_N, objective.dual_clip * advantage_N, gain_N)
        active_N = active_N & ~bounded_N
    slope_N = torch.where(active_N, plain_N, 0.0)
    if objective.sampler_log_prob_N is not None and objective.tis_cap is not None:
        weight_N = truncated_weight(old_log_prob_N, objective.sampler_log_prob_N, objective.tis_cap)
        gain_N, slope_N = weight_N * gain_N, weight_N * slope_N
    if objective.reference_log_prob_N is None:
        return TokenLoss(-gain_N, -slope_N, active_N)
    divergence_N = k3_divergence(log_prob_N, objective.reference_log_prob_N)
    pull_N = -torch.expm1(objective.reference_log_prob_N.to(log_prob_N) - log_prob_N)
    return TokenLoss(objective.kl_weight * divergence_N - gain_N, objective.kl_weight * pull_N - slope_N, active_N)


def truncated_weight(old_log_prob_N: Tensor, sampler_log_prob_N: Tensor, tis_cap: float) -> Tensor:
    """Importance weight min(p_old / p_sampler, tis_cap) of each token."""
    return (old_log_prob_N - sampler_log_prob_N.to(old_log_prob_N)).exp().clamp(max=tis_cap)


def k3_divergence(log_prob_N: Tensor, reference_log_prob_N: Tensor) -> Tensor:
    """p_ref / p - log(p_ref / p) - 1 of each token: never negative, and where p draws the tokens its mean is KL(p || p_ref)."""
    difference_N = reference_log_prob_N.to(log_prob_N) - log_prob_N
    return torch.expm1(difference_N) - difference_N


def gem_rows(objective: GEMObjective, log_probs_NV: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """GEM's loss [N] and its gradient with respect to the logits [N, V].

        loss = -sum_j q_j w_j (log p_y - log p_j),   dL/dz = q w - (sum_j q_j w_j) onehot(y)
        q = softmax(z / beta),   w = 1 (linear) or sigmoid((z_j - z_y) / 100) (logsigmoid); neither carries a gradient

    `log_probs_NV` may stand for z, since q and w do not change when a row is shifted. Source: arXiv 2408.16673 and,
    for the factor 1/100, its authors' code.
    """
    target_N1 = labels_N[:, None]
    log_prob_N1 = log_probs_NV.gather(1, target_N1)
    pull_NV = (log_probs_NV / objective.beta).softmax(dim=1)
    if objective.h == "logsigmoid":
        pull_NV *= (log_probs_NV - log_prob_N1).mul_(0.01).sigmoid_()
    total_N1 = pull_NV.sum(dim=1, keepdim=True)
    loss_N = torch.einsum("nv,nv->n", pull_NV, log_probs_NV) - (total_N1 * log_prob_N1)[:, 0]
    return loss_N, pull_NV.scatter_add_(1, target_N1, -total_N1)
