"""The Triton row kernels against float64 autograd, on a GPU or through Triton's interpreter.

The interpreter must be chosen before Triton is imported, so that a process of its own runs this file with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sedsft import vocabulary
from sedsft.config import CEObjective, DFTObjective, GEMObjective, SEDObjective
from sedsft.head import IGNORED_LABEL, linear_objective_loss, token_statistics
from sedsft.kernels.contract import HeadShape
from sedsft.objectives import PolicyObjective, TokenObjective
from sedsft.reference import reference_losses

pytest.importorskip("triton", reason="Triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED or torch.cuda.is_available():
    from sedsft.kernels import rows


def on_device(function):  # type: ignore[no-untyped-def]
    """Interpreted runs need no GPU and carry no mark of one."""
    if INTERPRETED:
        return function
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(function))


@pytest.fixture(autouse=True)
def triton_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(vocabulary, "row_kernel", lambda hidden_NH, vocab: rows)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own process")
def test_everything_here_passes_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[3]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout


def score(product: Tensor, shape: HeadShape) -> Tensor:
    capped = product if shape.softcap is None else torch.tanh(product / shape.softcap) * shape.softcap
    return capped * shape.logit_scale


def assert_rows_equal_truth(product_CV: Tensor, labels_C: Tensor, top_k: int | None, shape: HeadShape) -> None:
    dtype = product_CV.dtype
    exact_CV = product_CV.double().requires_grad_()
    z_CV = score(exact_CV, shape)
    log_probs_CV = z_CV.log_softmax(1)
    target_C = log_probs_CV.gather(1, labels_C[:, None])[:, 0]
    dlogp_C = torch.linspace(-1.5, 1, len(labels_C), dtype=torch.float64)
    (gradient_CV,) = torch.autograd.grad((target_C * dlogp_C).sum(), exact_CV)
    probs_CV = log_probs_CV.detach().exp()

    given_CV = product_CV.clone().to(DEVICE)
    scan = rows.scan_rows(given_CV, labels_C.to(DEVICE), top_k, shape)
    assert given_CV.cpu().equal(product_CV)
    found = scan.statistics
    assert found.log_prob_N.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    entropy_C = -torch.special.xlogy(probs_CV, probs_CV).sum(1)
    wanted = {"log_prob_N": target_C.detach(), "entropy_N": entropy_C}
    assert (found.topk_mass_N is None) == (top_k is None)
    if top_k is not None:
        wanted["topk_mass_N"] = probs_CV.topk(top_k).values.sum(1)
    for name, value in wanted.items():
        torch.testing.assert_close(getattr(found, name).cpu().double(), value, rtol=tolerance, atol=tolerance, msg=name)
    # Equal logits have no one largest entry: what was found must be as large as any.
    largest_C = score(product_CV.to(found.log_prob_N.dtype), shape).gather(1, found.argmax_N.cpu()[:, None])[:, 0]
    torch.testing.assert_close(largest_C.double(), z_CV.detach().amax(1), rtol=tolerance, atol=tolerance)

    rows.write_gradient(given_CV, labels_C.to(DEVICE), dlogp_C.to(DEVICE, scan.max_C.dtype), scan, shape)
    # One rounding to bf16; the interpreter cuts digits off where a GPU rounds to the nearest.
    bf16 = 2**-7 if INTERPRETED else 2**-8
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: bf16}[dtype]
    floor = tolerance if dtype != torch.bfloat16 else 1e-5
    torch.testing.assert_close(given_CV.cpu().double(), gradient_CV, rtol=tolerance, atol=floor * shape.logit_scale)


@on_device
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_any_rows_equal_float64_autograd(data: st.DataObject) -> None:
    vocab = data.draw(st.one_of(st.integers(1, 70), st.sampled_from([4095, 4096, 4097, 9001])))
    count = data.draw(st.integers(0, 4))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10_000)))
    spread = data.draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
    product_CV = (torch.randn(count, vocab, generator=generator, dtype=torch.float64) * spread).to(dtype)
    # Log-probs of logits near 1e4 are differences that fp32 scaling rounds at 1e-3.
    plain = spread == 1e4 and dtype != torch.float64
    softcap = None if plain else data.draw(st.sampled_from([None, 10.0]))
    shape = HeadShape(1.0 if plain else data.draw(st.sampled_from([1.0, 0.3])), softcap)
    top_k = data.draw(st.one_of(st.none(), st.integers(1, min(8, vocab))))
    labels_C = torch.randint(vocab, (count,), generator=generator)
    assert_rows_equal_truth(product_CV, labels_C, top_k, shape)


@on_device
@pytest.mark.parametrize("rising", [True, False])
def test_largest_entries_are_kept_whatever_their_order(rising: bool) -> None:
    # Rising rows replace the whole top-k in every block, falling ones never after the first.
    product_CV = torch.linspace(-3, 3, 9000, dtype=torch.float64)[None]
    assert_rows_equal_truth(product_CV if rising else product_CV.flip(1), torch.tensor([17]), 8, HeadShape(1.0, None))


@on_device
def test_hand_computed_row() -> None:
    # Logits log 1, log 2, log 5: probabilities 1/8, 2/8, 5/8.
    product_CV = torch.tensor([[1.0, 2.0, 5.0]]).log().to(DEVICE)
    scan = rows.scan_rows(product_CV, torch.tensor([1], device=DEVICE), 2, HeadShape(1.0, None))
    assert scan.statistics.log_prob_N.exp().item() == pytest.approx(0.25)
    assert scan.statistics.topk_mass_N.item() == pytest.approx(0.875)
    assert scan.statistics.entropy_N.item() == pytest.approx(0.9002561)
    assert scan.statistics.argmax_N.item() == 2
    labels_C, dlogp_C = torch.tensor([1], device=DEVICE), torch.tensor([-2.0], device=DEVICE)
    rows.write_gradient(product_CV, labels_C, dlogp_C, scan, HeadShape(1.0, None))
    assert product_CV[0].tolist() == pytest.approx([0.25, -1.5, 1.25])


@on_device
def test_nan_and_minus_infinity() -> None:
    product_CV = torch.tensor([[0.0, float("nan"), 1.0], [float("-inf"), 0.0, 0.0]], device=DEVICE)
    found = rows.scan_rows(product_CV, torch.tensor([0, 1], device=DEVICE), 2, HeadShape(1.0, None)).statistics
    assert found.log_prob_N[0].isnan()
    assert found.log_prob_N[1].exp().item() == pytest.approx(0.5)
    assert found.entropy_N[1].item() == pytest.approx(0.6931472)


OBJECTIVES = [CEObjective(), SEDObjective(weight=1.1, top_k=3), SEDObjective(mask=False), DFTObjective(), GEMObjective(), None]
IDS = ["ce", "sed", "sed-no-mask", "dft", "gem", "policy"]


@on_device
@pytest.mark.parametrize("shape", [HeadShape(1.0, None), HeadShape(0.6, 5.0)], ids=["plain", "cap"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_head_on_these_rows_equals_float64_autograd(objective: TokenObjective | None, shape: HeadShape) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((23, 8), (61, 8), (61,))]
    labels_N = torch.randint(61, (23,), generator=generator)
    labels_N[[0, 5, 22]] = IGNORED_LABEL
    kept = labels_N != IGNORED_LABEL
    given_objective = kept_objective = objective
    expected_leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    z_NV = score(expected_leaves[0] @ expected_leaves[1].T + expected_leaves[2], shape)[kept]
    if objective is None:
        old_N = torch.zeros(23, dtype=torch.float64)
        noise_N = 0.4 * torch.randn(23, generator=generator, dtype=torch.float64)
        old_N[kept] = z_NV.detach().log_softmax(1).gather(1, labels_N[kept][:, None])[:, 0]
        policy = PolicyObjective(torch.randn(23, generator=generator, dtype=torch.float64), old_N + noise_N, 0.2, 0.28)
        kept_objective = policy.at(kept.nonzero()[:, 0])
        given_objective = PolicyObjective(policy.advantage_N.to(DEVICE), policy.old_log_prob_N.to(DEVICE), 0.2, 0.28)
    assert given_objective is not None
    assert kept_objective is not None
    masked = isinstance(objective, SEDObjective) and objective.mask
    mass_sorted = z_NV.detach().softmax(1).topk(3).values.sum(1).sort().values
    tau = float(mass_sorted[9:11].mean()) if masked else None
    expected = reference_losses(z_NV, labels_N[kept], kept_objective, tau).sum() / 7
    actual_leaves = [leaf.clone().to(DEVICE).requires_grad_() for leaf in leaves]
    output = linear_objective_loss(
        actual_leaves[0],
        actual_leaves[1],
        labels_N.to(DEVICE),
        given_objective,
        tau=tau,
        denominator=7,
        chunk_tokens=6,
        bias_V=actual_leaves[2],
        logit_scale=shape.logit_scale,
        softcap=shape.softcap,
    )
    pairs = [(output.loss.detach(), expected.detach())]
    pairs += zip(torch.autograd.grad(output.loss, actual_leaves), torch.autograd.grad(expected, expected_leaves), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual.cpu(), wanted, rtol=0, atol=1e-10)
    if masked:
        assert output.active_N.sum() == 10


@on_device
@pytest.mark.parametrize("tokens", [0, 3])
def test_without_any_label_nothing_is_launched(tokens: int) -> None:
    hidden_NH, weight_VH = torch.ones(tokens, 4, device=DEVICE), torch.ones(9, 4, device=DEVICE)
    labels_N = torch.full((tokens,), IGNORED_LABEL, device=DEVICE)
    assert linear_objective_loss(hidden_NH, weight_VH, labels_N, CEObjective(), denominator=1).loss.item() == 0
    assert token_statistics(hidden_NH, weight_VH, labels_N, top_k=2).log_prob_N.tolist() == [0] * tokens
