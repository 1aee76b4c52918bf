"""One pass of the linear head over the vocabulary, chunk by chunk: hidden states in, token statistics out.

Legend: N tokens, C tokens of one chunk, H hidden width, V vocabulary, K largest entries of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sedsft.objectives import TokenStatistics

IGNORED_LABEL = -100
"""Tokens with this label cost nothing: no matrix product, no loss, zeros in the outputs."""

_CHUNK_BYTES = 2**28
"""Largest size of a chunk's vocabulary-wide buffers when the caller does not fix the number of tokens. A soft cap and
GEM add temporaries of the size of one or two of them."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """z = logit_scale * cap(h W^T + b), with cap(x) = softcap * tanh(x / softcap) or the identity."""

    weight_VH: Tensor
    bias_V: Tensor | None
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """One chunk after its pass over the vocabulary. The three wide tensors are buffers that the next chunk reuses."""

    rows_C: Tensor
    labels_C: Tensor
    hidden_CH: Tensor
    statistics: TokenStatistics
    centred_CV: Tensor
    """z minus the row's maximum."""
    exp_CV: Tensor
    """exp of the above."""
    total_C: Tensor
    """Row sums of exp_CV."""
    slope_CV: Tensor | None
    """Derivative of the soft cap; None without one."""
    input_dtype_CV: Tensor
    """Space for the gradient of the logits in the dtype of the matrix products."""


def statistics_dtype(hidden_NH: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32


def scan_chunks(
    hidden_NH: Tensor, head: LinearHead, labels_N: Tensor, top_k: int | None, chunk_tokens: int | None
) -> Iterator[Chunk]:
    """Runs the tokens that carry a label through the head, chunk by chunk."""
    vocab = head.weight_VH.shape[0]
    kept_N = (labels_N != IGNORED_LABEL).nonzero()[:, 0]
    if not kept_N.numel():
        return
    low, high = (int(bound) for bound in labels_N[kept_N].aminmax())
    if low < 0 or high >= vocab:
        raise ValueError(
            f"expected labels in 0..{vocab - 1} or {IGNORED_LABEL}, got {low}..{high}; check the tokenizer against the model"
        )
    dtype = statistics_dtype(hidden_NH)
    same_dtype = dtype == hidden_NH.dtype
    row_bytes = vocab * (2 * dtype.itemsize + (0 if same_dtype else hidden_NH.element_size()))
    size = min(chunk_tokens or max(1, _CHUNK_BYTES // row_bytes), kept_N.numel())
    # Written again for every chunk: fresh memory of this size costs more page faults than the arithmetic costs time.
    product_CV = hidden_NH.new_empty(size, vocab)
    scores_CV = product_CV if same_dtype else hidden_NH.new_empty(size, vocab, dtype=dtype)
    exp_CV = torch.empty_like(scores_CV)
    for start in range(0, kept_N.numel(), size):
        rows_C = kept_N[start : start + size]
        count = rows_C.numel()
        chunk_hidden_CH, labels_C = hidden_NH[rows_C], labels_N[rows_C]
        slope_CV = _scores(chunk_hidden_CH, head, product_CV[:count], scores_CV[:count])
        statistics, total_C = _scan_rows(scores_CV[:count], labels_C, top_k, exp_CV[:count])
        wide = (scores_CV[:count], exp_CV[:count], total_C, slope_CV, product_CV[:count])
        yield Chunk(rows_C, labels_C, chunk_hidden_CH, statistics, *wide)


def _scores(hidden_CH: Tensor, head: LinearHead, product_CV: Tensor, scores_CV: Tensor) -> Tensor | None:
    """Writes z to `scores_CV`, which may be the same memory as `product_CV`; returns the slope of the soft cap."""
    if head.bias_V is None:
        torch.mm(hidden_CH, head.weight_VH.T, out=product_CV)
    else:
        torch.addmm(head.bias_V, hidden_CH, head.weight_VH.T, out=product_CV)
    if scores_CV.dtype != product_CV.dtype:
        scores_CV.copy_(product_CV)
    slope_CV = None
    if head.softcap is not None:
        scores_CV.div_(head.softcap).tanh_()
        slope_CV = 1 - scores_CV.square()
        scores_CV.mul_(head.softcap)
    if head.logit_scale != 1:
        scores_CV.mul_(head.logit_scale)
    return slope_CV


def _scan_rows(scores_CV: Tensor, labels_C: Tensor, top_k: int | None, exp_CV: Tensor) -> tuple[TokenStatistics, Tensor]:
    """Statistics and sums of exponentials of rows of logits; subtracts the row maximum from `scores_CV` in place.

    With m the maximum, s = sum exp(z - m):  log p = z_y - m - log s,  entropy = log s - sum exp(z - m) (z - m) / s.
    Everything is taken from shifted logits: differences of large logits would drown in the rounding of m + log s.
    """
    top_CK, index_CK = scores_CV.topk(top_k or 1, dim=1)
    scores_CV.sub_(top_CK[:, :1])
    torch.exp(scores_CV, out=exp_CV)
    total_C = exp_CV.sum(dim=1)
    log_total_C = total_C.log()
    mass_C = None
    if top_k is not None:
        mass_C = ((top_CK - top_CK[:, :1]).exp().sum(dim=1) / total_C).clamp_(max=1)
    statistics = TokenStatistics(
        log_prob_N=scores_CV.gather(1, labels_C[:, None])[:, 0] - log_total_C,
        topk_mass_N=mass_C,
        entropy_N=(log_total_C - torch.einsum("cv,cv->c", exp_CV, scores_CV) / total_C).clamp_(min=0),
        argmax_N=index_CK[:, 0],
    )
    return statistics, total_C
