"""The maps from token statistics to losses, against hand-computed numbers and autograd of the papers' formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sedsft.config import CEObjective, DFTObjective, GEMObjective, SEDObjective
from sedsft.objectives import (
    PolicyObjective,
    ScalarObjective,
    TokenStatistics,
    gem_rows,
    k3_divergence,
    token_loss,
    truncated_weight,
)
from sedsft.reference import reference_losses


def statistics(probs: list[float], masses: list[float] | None = None) -> TokenStatistics:
    log_prob_N = torch.tensor(probs, dtype=torch.float64).log()
    mass_N = None if masses is None else torch.tensor(masses, dtype=torch.float64)
    return TokenStatistics(log_prob_N, mass_N, torch.zeros_like(log_prob_N), torch.zeros(len(probs), dtype=torch.int64))


def close(actual: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_ce_by_hand() -> None:
    result = token_loss(CEObjective(), statistics([0.5, 0.25]), None)
    close(result.loss_N, [math.log(2), math.log(4)])
    close(result.dloss_dlogp_N, [-1, -1])
    assert not result.active_N.any()


def test_sed_by_hand() -> None:
    # p = 1/4, M = 1: the term is 1/16 and the factor 1 - 2 * 1/4 * (-1/4) = 9/8; mass at tau is not below it.
    result = token_loss(SEDObjective(), statistics([0.25, 0.25, 0.25], [0.5, 0.8, 0.9]), 0.8)
    close(result.loss_N, [math.log(4) + 1 / 16, math.log(4), math.log(4)])
    close(result.dloss_dlogp_N, [-9 / 8, -1, -1])
    assert result.active_N.tolist() == [True, False, False]


def test_sed_without_mask_and_with_weight_by_hand() -> None:
    result = token_loss(SEDObjective(weight=2, mask=False), statistics([1.0, 0.75]), None)
    # p = 1: 2 * 1/4 and 1 - 4 * 1/2 = -1. p = 3/4: 2 * 1/16 and 1 - 4 * 3/4 * 1/4 = 1/4.
    close(result.loss_N, [1 / 2, -math.log(0.75) + 1 / 8])
    close(result.dloss_dlogp_N, [1, -1 / 4])
    assert result.active_N.all()


def test_sed_factor_at_weight_one_is_one_minus_p_times_one_plus_two_p() -> None:
    probs = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    result = token_loss(SEDObjective(mask=False), statistics(probs.tolist()), None)
    torch.testing.assert_close(result.dloss_dlogp_N, -(1 - probs) * (1 + 2 * probs), rtol=0, atol=1e-12)


def test_dft_by_hand() -> None:
    result = token_loss(DFTObjective(), statistics([0.25]), None)
    close(result.loss_N, [math.log(4) / 4])
    close(result.dloss_dlogp_N, [-0.25])


def test_policy_by_hand() -> None:
    # Ratios 1, 2, 2, 1/2, 1/2 and 1.28, the edge, with advantages 1, 1, -1, 1, -1 and 1.
    old = torch.full((6,), math.log(0.25), dtype=torch.float64)
    advantage = torch.tensor([1, 1, -1, 1, -1, 1], dtype=torch.float64)
    result = token_loss(
        PolicyObjective(advantage, old, 0.2, 0.28), statistics([0.25, 0.5, 0.5, 0.125, 0.125, 0.25 * 1.27999]), None
    )
    close(result.loss_N, [-1, -1.28, 2, -0.5, 0.8, -1.27999])
    close(result.dloss_dlogp_N, [-1, 0, 2, -0.5, 0, -1.27999])
    assert result.active_N.tolist() == [True, False, True, True, False, True]


def logs(*probs: float) -> Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def test_dual_clip_by_hand() -> None:
    # Ratios 2 and 4 with advantage -1, bound 3; a positive advantage is bounded by clip_high as before.
    objective = PolicyObjective(torch.tensor([-1.0, -1, 1]).double(), logs(0.2, 0.2, 0.2), 0.2, 0.28, dual_clip=3.0)
    result = token_loss(objective, statistics([0.4, 0.8, 0.8]), None)
    close(result.loss_N, [2, 3, -1.28])
    close(result.dloss_dlogp_N, [2, 0, 0])
    assert result.active_N.tolist() == [True, False, False]


def test_truncated_importance_weights_by_hand() -> None:
    advantage = torch.tensor([1.0, -1, 1]).double()
    # At the start of an iteration: r = 1; weights 0.5 / 0.4, 0.5 / 0.125 = 4, cut to 2, and 0.5 / 0.8.
    start = PolicyObjective(advantage, None, 0.2, 0.28, sampler_log_prob_N=logs(0.4, 0.125, 0.8), tis_cap=2.0)
    result = token_loss(start, statistics([0.5, 0.5, 0.5]), None)
    close(result.loss_N, [-1.25, 2, -0.625])
    close(result.dloss_dlogp_N, [-1.25, 2, -0.625])
    # Later: p_old is 1/4, r = 2, clipped for A > 0 only; the weights 0.25 / 0.2, 0.25 / 0.1 = 2.5 and 0.25 / 0.5 are p_old's.
    later = PolicyObjective(advantage, logs(0.25, 0.25, 0.25), 0.2, 0.28, None, logs(0.2, 0.1, 0.5), 2.0)
    result = token_loss(later, statistics([0.5, 0.5, 0.25]), None)
    close(result.loss_N, [-1.25 * 1.28, 4, -0.5])
    close(result.dloss_dlogp_N, [0, 4, -0.5])
    close(truncated_weight(logs(0.25, 0.25, 0.25), logs(0.2, 0.1, 0.5), 2.0), [1.25, 2, 0.5])


def test_divergence_by_hand() -> None:
    # p_ref / p = 1/2 and 2: k3 = 1/2 + ln 2 - 1 and 2 - ln 2 - 1, derivatives 1 - 1/2 and 1 - 2.
    objective = PolicyObjective(torch.zeros(2).double(), None, 0.2, 0.28, reference_log_prob_N=logs(0.25, 0.5), kl_weight=0.1)
    result = token_loss(objective, statistics([0.5, 0.25]), None)
    close(result.loss_N, [0.1 * (math.log(2) - 0.5), 0.1 * (1 - math.log(2))])
    close(result.dloss_dlogp_N, [0.05, -0.1])
    close(k3_divergence(logs(0.5), logs(0.5)), [0])


def test_gem_by_hand() -> None:
    # Two equal logits: q = 1/2 each, loss -(1/2)(log p_y - log p_j) = 0, gradient q - onehot.
    log_probs = torch.full((1, 2), math.log(0.5), dtype=torch.float64)
    loss, gradient = gem_rows(GEMObjective(), log_probs, torch.tensor([0]))
    close(loss, [0.0])
    close(gradient[0], [-0.5, 0.5])
    # logsigmoid halves both weights: q w = 1/4 each, their sum 1/2 leaves the target.
    _, gradient = gem_rows(GEMObjective(h="logsigmoid"), log_probs, torch.tensor([0]))
    close(gradient[0], [-0.25, 0.25])
    # beta = 1 gives q = pi, so that linear GEM has the gradient of cross-entropy.
    log_probs = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    loss, gradient = gem_rows(GEMObjective(beta=1), log_probs, torch.tensor([1]))
    close(gradient[0], [0.7, -0.8, 0.1])
    close(loss, [-math.log(0.2) + 0.7 * math.log(0.7) + 0.2 * math.log(0.2) + 0.1 * math.log(0.1)])


def policies() -> list[PolicyObjective]:
    """Every variant; log-probabilities near -2.2, so that each bound holds for some tokens."""
    generator = torch.Generator().manual_seed(1)
    advantage, old, sampler, reference = (torch.randn(64, generator=generator).double() for _ in range(4))
    old, sampler, reference = old - 2.2, sampler - 2.2, reference - 2.2
    weighted: dict[str, Any] = {"sampler_log_prob_N": sampler, "tis_cap": 2.0}
    divergence: dict[str, Any] = {"reference_log_prob_N": reference, "kl_weight": 0.3}
    return [
        PolicyObjective(advantage, torch.full((64,), -2.2).double(), 0.2, 0.28),
        PolicyObjective(advantage, old, 0.2, 0.28, dual_clip=1.5),
        PolicyObjective(advantage, None, 0.2, 0.28),
        PolicyObjective(advantage, None, 0.2, 0.28, **weighted),
        PolicyObjective(advantage, old, 0.2, 0.28, **weighted),
        PolicyObjective(advantage, old, 0.2, 0.28, **divergence),
        PolicyObjective(advantage, old, 0.2, 0.28, 1.5, **weighted, **divergence),
    ]


SCALAR_OBJECTIVES = [
    CEObjective(),
    DFTObjective(),
    SEDObjective(),
    SEDObjective(weight=1.1, top_k=4),
    SEDObjective(mask=False),
    *policies(),
]


@pytest.mark.parametrize("objective", SCALAR_OBJECTIVES, ids=lambda objective: type(objective).__name__)
def test_scalar_gradient_is_autograds(objective: ScalarObjective) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(64, 11, dtype=torch.float64, generator=generator)).requires_grad_()
    labels = torch.randint(11, (64,), generator=generator)
    tau = 0.8 if isinstance(objective, SEDObjective) and objective.mask else None
    expected = reference_losses(logits, labels, objective, tau)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)

    log_probs = logits.detach().log_softmax(1)
    top_k = objective.top_k if isinstance(objective, SEDObjective) else 1
    mass = log_probs.exp().topk(top_k).values.sum(1)
    given = TokenStatistics(log_probs.gather(1, labels[:, None])[:, 0], mass, mass, labels)
    result = token_loss(objective, given, tau)
    onehot = torch.nn.functional.one_hot(labels, 11)
    torch.testing.assert_close(result.loss_N, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.dloss_dlogp_N[:, None] * (onehot - log_probs.exp()), gradient, rtol=0, atol=1e-12)


def test_tau_may_be_a_tensor() -> None:
    given = statistics([0.5, 0.5], [0.3, 0.9])
    assert token_loss(SEDObjective(), given, torch.tensor(0.5)).active_N.tolist() == [True, False]


def test_missing_tau_or_mass_is_an_error() -> None:
    with pytest.raises(ValueError, match="no tau"):
        token_loss(SEDObjective(), statistics([0.5], [0.5]), None)
    with pytest.raises(ValueError, match="no topk_mass_N"):
        token_loss(SEDObjective(), statistics([0.5]), 0.5)


def test_policy_objective_checks_its_fields() -> None:
    with pytest.raises(ValueError, match="one shape"):
        PolicyObjective(torch.zeros(2), torch.zeros(3), 0.2, 0.28)
    with pytest.raises(ValueError, match="clip_low"):
        PolicyObjective(torch.zeros(2), torch.zeros(2), 1.0, 0.28)
    with pytest.raises(ValueError, match="dual_clip above 1"):
        PolicyObjective(torch.zeros(2), None, 0.2, 0.28, dual_clip=1.0)
    with pytest.raises(ValueError, match=r"tis_cap of at least 1, or neither, got a cap of 2\.0 and no log-prob"):
        PolicyObjective(torch.zeros(2), None, 0.2, 0.28, tis_cap=2.0)
    with pytest.raises(ValueError, match="or neither, got a cap of None and log-prob"):
        PolicyObjective(torch.zeros(2), None, 0.2, 0.28, sampler_log_prob_N=torch.zeros(2))
    with pytest.raises(ValueError, match=r"positive kl_weight, or neither, got a weight of 0\.1 and no log-prob"):
        PolicyObjective(torch.zeros(2), None, 0.2, 0.28, kl_weight=0.1)
