"""What a row kernel is: two visits of a chunk of logits with the objective between them.

Legend: C tokens of one chunk, V vocabulary, K largest entries of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sedsft.objectives import TokenStatistics


@dataclass(frozen=True, slots=True)
class HeadShape:
    """z = logit_scale * cap(product), with cap(x) = softcap * tanh(x / softcap) or the identity."""

    logit_scale: float
    softcap: float | None


@dataclass(frozen=True, slots=True, eq=False)
class RowScan:
    """What the first visit finds, and what of it the second needs."""

    statistics: TokenStatistics
    max_C: Tensor
    """Largest z of a row."""
    total_C: Tensor
    """Sum of exp(z - max) of a row."""


class RowKernel(Protocol):
    """The product h W^T + b stays in its own dtype; scalars are fp32, or fp64 for fp64."""

    def scan_rows(self, product_CV: Tensor, labels_C: Tensor, top_k: int | None, shape: HeadShape) -> RowScan:
        """Statistics of each row of z; leaves the product as it is."""

    def write_gradient(self, product_CV: Tensor, labels_C: Tensor, dlogp_C: Tensor, scan: RowScan, shape: HeadShape) -> None:
        """Overwrites the product with the loss's gradient over it, given dL/dlog p of each token."""
