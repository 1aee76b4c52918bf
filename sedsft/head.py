"""The linear head and the loss behind it in one pass over the tokens, chunk by chunk.

Logits of all tokens never exist at once: a chunk's logits become its statistics, its losses and, in the same pass, its
share of the gradients of hidden states and head weight. Three matrix products a chunk, as many as plain training needs.

Legend: N tokens, C tokens of one chunk, H hidden width, V vocabulary, K largest entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from sedsft.config import GEMObjective, SEDObjective
from sedsft.kernels.contract import HeadShape
from sedsft.objectives import PolicyObjective, TokenObjective, TokenStatistics, gem_rows, token_loss
from sedsft.vocabulary import IGNORED_LABEL, Chunk, LinearHead, scan_chunks, scan_wide_chunks, statistics_dtype

__all__ = ["IGNORED_LABEL", "HeadOutput", "linear_objective_loss", "token_statistics"]


_BLOCK_ROWS = 8192
"""Rows of the weight whose gradient is taken in bf16 at once before it is added in fp32."""


@dataclass(frozen=True, slots=True, eq=False)
class HeadOutput(TokenStatistics):
    """The loss and, per token and without gradient, what it is made of; ignored tokens hold zeros."""

    loss: Tensor
    """Scalar, differentiable in hidden states, weight and bias."""
    loss_N: Tensor
    """Loss of each token, not divided by the denominator."""
    active_N: Tensor
    """See `TokenLoss.active_N`."""


@dataclass(frozen=True, slots=True, eq=False)
class _LossPlan:
    objective: TokenObjective
    tau: float | Tensor | None
    denominator: float
    top_k: int | None
    chunk_tokens: int | None


def linear_objective_loss(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    objective: TokenObjective,
    *,
    tau: float | Tensor | None = None,
    denominator: float,
    chunk_tokens: int | None = None,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> HeadOutput:
    """Sum of token losses / denominator behind a linear head, with its gradient formed in the forward pass.

        z = logit_scale * cap(h W^T + b),   loss = sum over tokens with a label of L(z, y) / denominator

    `denominator` is the number of response tokens of the whole optimizer step, over all ranks and micro-batches: then
    gradients add up to the same sum however the step is split. `logit_scale` is 1 / temperature for policy losses.
    `tau` replaces `objective.tau` of SED. `chunk_tokens` bounds memory and does not change the result.

    Dtypes: bf16, fp32 or fp64 for hidden states, weight and bias alike. Statistics, losses and the sum of the weight's
    gradient over chunks are fp32 (fp64 for fp64 inputs). Without a gradient to form, only the first product is done.
    The gradient of the loss cannot itself be differentiated, and backward runs once.

    Errors: ValueError for shapes, dtypes, labels, tau, top_k or a denominator that do not fit.
    """
    head = LinearHead(weight_VH, bias_V, HeadShape(logit_scale, softcap))
    tau = _resolved_tau(objective, tau)
    top_k = objective.top_k if isinstance(objective, SEDObjective) and objective.mask else None
    _check_inputs(hidden_NH, head, labels_N, top_k, chunk_tokens)
    if not denominator > 0:
        raise ValueError(f"expected a positive denominator, got {denominator}; pass the response tokens of the whole step")
    if isinstance(objective, PolicyObjective) and objective.advantage_N.shape != labels_N.shape:
        raise ValueError(
            f"expected a policy objective of {labels_N.numel()} tokens as the labels, got {objective.advantage_N.numel()}; "
            "align its tensors with labels_N, ignored tokens included"
        )
    plan = _LossPlan(objective, tau, float(denominator), top_k, chunk_tokens)
    differentiable = [tensor for tensor in (hidden_NH, weight_VH, bias_V) if tensor is not None and tensor.requires_grad]
    if torch.is_grad_enabled() and differentiable:
        output = _LinearObjectiveLoss.apply(hidden_NH, weight_VH, bias_V, labels_N, head, plan)  # type: ignore[no-untyped-call]
        return HeadOutput(*output)
    with torch.no_grad():
        return _forward(hidden_NH, head, labels_N, plan, None)


@torch.no_grad()
def token_statistics(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    top_k: int | None,
    chunk_tokens: int | None = None,
    bias_V: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> TokenStatistics:
    """Log-probability, top-k mass (None when `top_k` is), entropy and arg-max of each token, without gradient.

    Arguments, dtypes, ignored labels and errors as in `linear_objective_loss`.
    """
    head = LinearHead(weight_VH, bias_V, HeadShape(logit_scale, softcap))
    _check_inputs(hidden_NH, head, labels_N, top_k, chunk_tokens)
    statistics = _empty_statistics(hidden_NH, labels_N, top_k)
    for chunk in scan_chunks(hidden_NH, head, labels_N, top_k, chunk_tokens):
        _write_statistics(statistics, chunk)
    return statistics


class _LinearObjectiveLoss(torch.autograd.Function):
    """Autograd's view of `_forward`: the gradient is at hand before backward asks for it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_N: Tensor,
        head: LinearHead,
        plan: _LossPlan,
    ) -> tuple[Tensor | None, ...]:
        gradients = _Gradients(hidden_NH, head, ctx.needs_input_grad[:3])
        output = _forward(hidden_NH, head, labels_N, plan, gradients)
        ctx.save_for_backward(gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
        ctx.input_dtype = hidden_NH.dtype
        per_token = (output.log_prob_N, output.topk_mass_N, output.entropy_N, output.argmax_N)
        ctx.mark_non_differentiable(*(tensor for tensor in (*per_token, output.loss_N, output.active_N) if tensor is not None))
        return (*per_token, output.loss, output.loss_N, output.active_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, _, dloss, _, _ = upstream
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        dtype: torch.dtype = ctx.input_dtype  # type: ignore[attr-defined]
        # In place: another tensor of the weight's size would be the largest of all. Autograd refuses a second backward then.
        scaled = [None if gradient is None else gradient.mul_(dloss).to(dtype) for gradient in saved]
        return (*scaled, None, None, None)


class _Gradients:
    """Sums of the gradients that autograd asks for; None where it does not."""

    def __init__(self, hidden_NH: Tensor, head: LinearHead, needed: tuple[bool, bool, bool]) -> None:
        sum_dtype = statistics_dtype(hidden_NH)
        self.hidden_NH = torch.zeros_like(hidden_NH) if needed[0] else None
        self.weight_VH = torch.zeros_like(head.weight_VH, dtype=sum_dtype) if needed[1] else None
        self.bias_V = torch.zeros_like(head.bias_V, dtype=sum_dtype) if needed[2] and head.bias_V is not None else None
        self._head = head

    def add(self, chunk: Chunk, dproduct_CV: Tensor) -> None:
        """Adds one chunk, given the gradient of the loss with respect to h W^T + b."""
        if self.bias_V is not None:
            self.bias_V.add_(dproduct_CV.sum(dim=0, dtype=self.bias_V.dtype))
        if self.hidden_NH is not None:
            self.hidden_NH.index_copy_(0, chunk.rows_C, dproduct_CV @ self._head.weight_VH)
        if self.weight_VH is None:
            return
        if self.weight_VH.dtype == dproduct_CV.dtype:
            self.weight_VH.addmm_(dproduct_CV.T, chunk.hidden_CH)
            return
        for block in range(0, len(self.weight_VH), _BLOCK_ROWS):
            rows = slice(block, block + _BLOCK_ROWS)
            self.weight_VH[rows].add_(dproduct_CV[:, rows].T @ chunk.hidden_CH)


def _forward(
    hidden_NH: Tensor, head: LinearHead, labels_N: Tensor, plan: _LossPlan, gradients: _Gradients | None
) -> HeadOutput:
    statistics = _empty_statistics(hidden_NH, labels_N, plan.top_k)
    loss_N = torch.zeros_like(statistics.log_prob_N)
    active_N = torch.zeros_like(labels_N, dtype=torch.bool)
    if isinstance(plan.objective, GEMObjective):
        for wide in scan_wide_chunks(hidden_NH, head, labels_N, plan.top_k, plan.chunk_tokens):
            _write_statistics(statistics, wide)
            loss_N[wide.rows_C], dlogits_CV = gem_rows(plan.objective, wide.log_probs_CV(), wide.labels_C)
            if gradients is not None:
                gradients.add(wide, wide.of_dlogits_CV(dlogits_CV.div_(plan.denominator)))
    else:
        for chunk in scan_chunks(hidden_NH, head, labels_N, plan.top_k, plan.chunk_tokens):
            _write_statistics(statistics, chunk)
            objective = plan.objective.at(chunk.rows_C) if isinstance(plan.objective, PolicyObjective) else plan.objective
            tokens = token_loss(objective, chunk.statistics, plan.tau)
            loss_N[chunk.rows_C] = tokens.loss_N
            active_N[chunk.rows_C] = tokens.active_N
            if gradients is not None:
                gradients.add(chunk, chunk.dproduct_CV(tokens.dloss_dlogp_N / plan.denominator))
    return HeadOutput(
        log_prob_N=statistics.log_prob_N,
        topk_mass_N=statistics.topk_mass_N,
        entropy_N=statistics.entropy_N,
        argmax_N=statistics.argmax_N,
        loss=loss_N.sum() / plan.denominator,
        loss_N=loss_N,
        active_N=active_N,
    )


def _empty_statistics(hidden_NH: Tensor, labels_N: Tensor, top_k: int | None) -> TokenStatistics:
    zeros_N = hidden_NH.new_zeros(labels_N.shape, dtype=statistics_dtype(hidden_NH))
    mass_N = None if top_k is None else zeros_N.clone()
    return TokenStatistics(zeros_N, mass_N, zeros_N.clone(), torch.zeros_like(labels_N, dtype=torch.int64))


def _write_statistics(into: TokenStatistics, chunk: Chunk) -> None:
    into.log_prob_N[chunk.rows_C] = chunk.statistics.log_prob_N
    into.entropy_N[chunk.rows_C] = chunk.statistics.entropy_N
    into.argmax_N[chunk.rows_C] = chunk.statistics.argmax_N
    if into.topk_mass_N is not None and chunk.statistics.topk_mass_N is not None:
        into.topk_mass_N[chunk.rows_C] = chunk.statistics.topk_mass_N


def _resolved_tau(objective: TokenObjective, tau: float | Tensor | None) -> float | Tensor | None:
    """The threshold that SED's mask uses; refuses one that would do nothing."""
    if not (isinstance(objective, SEDObjective) and objective.mask):
        if tau is not None:
            raise ValueError("expected tau with SED and its mask only, got one for another objective; leave it out")
        return None
    tau = objective.tau if tau is None else tau
    if tau is None:
        raise ValueError("expected tau for SED with its mask, got None; calibrate it (sedsft.exploration) or set objective.tau")
    if isinstance(tau, Tensor) and tau.dim():
        raise ValueError(f"expected tau as a number or a 0-dim tensor, got shape {tuple(tau.shape)}")
    return tau


def _check_inputs(hidden_NH: Tensor, head: LinearHead, labels_N: Tensor, top_k: int | None, chunk_tokens: int | None) -> None:
    weight_VH, bias_V = head.weight_VH, head.bias_V
    shapes = f"hidden {tuple(hidden_NH.shape)}, weight {tuple(weight_VH.shape)}, labels {tuple(labels_N.shape)}"
    if (hidden_NH.dim(), weight_VH.dim(), labels_N.dim()) != (2, 2, 1) or (
        hidden_NH.shape != (labels_N.shape[0], weight_VH.shape[1])
    ):
        raise ValueError(f"expected hidden [N, H], weight [V, H] and labels [N], got {shapes}; flatten and align them")
    if bias_V is not None and bias_V.shape != weight_VH.shape[:1]:
        raise ValueError(f"expected a bias of shape [{weight_VH.shape[0]}], got {tuple(bias_V.shape)}")
    dtypes = {tensor.dtype for tensor in (hidden_NH, weight_VH, bias_V) if tensor is not None}
    if len(dtypes) != 1 or not dtypes <= {torch.bfloat16, torch.float32, torch.float64}:
        raise ValueError(f"expected one dtype of bf16, fp32, fp64 for hidden, weight and bias, got {dtypes}; cast them alike")
    if labels_N.dtype != torch.int64:
        raise ValueError(f"expected int64 labels, got {labels_N.dtype}; cast them")
    if top_k is not None and not 1 <= top_k <= weight_VH.shape[0]:
        raise ValueError(f"expected top_k in 1..{weight_VH.shape[0]} (the vocabulary), got {top_k}; lower it")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"expected chunk_tokens of at least 1, got {chunk_tokens}; leave it out to choose by memory")
    shape = head.shape
    if shape.softcap is not None and not shape.softcap > 0:
        raise ValueError(f"expected a positive softcap, got {shape.softcap}; leave it out for none")
    if not shape.logit_scale > 0:
        raise ValueError(f"expected a positive logit_scale, got {shape.logit_scale}; leave it out for none")
