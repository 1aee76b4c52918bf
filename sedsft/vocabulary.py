"""One pass of the linear head over the vocabulary, chunk by chunk: hidden states in, token statistics out.

A fused chunk holds the product h W^T + b alone and leaves its rows to a row kernel: Triton's on CUDA, compiled loops on
CPUs. A wide chunk holds the shifted logits and their exponentials too; GEM needs it, and it serves wherever no kernel does.

Legend: N tokens, C tokens of one chunk, H hidden width, V vocabulary, K largest entries of a row.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sedsft.kernels import compiled
from sedsft.kernels.contract import HeadShape, RowKernel, RowScan
from sedsft.objectives import TokenStatistics

IGNORED_LABEL = -100
"""Tokens with this label cost nothing: no matrix product, no loss, zeros in the outputs."""

_CHUNK_BYTES = 60 * 2**20
_CUDA_CHUNK_BYTES = 2**28
"""Largest size of a chunk's vocabulary-wide buffers when the caller does not fix the number of tokens. A soft cap and GEM add
temporaries of the size of one or two of them."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """z = logit_scale * cap(h W^T + b); see `HeadShape`."""

    weight_VH: Tensor
    bias_V: Tensor | None
    shape: HeadShape


@dataclass(frozen=True, slots=True, eq=False)
class Chunk(ABC):
    """One chunk after its pass over the vocabulary. Its wide tensors are buffers that the next chunk reuses."""

    rows_C: Tensor
    labels_C: Tensor
    hidden_CH: Tensor
    statistics: TokenStatistics
    shape: HeadShape
    product_CV: Tensor
    """h W^T + b in a fused chunk; in a wide one, space in the dtype of the matrix products."""

    @abstractmethod
    def dproduct_CV(self, dlogp_C: Tensor) -> Tensor:
        """Gradient over h W^T + b, in its dtype, given dL/dlog p of each token. Uses the chunk up."""


@dataclass(frozen=True, slots=True, eq=False)
class FusedChunk(Chunk):
    """Rows that a kernel visits."""

    kernel: RowKernel
    scan: RowScan

    def dproduct_CV(self, dlogp_C: Tensor) -> Tensor:
        self.kernel.write_gradient(self.product_CV, self.labels_C, dlogp_C, self.scan, self.shape)
        return self.product_CV


@dataclass(frozen=True, slots=True, eq=False)
class WideChunk(Chunk):
    """Rows that lie open, in fp32 (fp64 for fp64 inputs)."""

    centred_CV: Tensor
    """z minus the row's maximum."""
    exp_CV: Tensor
    """exp of the above."""
    total_C: Tensor
    """Row sums of exp_CV."""
    slope_CV: Tensor | None
    """Derivative of the soft cap; None without one."""

    def log_probs_CV(self) -> Tensor:
        """Log-softmax of z, written over the shifted logits."""
        return self.centred_CV.sub_(self.total_C.log()[:, None])

    def dproduct_CV(self, dlogp_C: Tensor) -> Tensor:
        self.exp_CV.mul_((-dlogp_C / self.total_C)[:, None])
        return self.of_dlogits_CV(self.exp_CV.scatter_add_(1, self.labels_C[:, None], dlogp_C[:, None]))

    def of_dlogits_CV(self, dlogits_CV: Tensor) -> Tensor:
        """Gradient over h W^T + b, in its dtype, given the one over z, which is overwritten."""
        if self.shape.logit_scale != 1:
            dlogits_CV.mul_(self.shape.logit_scale)
        if self.slope_CV is not None:
            dlogits_CV.mul_(self.slope_CV)
        return dlogits_CV if dlogits_CV.dtype == self.product_CV.dtype else self.product_CV.copy_(dlogits_CV)


def statistics_dtype(hidden_NH: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32


def row_kernel(hidden_NH: Tensor, vocab: int) -> RowKernel | None:
    """The kernel for the device of these hidden states and a vocabulary; None where wide chunks serve.

    Nothing but device, shape and dtype decides, so that equal calls take equal paths in every process.
    """
    if hidden_NH.device.type == "cuda":
        # Triton comes with CUDA builds of PyTorch only.
        kernel: RowKernel = importlib.import_module("sedsft.kernels.rows")
        return kernel
    if vocab < compiled.SMALLEST_VOCABULARY or hidden_NH.dtype == torch.float64:
        return None
    return compiled.row_kernel(hidden_NH.dtype)


def chunk_rows(hidden_NH: Tensor, vocab: int) -> int:
    """How many tokens make a fused chunk when the caller does not say."""
    return _rows_within_budget(hidden_NH, vocab * hidden_NH.element_size())


def _rows_within_budget(hidden_NH: Tensor, row_bytes: int) -> int:
    budget = _CUDA_CHUNK_BYTES if hidden_NH.device.type == "cuda" else _CHUNK_BYTES
    return max(1, budget // row_bytes)


def scan_chunks(
    hidden_NH: Tensor, head: LinearHead, labels_N: Tensor, top_k: int | None, chunk_tokens: int | None
) -> Iterator[Chunk]:
    """Runs the tokens that carry a label through the head, chunk by chunk."""
    kept_N = _kept_tokens(head, labels_N)
    vocab = head.weight_VH.shape[0]
    kernel = row_kernel(hidden_NH, vocab)
    if kernel is None:
        yield from scan_wide_chunks(hidden_NH, head, labels_N, top_k, chunk_tokens)
        return
    size = min(chunk_tokens or chunk_rows(hidden_NH, vocab), kept_N.numel())
    buffer_CV = hidden_NH.new_empty(size, vocab)
    for start in range(0, kept_N.numel(), size or 1):
        rows_C = kept_N[start : start + size]
        hidden_CH, labels_C, product_CV = hidden_NH[rows_C], labels_N[rows_C], buffer_CV[: rows_C.numel()]
        _multiply(hidden_CH, head, product_CV)
        scan = kernel.scan_rows(product_CV, labels_C, top_k, head.shape)
        yield FusedChunk(rows_C, labels_C, hidden_CH, scan.statistics, head.shape, product_CV, kernel, scan)


def scan_wide_chunks(
    hidden_NH: Tensor, head: LinearHead, labels_N: Tensor, top_k: int | None, chunk_tokens: int | None
) -> Iterator[WideChunk]:
    """As `scan_chunks`, with chunks that lie open."""
    kept_N = _kept_tokens(head, labels_N)
    if not kept_N.numel():
        return
    vocab = head.weight_VH.shape[0]
    dtype = statistics_dtype(hidden_NH)
    same_dtype = dtype == hidden_NH.dtype
    row_bytes = vocab * (2 * dtype.itemsize + (0 if same_dtype else hidden_NH.element_size()))
    size = min(chunk_tokens or _rows_within_budget(hidden_NH, row_bytes), kept_N.numel())
    # Written again for every chunk: fresh memory of this size costs more page faults than the arithmetic costs time.
    product_CV = hidden_NH.new_empty(size, vocab)
    scores_CV = product_CV if same_dtype else hidden_NH.new_empty(size, vocab, dtype=dtype)
    exp_CV = torch.empty_like(scores_CV)
    for start in range(0, kept_N.numel(), size):
        rows_C = kept_N[start : start + size]
        count = rows_C.numel()
        hidden_CH, labels_C = hidden_NH[rows_C], labels_N[rows_C]
        _multiply(hidden_CH, head, product_CV[:count])
        slope_CV = _scores(head.shape, product_CV[:count], scores_CV[:count])
        statistics, total_C = _scan_rows(scores_CV[:count], labels_C, top_k, exp_CV[:count])
        wide = (scores_CV[:count], exp_CV[:count], total_C, slope_CV)
        yield WideChunk(rows_C, labels_C, hidden_CH, statistics, head.shape, product_CV[:count], *wide)


def _kept_tokens(head: LinearHead, labels_N: Tensor) -> Tensor:
    """Indices of the tokens that carry a label. Errors: ValueError for a label outside the vocabulary."""
    vocab = head.weight_VH.shape[0]
    kept_N = (labels_N != IGNORED_LABEL).nonzero()[:, 0]
    if kept_N.numel():
        low, high = (int(bound) for bound in labels_N[kept_N].aminmax())
        if low < 0 or high >= vocab:
            raise ValueError(
                f"expected labels in 0..{vocab - 1} or {IGNORED_LABEL}, got {low}..{high}; "
                "check the tokenizer against the model"
            )
    return kept_N


def _multiply(hidden_CH: Tensor, head: LinearHead, product_CV: Tensor) -> None:
    if head.bias_V is None:
        torch.mm(hidden_CH, head.weight_VH.T, out=product_CV)
    else:
        torch.addmm(head.bias_V, hidden_CH, head.weight_VH.T, out=product_CV)


def _scores(shape: HeadShape, product_CV: Tensor, scores_CV: Tensor) -> Tensor | None:
    """Writes z to `scores_CV`, which may be the same memory as `product_CV`; returns the slope of the soft cap."""
    if scores_CV.dtype != product_CV.dtype:
        scores_CV.copy_(product_CV)
    slope_CV = None
    if shape.softcap is not None:
        scores_CV.div_(shape.softcap).tanh_()
        slope_CV = 1 - scores_CV.square()
        scores_CV.mul_(shape.softcap)
    if shape.logit_scale != 1:
        scores_CV.mul_(shape.logit_scale)
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
