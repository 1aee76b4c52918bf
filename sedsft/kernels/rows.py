"""Triton row kernels: a chunk of logits read once for its statistics, then its gradient written over it.

Between the two visits lies the objective, which is a function of a token's scalars; nothing as wide as the vocabulary
exists beside the chunk itself. Arithmetic is fp32, or fp64 for fp64 logits.

Legend: C tokens of one chunk, V vocabulary, K largest entries of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sedsft.kernels.contract import HeadShape, RowScan
from sedsft.objectives import TokenStatistics

_BLOCK = 4096
"""Logits that one program holds at a time."""


def scan_rows(product_CV: Tensor, labels_C: Tensor, top_k: int | None, shape: HeadShape) -> RowScan:
    """See `RowKernel.scan_rows`. Contiguous logits of at least one column."""
    count, vocab = product_CV.shape
    dtype = torch.float64 if product_CV.dtype == torch.float64 else torch.float32
    log_prob_C, entropy_C, max_C, total_C = (product_CV.new_empty(count, dtype=dtype) for _ in range(4))
    mass_C = None if top_k is None else torch.empty_like(log_prob_C)
    argmax_C = torch.empty_like(labels_C)
    if count:
        with torch.cuda.device_of(product_CV):  # type: ignore[no-untyped-call]
            _scan_kernel[(count,)](
                product_CV,
                labels_C,
                log_prob_C,
                log_prob_C if mass_C is None else mass_C,
                entropy_C,
                argmax_C,
                max_C,
                total_C,
                vocab,
                TOP_K=top_k or 0,
                LANES=triton.next_power_of_2(top_k or 1),
                SCALE=shape.logit_scale,
                SOFTCAP=shape.softcap or 0.0,
                BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
                num_warps=8,
            )
    # Clamped here and not in the kernel, where a maximum would swallow a NaN.
    mass_C = None if mass_C is None else mass_C.clamp_(max=1)
    return RowScan(TokenStatistics(log_prob_C, mass_C, entropy_C.clamp_(min=0), argmax_C), max_C, total_C)


def write_gradient(product_CV: Tensor, labels_C: Tensor, dlogp_C: Tensor, scan: RowScan, shape: HeadShape) -> None:
    """See `RowKernel.write_gradient`."""
    count, vocab = product_CV.shape
    if not count:
        return
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    with torch.cuda.device_of(product_CV):  # type: ignore[no-untyped-call]
        _gradient_kernel[(count, triton.cdiv(vocab, block))](
            product_CV,
            labels_C,
            dlogp_C,
            scan.max_C,
            scan.total_C,
            vocab,
            SCALE=shape.logit_scale,
            SOFTCAP=shape.softcap or 0.0,
            BLOCK=block,
            num_warps=8,
        )


@triton.jit
def _tanh(x):  # type: ignore[no-untyped-def]
    """Series up to x^13 near 0, where 1 - 2 / (exp(2|x|) + 1) would lose its digits."""
    square = x * x
    series = -1382 / 155925 + square * (21844 / 6081075)
    series = 1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835 + square * series))))
    size = tl.abs(x)
    far = 1 - 2 / (tl.exp(2 * size) + 1)
    return tl.where(size < 0.25, x * series, tl.where(x < 0, -far, far))


@triton.jit  # type: ignore[untyped-decorator]
def _score(product, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """z = scale * cap(product)."""
    if SOFTCAP > 0:
        product = _tanh(product / SOFTCAP) * SOFTCAP
    return product * SCALE


@triton.jit  # type: ignore[untyped-decorator]
def _merge_top(top, lane, block, column, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Takes entries of the block, largest first, in exchange for the smallest lane as long as they exceed it."""
    smallest = tl.min(top, axis=0)
    best = tl.max(block, axis=0)
    while best > smallest:
        place = tl.argmin(top, axis=0)
        top = tl.where(lane == place, best, top)
        block = tl.where(column == tl.argmax(block, axis=0), float("-inf"), block)
        smallest = tl.min(top, axis=0)
        best = tl.max(block, axis=0)
    return top


@triton.jit  # type: ignore[untyped-decorator]
def _scan_kernel(  # type: ignore[no-untyped-def]
    product_ptr,
    labels_ptr,
    log_prob_ptr,
    mass_ptr,
    entropy_ptr,
    argmax_ptr,
    max_ptr,
    total_ptr,
    vocab,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. With m the running maximum, s = sum exp(z - m) and u = sum exp(z - m) (z - m), a new maximum
    m' turns u into exp(m - m') (u + (m - m') s) and s into exp(m - m') s."""
    row = tl.program_id(0).to(tl.int64)
    kind = log_prob_ptr.dtype.element_ty
    row_ptr = product_ptr + row * vocab
    column = tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    top = tl.where(lane < TOP_K, float("-inf"), float("inf")).to(kind)
    highest = tl.full((), float("-inf"), kind)
    total = tl.full((), 0, kind)
    weighted = tl.full((), 0, kind)
    place = tl.full((), 0, tl.int64)
    for start in range(0, vocab, BLOCK):
        inside = start + column < vocab
        product = tl.load(row_ptr + start + column, mask=inside, other=0).to(kind)
        z = tl.where(inside, _score(product, SCALE, SOFTCAP), float("-inf"))
        block_max = tl.max(z, axis=0)
        place = tl.where(block_max > highest, start + tl.argmax(z, axis=0), place)
        new = tl.maximum(highest, block_max)
        shift = tl.where(highest == new, 0.0, highest - new)
        decay = tl.exp(shift)
        weighted = tl.where(highest == float("-inf"), 0.0, decay * (weighted + shift * total))
        centred = tl.where(z == float("-inf"), float("-inf"), z - new)
        exponential = tl.exp(centred)
        total = decay * total + tl.sum(exponential, axis=0)
        weighted += tl.sum(tl.where(exponential > 0, exponential * centred, 0.0), axis=0)
        highest = new
        if TOP_K > 0:
            top = _merge_top(top, lane, z, column, LANES)
    label = tl.load(labels_ptr + row)
    score = _score(tl.load(row_ptr + label).to(kind), SCALE, SOFTCAP)
    log_total = tl.log(total)
    tl.store(log_prob_ptr + row, score - highest - log_total)
    tl.store(entropy_ptr + row, log_total - weighted / total)
    tl.store(argmax_ptr + row, place)
    tl.store(max_ptr + row, highest)
    tl.store(total_ptr + row, total)
    if TOP_K > 0:
        kept = tl.where(lane < TOP_K, tl.exp(top - highest), 0.0)
        tl.store(mass_ptr + row, tl.sum(kept, axis=0) / total)


@triton.jit  # type: ignore[untyped-decorator]
def _gradient_kernel(  # type: ignore[no-untyped-def]
    product_ptr,
    labels_ptr,
    dlogp_ptr,
    max_ptr,
    total_ptr,
    vocab,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dlog p * (onehot - pi) * dz/dproduct, one block of one row a program, written where the block was read."""
    row = tl.program_id(0).to(tl.int64)
    kind = max_ptr.dtype.element_ty
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    place_ptr = product_ptr + row * vocab + column
    product = tl.load(place_ptr, mask=inside, other=0).to(kind)
    slope = tl.full((BLOCK,), SCALE, kind)
    if SOFTCAP > 0:
        capped = _tanh(product / SOFTCAP)
        slope = (1 - capped * capped) * SCALE
        product = capped * SOFTCAP
    dlogp = tl.load(dlogp_ptr + row)
    share = tl.exp(product * SCALE - tl.load(max_ptr + row)) / tl.load(total_ptr + row)
    onehot = tl.where(column == tl.load(labels_ptr + row), 1.0, 0.0)
    tl.store(place_ptr, dlogp * (onehot - share) * slope, mask=inside)
