"""The objectives written as their papers write them: the truth that faster paths are measured against.

Materialises all logits and leaves derivatives to autograd. Meant for float64 and small inputs.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sedsft.config import CEObjective, DFTObjective, GEMObjective, SEDObjective
from sedsft.objectives import PolicyObjective, TokenObjective


def reference_losses(logits_NV: Tensor, labels_N: Tensor, objective: TokenObjective, tau: float | None = None) -> Tensor:
    """Loss of each token [N], differentiable in the logits. Every label is a vocabulary index.

    Sources: SED arXiv 2602.07464, DFT arXiv 2508.05629, GEM arXiv 2408.16673; policy losses as in
    `PolicyObjective`.
    """
    log_probs_NV = logits_NV.log_softmax(dim=1)
    log_prob_N = log_probs_NV.gather(1, labels_N[:, None])[:, 0]
    prob_N = log_prob_N.exp()
    match objective:
        case CEObjective():
            return -log_prob_N
        case DFTObjective():
            return -prob_N.detach() * log_prob_N
        case SEDObjective():
            return -log_prob_N + objective.weight * _mask(log_probs_NV, objective, tau) * (prob_N - 0.5) ** 2
        case GEMObjective():
            q_NV = (logits_NV / objective.beta).softmax(dim=1).detach()
            if objective.h == "logsigmoid":
                margin_NV = logits_NV - logits_NV.gather(1, labels_N[:, None])
                q_NV = q_NV * torch.sigmoid(0.01 * margin_NV).detach()
            return -(q_NV * (log_prob_N[:, None] - log_probs_NV)).sum(dim=1)
        case PolicyObjective():
            return _policy_losses(objective, log_prob_N)


def _policy_losses(objective: PolicyObjective, log_prob_N: Tensor) -> Tensor:
    old_N = log_prob_N.detach() if objective.old_log_prob_N is None else objective.old_log_prob_N
    ratio_N, advantage_N = (log_prob_N - old_N).exp(), objective.advantage_N
    clipped_N = ratio_N.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    gain_N = torch.minimum(ratio_N * advantage_N, clipped_N * advantage_N)
    if objective.dual_clip is not None:
        gain_N = torch.where(advantage_N < 0, torch.maximum(gain_N, objective.dual_clip * advantage_N), gain_N)
    if objective.sampler_log_prob_N is not None and objective.tis_cap is not None:
        gain_N = gain_N * (old_N - objective.sampler_log_prob_N).exp().clamp(max=objective.tis_cap)
    if objective.reference_log_prob_N is None:
        return -gain_N
    distance_N = objective.reference_log_prob_N - log_prob_N
    return objective.kl_weight * (distance_N.exp() - distance_N - 1) - gain_N


def _mask(log_probs_NV: Tensor, objective: SEDObjective, tau: float | None) -> Tensor:
    if not objective.mask:
        return torch.ones_like(log_probs_NV[:, 0])
    if tau is None:
        raise ValueError("expected tau for SED with its mask, got None; calibrate it first")
    mass_N = log_probs_NV.detach().exp().topk(objective.top_k, dim=1).values.sum(dim=1)
    return (mass_N < tau).to(mass_N)
