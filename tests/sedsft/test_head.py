"""The chunked head against autograd of the papers' formulas on materialised logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sedsft.config import CEObjective, DFTObjective, GEMObjective, SEDObjective
from sedsft.exploration import calibrate_tau
from sedsft.head import IGNORED_LABEL, HeadOutput, linear_objective_loss, token_statistics
from sedsft.objectives import PolicyObjective, TokenObjective
from sedsft.reference import reference_losses

CONFIG_OBJECTIVES = [
    CEObjective(),
    SEDObjective(),
    SEDObjective(weight=1.1, top_k=3),
    SEDObjective(mask=False),
    DFTObjective(),
    GEMObjective(),
    GEMObjective(beta=2, h="logsigmoid"),
]
IDS = ["ce", "sed", "sed-1.1-3", "sed-no-mask", "dft", "gem", "gem-logsigmoid"]


@dataclass(frozen=True)
class Shape:
    """The optional steps between the matrix product and the softmax."""

    bias: bool = False
    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Problem:
    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    labels_N: Tensor
    shape: Shape

    @staticmethod
    def random(
        n: int, h: int, v: int, *, seed: int = 0, spread: float = 2.0, ignored: float = 0.3, shape: Shape = Shape()
    ) -> Problem:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(n, h, generator=generator, dtype=torch.float64) * spread / h**0.5
        weight = torch.randn(v, h, generator=generator, dtype=torch.float64)
        bias = torch.randn(v, generator=generator, dtype=torch.float64) if shape.bias else None
        labels = torch.randint(v, (n,), generator=generator)
        labels[torch.rand(n, generator=generator) < ignored] = IGNORED_LABEL
        return Problem(hidden, weight, bias, labels, shape)

    def to(self, dtype: torch.dtype) -> Problem:
        bias = None if self.bias_V is None else self.bias_V.to(dtype)
        return Problem(self.hidden_NH.to(dtype), self.weight_VH.to(dtype), bias, self.labels_N, self.shape)

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in (self.hidden_NH, self.weight_VH, self.bias_V) if x is not None]

    def logits(self, leaves: list[Tensor]) -> Tensor:
        logits = leaves[0] @ leaves[1].T
        if self.bias_V is not None:
            logits = logits + leaves[2]
        if self.shape.softcap is not None:
            logits = torch.tanh(logits / self.shape.softcap) * self.shape.softcap
        return logits * self.shape.logit_scale

    def tau(self, objective: TokenObjective) -> float | None:
        """A threshold that lies between two masses, so that rounding cannot move a token across it."""
        if not (isinstance(objective, SEDObjective) and objective.mask):
            return None
        mass = self.logits(self.leaves()).detach().softmax(1).topk(objective.top_k).values.sum(1).sort().values
        middle = len(mass) // 2
        return float((mass[middle - 1] + mass[middle]) / 2) if middle else 0.5

    def head(self, leaves: list[Tensor], objective: TokenObjective, **given: Any) -> HeadOutput:
        options: dict[str, Any] = {"denominator": 7.0, "tau": self.tau(objective), **given}
        return linear_objective_loss(
            leaves[0],
            leaves[1],
            self.labels_N,
            objective,
            bias_V=leaves[2] if self.bias_V is not None else None,
            logit_scale=self.shape.logit_scale,
            softcap=self.shape.softcap,
            **options,
        )

    def truth(self, leaves: list[Tensor], objective: TokenObjective, tau: float | None) -> tuple[Tensor, Tensor]:
        """Loss / 7 and the loss of each kept token."""
        kept = self.labels_N != IGNORED_LABEL
        if isinstance(objective, PolicyObjective):
            objective = objective.at(kept.nonzero()[:, 0])
        losses = reference_losses(self.logits(leaves)[kept], self.labels_N[kept], objective, tau)
        return losses.sum() / 7, losses

    def policy(self, seed: int = 0, variant: str = "plain") -> PolicyObjective:
        """Old, sampler's and reference log-probs near the new ones, so that some ratios lie on either side of each bound."""
        generator = torch.Generator().manual_seed(seed)
        log_probs = self.logits(self.leaves()).detach().log_softmax(1)
        log_prob = log_probs.gather(1, self.labels_N.clamp(min=0)[:, None])[:, 0]
        advantage = torch.randn(len(log_prob), generator=generator, dtype=torch.float64)
        old, sampler, reference = (log_prob + 0.4 * torch.randn(len(log_prob), generator=generator).double() for _ in range(3))
        weighted = {"sampler_log_prob_N": sampler, "tis_cap": 1.2}
        divergence = {"reference_log_prob_N": reference, "kl_weight": 0.3}
        given: dict[str, dict[str, Any]] = {
            "plain": {},
            "dual-clip": {"dual_clip": 1.4},
            "first": {"old_log_prob_N": None, **weighted},
            "weighted": weighted,
            "divergence": divergence,
            "all": {"dual_clip": 1.4, **weighted, **divergence},
        }
        return replace(PolicyObjective(advantage, old, 0.2, 0.28), **given[variant])


def assert_equals_truth(problem: Problem, objective: TokenObjective, tolerance: float, **given: Any) -> HeadOutput:
    """Loss, token losses and all gradients, relative to the largest entry where that exceeds 1."""
    tau = problem.tau(objective)
    expected_leaves, leaves = problem.leaves(), problem.leaves()
    expected, expected_losses = problem.truth(expected_leaves, objective, tau)
    expected_gradients = torch.autograd.grad(expected, expected_leaves)
    output = problem.head(leaves, objective, **{"tau": tau, **given})
    kept = problem.labels_N != IGNORED_LABEL
    pairs = [(output.loss.detach(), expected.detach()), (output.loss_N[kept], expected_losses.detach())]
    pairs += list(zip(torch.autograd.grad(output.loss, leaves), expected_gradients, strict=True))
    for actual, wanted in pairs:
        scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(actual, wanted, rtol=0, atol=tolerance * scale)
    assert (output.loss_N[~kept] == 0).all()
    return output


SHAPES = [Shape(), Shape(bias=True), Shape(logit_scale=1.7), Shape(softcap=3.0), Shape(bias=True, logit_scale=0.6, softcap=5.0)]


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "bias", "scale", "softcap", "all"])
@pytest.mark.parametrize("objective", CONFIG_OBJECTIVES, ids=IDS)
def test_loss_and_gradients_equal_float64_autograd(objective: TokenObjective, shape: Shape) -> None:
    problem = Problem.random(61, 16, 97, shape=shape)
    output = assert_equals_truth(problem, objective, 1e-10, chunk_tokens=8)
    if isinstance(objective, SEDObjective) and objective.mask:
        assert 0 < output.active_N.sum() < (problem.labels_N != IGNORED_LABEL).sum()


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "bias", "scale", "softcap", "all"])
@pytest.mark.parametrize("variant", ["plain", "dual-clip", "first", "weighted", "divergence", "all"])
def test_policy_loss_and_gradients_equal_float64_autograd(shape: Shape, variant: str) -> None:
    problem = Problem.random(61, 16, 97, shape=shape)
    output = assert_equals_truth(problem, problem.policy(variant=variant), 1e-10, chunk_tokens=8)
    labelled = (problem.labels_N != IGNORED_LABEL).sum()
    assert 0 < output.active_N.sum() <= labelled
    assert (output.active_N.sum() == labelled) == (variant == "first")


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape_labels_logits_and_chunks(data: st.DataObject) -> None:
    vocab = data.draw(st.integers(1, 40))
    problem = Problem.random(
        data.draw(st.integers(0, 17)),
        data.draw(st.integers(1, 9)),
        vocab,
        seed=data.draw(st.integers(0, 10_000)),
        spread=data.draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4])),
        ignored=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        shape=Shape(data.draw(st.booleans()), data.draw(st.sampled_from([1.0, 0.3])), data.draw(st.sampled_from([None, 10.0]))),
    )
    sed = SEDObjective(weight=data.draw(st.floats(0, 8)), top_k=data.draw(st.integers(1, min(8, vocab))))
    policies = [problem.policy()] if len(problem.labels_N) else []
    objective = data.draw(st.sampled_from([sed, *CONFIG_OBJECTIVES[3:], *policies]))
    if isinstance(objective, SEDObjective) and objective.mask:
        masses = problem.logits(problem.leaves()).softmax(1).topk(objective.top_k).values.sum(1)
        if (masses - (problem.tau(objective) or 0)).abs().lt(1e-9).any():
            objective = SEDObjective(mask=False)  # equal masses: the comparison with tau is a matter of rounding
    chunk_tokens = data.draw(st.one_of(st.none(), st.integers(1, 20)))
    assert_equals_truth(problem, objective, 1e-10, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 60, 1000])
def test_chunks_do_not_change_the_result(chunk_tokens: int, dtype: torch.dtype) -> None:
    problem = Problem.random(60, 16, 50, shape=Shape(bias=True)).to(dtype)
    whole_leaves, leaves = problem.leaves(), problem.leaves()
    whole = problem.head(whole_leaves, SEDObjective(), tau=0.5)
    chunked = problem.head(leaves, SEDObjective(), tau=0.5, chunk_tokens=chunk_tokens)
    whole.loss.backward()
    chunked.loss.backward()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype]
    for name in ("loss", "loss_N", "log_prob_N", "topk_mass_N", "entropy_N", "argmax_N", "active_N"):
        torch.testing.assert_close(getattr(chunked, name), getattr(whole, name), rtol=tolerance, atol=tolerance, msg=name)
    for leaf, expected in zip(leaves, whole_leaves, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("objective", CONFIG_OBJECTIVES, ids=IDS)
def test_gradient_adds_up_over_ranks_and_micro_batches(objective: TokenObjective, parts: int) -> None:
    problem = Problem.random(60, 16, 50).to(torch.float32)
    tau = problem.tau(objective)
    whole, split = problem.leaves(), problem.leaves()
    problem.head(whole, objective, tau=tau, denominator=40).loss.backward()
    for rows in torch.arange(60).tensor_split(parts):
        part = linear_objective_loss(split[0][rows], split[1], problem.labels_N[rows], objective, tau=tau, denominator=40)
        part.loss.backward()
    for leaf, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(leaf.grad, expected.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("chunk_tokens", "allowance"), [(None, 1.05), (16, 1.5)], ids=["whole", "chunked"])
@pytest.mark.parametrize("objective", CONFIG_OBJECTIVES, ids=IDS)
def test_bf16_is_as_close_to_the_truth_as_eager_bf16(
    objective: TokenObjective, chunk_tokens: int | None, allowance: float
) -> None:
    # Chunks of the weight's gradient are rounded to bf16 before their fp32 sum, which is then rounded again: two roundings
    # of equal size instead of one, a factor of sqrt(2).
    problem = Problem.random(200, 32, 300).to(torch.bfloat16)
    tau = problem.tau(objective)
    exact = problem.to(torch.float64)
    exact_leaves, eager_leaves, leaves = exact.leaves(), problem.leaves(), problem.leaves()
    truth = torch.autograd.grad(exact.truth(exact_leaves, objective, tau)[0], exact_leaves)
    kept = problem.labels_N != IGNORED_LABEL
    eager_losses = reference_losses(problem.logits(eager_leaves)[kept].float(), problem.labels_N[kept], objective, tau)
    eager = torch.autograd.grad(eager_losses.sum() / 7, eager_leaves)
    actual = torch.autograd.grad(problem.head(leaves, objective, tau=tau, chunk_tokens=chunk_tokens).loss, leaves)
    for wanted, plain, chunked in zip(truth, eager, actual, strict=True):
        assert (chunked - wanted).norm() <= allowance * (plain - wanted).norm()


def test_statistics_equal_float64_truth() -> None:
    problem = Problem.random(61, 16, 97)
    statistics = token_statistics(problem.hidden_NH, problem.weight_VH, problem.labels_N, top_k=5, chunk_tokens=9)
    log_probs = problem.logits(problem.leaves()).detach().log_softmax(1)
    kept = problem.labels_N != IGNORED_LABEL
    wanted = {
        "log_prob_N": log_probs.gather(1, problem.labels_N.clamp(min=0)[:, None])[:, 0],
        "topk_mass_N": log_probs.exp().sort(1, descending=True).values[:, :5].sum(1),
        "entropy_N": -(log_probs.exp() * log_probs).sum(1),
        "argmax_N": log_probs.argmax(1),
    }
    output = problem.head(problem.leaves(), SEDObjective(top_k=5), tau=0.5)
    for name, value in wanted.items():
        for source in (statistics, output):
            actual = getattr(source, name)
            assert not actual.requires_grad
            torch.testing.assert_close(actual, torch.where(kept, value, 0), rtol=0, atol=1e-12, msg=name)
    assert token_statistics(problem.hidden_NH, problem.weight_VH, problem.labels_N, top_k=None).topk_mass_N is None
    assert problem.head(problem.leaves(), CEObjective()).topk_mass_N is None


def test_statistics_of_bf16_inputs_are_fp32() -> None:
    problem = Problem.random(9, 4, 11).to(torch.bfloat16)
    output = problem.head(problem.leaves(), SEDObjective(), tau=0.5)
    assert {output.loss.dtype, output.loss_N.dtype, output.log_prob_N.dtype, output.entropy_N.dtype} == {torch.float32}


def test_large_logits_stay_finite_in_fp32() -> None:
    # Logits 30,000 and 29,999: log p of the second is -1 - log(1 + 1/e), although exp overflows.
    weight = torch.tensor([[30_000.0], [29_999.0], [-30_000.0]], requires_grad=True)
    output = linear_objective_loss(torch.ones(1, 1), weight, torch.tensor([1]), SEDObjective(mask=False), denominator=1)
    output.loss.backward()
    assert output.log_prob_N.item() == pytest.approx(-1.3132617)
    p = 0.26894143
    assert output.entropy_N.item() == pytest.approx(0.5822031)
    assert weight.grad is not None
    factor = 1 - 2 * p * (p - 0.5)
    assert weight.grad[:, 0].tolist() == pytest.approx([factor * (1 - p), factor * (p - 1), 0], rel=1e-5)


def test_calibrated_tau_masks_exactly_the_calibrated_share() -> None:
    problem = Problem.random(200, 16, 50, ignored=0).to(torch.float32)
    statistics = token_statistics(problem.hidden_NH, problem.weight_VH, problem.labels_N, top_k=2)
    assert statistics.topk_mass_N is not None
    calibration = calibrate_tau(statistics.topk_mass_N.numpy(), 0.7, top_k=2)
    for tau in (calibration.tau, torch.tensor(calibration.tau)):
        active = problem.head(problem.leaves(), SEDObjective(), tau=tau).active_N
        assert int((~active).sum()) == 140
    assert problem.head(problem.leaves(), SEDObjective(tau=calibration.tau), tau=None).active_N.sum() == 60


class Recorder(TorchDispatchMode):
    """Counts matrix products and their rows, and keeps the size of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize(
    ("needs", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_only_wanted_gradients_are_formed_and_logits_never_whole(needs: tuple[bool, bool], products: int) -> None:
    problem = Problem.random(64, 4, 100, ignored=0).to(torch.float32)
    hidden, weight = (x.detach().clone().requires_grad_(need) for x, need in zip(problem.leaves(), needs, strict=True))
    with Recorder() as recorder:
        output = linear_objective_loss(hidden, weight, problem.labels_N, CEObjective(), denominator=64, chunk_tokens=16)
        assert recorder.products == 4 * products
        if any(needs):
            output.loss.backward()
    assert recorder.products == 4 * products
    assert recorder.largest == 16 * 100
    assert [x.grad is not None for x in (hidden, weight)] == list(needs)


def test_no_gradient_is_formed_under_no_grad() -> None:
    problem = Problem.random(64, 4, 100, ignored=0)
    leaves = problem.leaves()
    with torch.no_grad(), Recorder() as recorder:
        output = problem.head(leaves, CEObjective())
    assert recorder.products == 1
    assert not output.loss.requires_grad
    assert output.loss.item() == problem.head(leaves, CEObjective()).loss.item()


def test_ignored_tokens_skip_the_products() -> None:
    problem = Problem.random(64, 4, 100, ignored=0)
    problem.labels_N[5:] = IGNORED_LABEL
    with Recorder() as recorder:
        problem.head(problem.leaves(), CEObjective())
    assert recorder.largest == 5 * 100


@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("objective", CONFIG_OBJECTIVES, ids=IDS)
def test_without_any_label_loss_and_gradients_are_zero(objective: TokenObjective, tokens: int) -> None:
    problem = Problem.random(tokens, 4, 10, ignored=1.1, shape=Shape(bias=True)).to(torch.float32)
    leaves = problem.leaves()
    tau = 0.5 if isinstance(objective, SEDObjective) and objective.mask else None
    output = problem.head(leaves, objective, tau=tau)
    output.loss.backward()
    assert output.loss.item() == 0
    assert output.loss_N.shape == (tokens,)
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


def test_upstream_gradient_scales_and_a_second_backward_is_refused() -> None:
    problem = Problem.random(20, 4, 10)
    once, scaled = problem.leaves(), problem.leaves()
    problem.head(once, CEObjective()).loss.backward()
    loss = problem.head(scaled, CEObjective()).loss * -3
    loss.backward(retain_graph=True)
    for leaf, expected in zip(scaled, once, strict=True):
        assert expected.grad is not None
        torch.testing.assert_close(leaf.grad, expected.grad * -3, rtol=0, atol=1e-12)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tied_embedding_collects_both_gradients() -> None:
    weight = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs, labels = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 9])
    tied, expected = weight.clone().requires_grad_(), weight.clone().requires_grad_()
    linear_objective_loss(tied[inputs].tanh(), tied, labels, DFTObjective(), denominator=3).loss.backward()
    reference_losses(expected[inputs].tanh() @ expected.T, labels, DFTObjective()).mean().backward()
    torch.testing.assert_close(tied.grad, expected.grad, rtol=0, atol=1e-12)


def test_nan_is_not_hidden() -> None:
    hidden = torch.tensor([[float("nan")]], requires_grad=True)
    output = linear_objective_loss(hidden, torch.ones(2, 1), torch.tensor([0]), CEObjective(), denominator=1)
    assert output.loss.isnan()


N, H, V = 3, 4, 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_NH": torch.zeros(1, N, H)}, r"hidden \[N, H\]"),
        ({"hidden_NH": torch.zeros(N, H + 1)}, r"weight \(5, 4\)"),
        ({"labels_N": torch.zeros(N + 1, dtype=torch.int64)}, r"labels \(4,\)"),
        ({"labels_N": torch.tensor([0, V, 0])}, "labels in 0..4"),
        ({"labels_N": torch.tensor([0, -1, 0])}, "got -1..0"),
        ({"labels_N": torch.zeros(N)}, "int64"),
        ({"hidden_NH": torch.zeros(N, H, dtype=torch.bfloat16)}, "one dtype"),
        ({"hidden_NH": torch.zeros(N, H).half(), "weight_VH": torch.zeros(V, H).half()}, "one dtype of bf16"),
        ({"bias_V": torch.zeros(V + 1)}, "bias of shape"),
        ({"denominator": 0}, "positive denominator"),
        ({"denominator": float("nan")}, "positive denominator"),
        ({"chunk_tokens": 0}, "chunk_tokens"),
        ({"softcap": 0.0}, "softcap"),
        ({"tau": 0.5}, "another objective"),
        ({"objective": SEDObjective()}, "expected tau for SED"),
        ({"objective": SEDObjective(), "tau": torch.zeros(1)}, "0-dim"),
        ({"objective": SEDObjective(mask=False), "tau": 0.5}, "another objective"),
        ({"objective": SEDObjective(top_k=6), "tau": 0.5}, r"top_k in 1..5"),
        ({"objective": PolicyObjective(torch.zeros(2), torch.zeros(2), 0.2, 0.28)}, "policy objective of 3 tokens"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hidden_NH": torch.zeros(N, H),
        "weight_VH": torch.zeros(V, H),
        "labels_N": torch.zeros(N, dtype=torch.int64),
        "objective": CEObjective(),
        "denominator": 1,
    }
    with pytest.raises(ValueError, match=message):
        linear_objective_loss(**(given | change))
