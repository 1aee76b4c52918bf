"""The row kernel for CPUs: PyTorch's compiler turns each visit of the logits into loops without temporaries of their size.

Compiling takes some seconds once a process and dtype (less from the compiler's cache on disk), so that it is for large
vocabularies; `row_kernel` is None where no compiler works.

Legend: C tokens of one chunk, V vocabulary, K largest entries of a row.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from sedsft.kernels.contract import HeadShape, RowKernel, RowScan
from sedsft.objectives import TokenStatistics

_log = logging.getLogger(__name__)

SMALLEST_VOCABULARY = 8192
"""From which on compiling pays."""

_SLICE_ROWS = 32
"""Rows whose fp32 gradient stays in the processor's cache on its way into a bf16 product: the compiler's own stores of less
than a full vector of bf16 take longer than all arithmetic."""


@functools.cache
def row_kernel(dtype: torch.dtype) -> RowKernel | None:
    """The kernel for bf16 or fp32 logits once it is known to work here; None, after one warning, where it does not."""
    kernel = _CompiledRows()
    try:
        # As wide as what it is for, since the compiler takes another way for narrow rows.
        product_CV = torch.zeros(3, SMALLEST_VOCABULARY, dtype=dtype)
        labels_C, shape = torch.zeros(3, dtype=torch.int64), HeadShape(1.0, None)
        scan = kernel.scan_rows(product_CV, labels_C, 2, shape)
        kernel.write_gradient(product_CV, labels_C, torch.zeros(3), scan, shape)
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        _log.warning("expected a C++ compiler for the head's CPU kernel, got: %s; going on with slower eager code", reason)
        return None
    return kernel


class _CompiledRows:
    """See `RowKernel`."""

    def __init__(self) -> None:
        # One thread compiles few small functions; a pool of processes would outlive its use.
        options: dict[str, Any] = {"compile_threads": 1}
        self._scan = torch.compile(_scan, dynamic=True, options=options)
        self._pull = torch.compile(_pull, dynamic=True, options=options)

    def scan_rows(self, product_CV: Tensor, labels_C: Tensor, top_k: int | None, shape: HeadShape) -> RowScan:
        scale, cap = _scalars(shape)
        # A single row would be compiled anew: the compiler treats sizes 0 and 1 as constants.
        scan = _scan if len(product_CV) == 1 else self._scan
        max_C, first_C, total_C, weighted_C, second_C = scan(product_CV.detach(), scale, cap)
        log_total_C = total_C.log()
        target_C = _score(product_CV.gather(1, labels_C[:, None])[:, 0], scale, cap) - max_C
        mass_C = None if top_k is None else _mass(product_CV, top_k, scale, cap, max_C, second_C).div_(total_C).clamp_(max=1)
        statistics = TokenStatistics(
            log_prob_N=target_C - log_total_C,
            topk_mass_N=mass_C,
            entropy_N=(log_total_C - weighted_C / total_C).clamp_(min=0),
            argmax_N=first_C.long(),
        )
        return RowScan(statistics, max_C, total_C)

    def write_gradient(self, product_CV: Tensor, labels_C: Tensor, dlogp_C: Tensor, scan: RowScan, shape: HeadShape) -> None:
        scale, cap = _scalars(shape)
        at_target_C = product_CV.gather(1, labels_C[:, None])[:, 0]
        factor_C = -dlogp_C / scan.total_C * scale
        for start in range(0, len(labels_C), _SLICE_ROWS):
            part = slice(start, start + _SLICE_ROWS)
            # Detached, since the compiler would tell a view of some rows from one of all.
            rows = (product_CV[part].detach(), factor_C[part].detach(), scan.max_C[part].detach())
            pull = _pull if len(rows[0]) == 1 else self._pull
            product_CV[part].copy_(pull(*rows, scale, cap))
        push_C = dlogp_C * scale * -torch.expm1(scan.statistics.log_prob_N) * _slope(at_target_C, cap)
        # Not scatter_, which on CPUs goes through a wider copy of all of a bf16 tensor.
        product_CV[torch.arange(len(labels_C)), labels_C] = push_C.to(product_CV.dtype)


def _scalars(shape: HeadShape) -> tuple[Tensor, Tensor | None]:
    """As tensors: the compiler would compile anew for each value of a number."""
    return torch.tensor(shape.logit_scale), None if shape.softcap is None else torch.tensor(shape.softcap)


def _score(product: Tensor, scale: Tensor, cap: Tensor | None) -> Tensor:
    product = product.float()
    return (product if cap is None else (product / cap).tanh() * cap) * scale


def _slope(product: Tensor, cap: Tensor | None) -> Tensor | float:
    """Derivative of the soft cap."""
    return 1.0 if cap is None else 1 - (product.float() / cap).tanh().square()


def _scan(product_CV: Tensor, scale: Tensor, cap: Tensor | None) -> tuple[Tensor, ...]:
    """Maximum m and the first place of it, sum exp(z - m), sum exp(z - m) (z - m), and runner-up - m of each row."""
    z_CV = _score(product_CV, scale, cap)
    max_C = z_CV.amax(dim=1)
    centred_CV = z_CV - max_C[:, None]
    exp_CV = centred_CV.exp()
    # A product with a logit of minus infinity would be NaN; a NaN itself stays one through the sum of the exponentials.
    weighted_C = torch.where(exp_CV > 0, exp_CV * centred_CV, 0.0).sum(dim=1)
    below_C = torch.where(centred_CV < 0, centred_CV, float("-inf")).amax(dim=1)
    peaks_C = torch.where(centred_CV == 0, 1.0, 0.0).sum(dim=1)
    # Places as fp32, which counts up to 2^24; the compiler's own arg-max takes as long as all else.
    places_V = torch.arange(product_CV.shape[1], dtype=torch.float32)
    # A row of NaN has no place; its last one keeps the index valid.
    first_C = torch.where(centred_CV == 0, places_V[None], float(2**24)).amin(dim=1).clamp(max=product_CV.shape[1] - 1)
    return max_C, first_C, exp_CV.sum(dim=1), weighted_C, torch.where(peaks_C > 1, 0.0, below_C)


def _mass(product_CV: Tensor, top_k: int, scale: Tensor, cap: Tensor | None, max_C: Tensor, second_C: Tensor) -> Tensor:
    """Sum of exp(z - m) over the k largest; up to 2 from the running pair."""
    if top_k > 2:
        top_CK = _score(product_CV.topk(top_k, dim=1).values, scale, cap)
        return (top_CK - max_C[:, None]).exp().sum(dim=1)
    return torch.ones_like(second_C) if top_k == 1 else 1 + second_C.exp()


def _pull(product_CV: Tensor, factor_C: Tensor, max_C: Tensor, scale: Tensor, cap: Tensor | None) -> Tensor:
    """factor * exp(z - m) * dcap: the gradient of every entry but the target's."""
    exp_CV = (_score(product_CV, scale, cap) - max_C[:, None]).exp()
    return exp_CV * factor_C[:, None] * _slope(product_CV, cap)
