"""The compiled row kernel for CPUs against float64 autograd. C tokens, V vocabulary."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from sedsft import vocabulary
from sedsft.config import CEObjective, SEDObjective
from sedsft.head import IGNORED_LABEL, linear_objective_loss
from sedsft.kernels import compiled
from sedsft.kernels.contract import HeadShape, RowKernel

WIDTH = compiled.SMALLEST_VOCABULARY + 3
"""Not a multiple of any vector's width."""


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def kernel(request: pytest.FixtureRequest) -> tuple[RowKernel, torch.dtype]:
    found = compiled.row_kernel(request.param)
    if found is None:
        pytest.skip("no C++ compiler here")
    return found, request.param


def rows_of(dtype: torch.dtype, count: int) -> Tensor:
    """Ordinary rows, equal logits, one far above all, two equal peaks, and one of large logits."""
    product_CV = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count)) * 3
    for row, (place, value) in enumerate([(None, 0.5), (17, 1e4), (5, 40.0)][: count - 1], start=1):
        if place is None:
            product_CV[row] = value
        else:
            product_CV[row, place] = value
    if count > 3:
        product_CV[3, 9] = 40.0
    return product_CV.to(dtype)


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 65])
@pytest.mark.parametrize("shape", [HeadShape(1.0, None), HeadShape(0.7, 5.0)], ids=["plain", "capped"])
def test_rows_equal_float64_autograd(kernel: tuple[RowKernel, torch.dtype], count: int, shape: HeadShape) -> None:
    rows, dtype = kernel
    product_CV = rows_of(dtype, count)
    labels_C = torch.arange(count) % 7
    exact_CV = product_CV.double().requires_grad_()
    capped_CV = exact_CV if shape.softcap is None else torch.tanh(exact_CV / shape.softcap) * shape.softcap
    log_probs_CV = (capped_CV * shape.logit_scale).log_softmax(1)
    target_C = log_probs_CV.gather(1, labels_C[:, None])[:, 0]
    dlogp_C = torch.linspace(-1.5, 1, count)
    (gradient_CV,) = torch.autograd.grad((target_C * dlogp_C).sum(), exact_CV)
    probs_CV = log_probs_CV.detach().exp()
    for top_k in (None, 1, 2, 5):
        scan = rows.scan_rows(product_CV, labels_C, top_k, shape)
        found = scan.statistics
        torch.testing.assert_close(found.log_prob_N.double(), target_C.detach(), rtol=1e-5, atol=1e-5)
        entropy_C = -torch.special.xlogy(probs_CV, probs_CV).sum(1)
        torch.testing.assert_close(found.entropy_N.double(), entropy_C, rtol=1e-5, atol=2e-5)
        # The first of equal peaks.
        assert found.argmax_N.tolist() == [int((row_V == row_V.max()).nonzero()[0]) for row_V in product_CV]
        if top_k is None:
            assert found.topk_mass_N is None
            continue
        assert found.topk_mass_N is not None
        torch.testing.assert_close(found.topk_mass_N.double(), probs_CV.topk(top_k).values.sum(1), rtol=1e-5, atol=1e-6)
    rows.write_gradient(product_CV, labels_C, dlogp_C, scan, shape)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(product_CV.double(), gradient_CV, rtol=max(tolerance, 1e-5), atol=tolerance * 1e-2)


def test_rows_of_nan_and_infinity_are_not_finite(kernel: tuple[RowKernel, torch.dtype]) -> None:
    rows, dtype = kernel
    product_CV = rows_of(dtype, 4)
    product_CV[0, 3], product_CV[1, 4], product_CV[2] = float("nan"), float("inf"), float("-inf")
    scan = rows.scan_rows(product_CV, torch.zeros(4, dtype=torch.int64), 2, HeadShape(1.0, None))
    assert scan.statistics.log_prob_N.isfinite().tolist() == [False, False, False, True]
    assert (scan.statistics.argmax_N < WIDTH).all()


@pytest.mark.parametrize("objective", [CEObjective(), SEDObjective()])
def test_the_head_is_that_of_open_rows(
    kernel: tuple[RowKernel, torch.dtype], objective: CEObjective | SEDObjective, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, dtype = kernel
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(50, 8, generator=generator).to(dtype)
    weight_VH = (torch.randn(WIDTH, 8, generator=generator)).to(dtype)
    labels_N = torch.where(torch.arange(50) % 5 == 0, IGNORED_LABEL, torch.arange(50) * 11)

    def gradients() -> tuple[Tensor, ...]:
        leaves = (hidden_NH.clone().requires_grad_(), weight_VH.clone().requires_grad_())
        tau = 0.2 if isinstance(objective, SEDObjective) else None
        output = linear_objective_loss(*leaves, labels_N, objective, tau=tau, denominator=40, chunk_tokens=33)
        output.loss.backward()  # type: ignore[no-untyped-call]
        return (output.loss.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))

    fused = gradients()
    monkeypatch.setattr(vocabulary, "row_kernel", lambda hidden_NH, vocab: None)
    for one, other in zip(fused, gradients(), strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=scale * (1e-6 if dtype == torch.float32 else 2**-7))


def test_without_a_compiler_rows_lie_open(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("InvalidCxxCompiler: no g++\nlong story")

    monkeypatch.setattr(compiled._CompiledRows, "scan_rows", fail)
    compiled.row_kernel.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert compiled.row_kernel(torch.float32) is None
            assert vocabulary.row_kernel(torch.zeros(1, 1), WIDTH) is None
    finally:
        compiled.row_kernel.cache_clear()
    assert [record.message for record in caplog.records] == [
        "expected a C++ compiler for the head's CPU kernel, got: InvalidCxxCompiler: no g++; going on with slower eager code"
    ]


def test_small_vocabularies_and_fp64_are_not_compiled() -> None:
    assert vocabulary.row_kernel(torch.zeros(1, 1), compiled.SMALLEST_VOCABULARY - 1) is None
    assert vocabulary.row_kernel(torch.zeros(1, 1, dtype=torch.float64), WIDTH) is None
