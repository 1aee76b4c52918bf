"""Properties of the head over drawn shapes, labels, chunks and logits, the extreme ones included.

The truth is written here once more, straight from the papers, on materialised logits with autograd. Run with
`--hypothesis-show-statistics` to see the worst error that was found. The last test repeats everything in a process of its
own with the Triton rows in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings, target
from hypothesis import strategies as st
from torch import Tensor

from sedsft import vocabulary
from sedsft.config import CEObjective, DFTObjective, GEMObjective, SEDObjective
from sedsft.head import IGNORED_LABEL, HeadOutput, linear_objective_loss, token_statistics
from sedsft.objectives import PolicyObjective, TokenObjective

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXAMPLES = 25 if INTERPRETED else 150
PHASES = (Phase.explicit, Phase.generate)
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


@pytest.fixture(autouse=True, scope="module")
def _triton_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            from sedsft.kernels import rows

            patch.setattr(vocabulary, "row_kernel", lambda hidden_NH, vocab: rows)
        yield


# ---------------------------------------------------------------------------------------------- the truth


def true_losses(z_NV: Tensor, labels_N: Tensor, objective: TokenObjective, tau: float | None) -> Tensor:
    """Loss of each token as the papers write it."""
    log_pi_NV = torch.log_softmax(z_NV, dim=1)
    log_p_N = log_pi_NV[torch.arange(len(labels_N)), labels_N]
    p_N = log_p_N.exp()
    if isinstance(objective, DFTObjective):
        return -p_N.detach() * log_p_N
    if isinstance(objective, SEDObjective):
        mass_N = torch.sort(torch.softmax(z_NV.detach(), dim=1), dim=1, descending=True).values[:, : objective.top_k].sum(1)
        active_N = mass_N < tau if objective.mask else torch.ones_like(mass_N, dtype=torch.bool)
        return -log_p_N + objective.weight * torch.where(active_N, (p_N - 0.5) ** 2, 0.0)
    if isinstance(objective, GEMObjective):
        pull_NV = torch.softmax(z_NV.detach() / objective.beta, dim=1)
        if objective.h == "logsigmoid":
            z_y_N1 = z_NV.detach()[torch.arange(len(labels_N)), labels_N][:, None]
            pull_NV = pull_NV / (1 + torch.exp(-0.01 * (z_NV.detach() - z_y_N1)))
        return -(pull_NV * (log_p_N[:, None] - log_pi_NV)).sum(1)
    if isinstance(objective, PolicyObjective):
        ratio_N = (log_p_N - objective.old_log_prob_N).exp()
        bounded_N = ratio_N.clamp(1 - objective.clip_low, 1 + objective.clip_high)
        return -torch.minimum(ratio_N * objective.advantage_N, bounded_N * objective.advantage_N)
    return -log_p_N


@dataclass(frozen=True)
class Case:
    """Inputs of one call. Legend: N tokens, H hidden width, V vocabulary."""

    hidden_NH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None
    labels_N: Tensor
    logit_scale: float
    softcap: float | None
    objective: TokenObjective
    tau: float | None
    chunk_tokens: int | None

    def to(self, dtype: torch.dtype) -> Case:
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return replace(self, hidden_NH=self.hidden_NH.to(dtype), weight_VH=self.weight_VH.to(dtype), bias_V=bias_V)

    def leaves(self) -> list[Tensor]:
        given = (self.hidden_NH, self.weight_VH, self.bias_V)
        return [tensor.detach().clone().requires_grad_() for tensor in given if tensor is not None]

    def logits(self, leaves: list[Tensor]) -> Tensor:
        """z of the tokens with a label."""
        product_NV = leaves[0] @ leaves[1].T
        product_NV = product_NV + leaves[2] if self.bias_V is not None else product_NV
        capped_NV = product_NV if self.softcap is None else self.softcap * torch.tanh(product_NV / self.softcap)
        return self.logit_scale * capped_NV[self.labels_N != IGNORED_LABEL]

    def truth(self, leaves: list[Tensor]) -> Tensor:
        """Loss of each token with a label, from logits in the leaves' dtype, which become fp32 at least."""
        kept_N = self.labels_N != IGNORED_LABEL
        objective = self.objective
        if isinstance(objective, PolicyObjective):
            objective = PolicyObjective(objective.advantage_N[kept_N], objective.old_log_prob_N[kept_N], CLIP_LOW, CLIP_HIGH)
        z_NV = self.logits(leaves)
        return true_losses(z_NV.float() if z_NV.dtype == torch.bfloat16 else z_NV, self.labels_N[kept_N], objective, self.tau)

    def head(self, leaves: list[Tensor]) -> HeadOutput:
        bias_V = leaves[2] if self.bias_V is not None else None
        return linear_objective_loss(
            *leaves[:2], self.labels_N, self.objective, tau=self.tau, denominator=7, chunk_tokens=self.chunk_tokens,
            bias_V=bias_V, logit_scale=self.logit_scale, softcap=self.softcap,
        )  # fmt: skip


def error(actual: Tensor, wanted: Tensor, scale: Tensor | float = 0.0) -> float:
    """Largest difference of two entries, relative to the wanted one or to `scale` where these exceed 1; infinite for NaN."""
    if not wanted.numel():
        return 0.0
    assert wanted.isfinite().all()
    worst = float(((actual.double() - wanted) / torch.maximum(wanted.abs(), torch.as_tensor(scale)).clamp(min=1)).abs().max())
    return worst if worst == worst else float("inf")


def errors(case: Case, dtype: torch.dtype) -> dict[str, float]:
    """Errors of losses, gradients and statistics in `dtype` against float64 of the same numbers."""
    given_case = case.to(dtype)
    exact = given_case.to(torch.float64)
    kept_N = case.labels_N != IGNORED_LABEL
    exact_leaves, leaves = exact.leaves(), given_case.leaves()
    losses_N = exact.truth(exact_leaves)
    wanted = torch.autograd.grad(losses_N.sum() / 7, exact_leaves)
    output = given_case.head(leaves)
    actual = torch.autograd.grad(output.loss, leaves)
    found = {"loss": error(output.loss.detach(), losses_N.detach().sum() / 7)}
    found["losses"] = error(output.loss_N[kept_N], losses_N.detach())
    # A gradient is a sum of products with these numbers: what cancels leaves their rounding.
    scales = (exact.weight_VH.abs().amax(0), exact.hidden_NH.abs().amax(0) if len(kept_N) else 0.0, 0.0)
    found |= {f"gradient {i}": error(*of) for i, of in enumerate(zip(actual, wanted, scales, strict=False))}

    z_NV = exact.logits(exact_leaves).detach()
    log_pi_NV = torch.log_softmax(z_NV, dim=1)
    pi_NV = log_pi_NV.exp()
    found["log_prob"] = error(output.log_prob_N[kept_N], log_pi_NV[torch.arange(len(z_NV)), case.labels_N[kept_N]])
    found["entropy"] = error(output.entropy_N[kept_N], -torch.special.xlogy(pi_NV, pi_NV).sum(1))
    if output.topk_mass_N is not None:
        assert isinstance(case.objective, SEDObjective)
        mass_N = pi_NV.topk(case.objective.top_k, dim=1).values.sum(1)
        found["mass"] = error(output.topk_mass_N[kept_N], mass_N)
        assert output.active_N[kept_N].equal(mass_N < case.tau)
    # Equal logits have no one largest entry: what was found must be as likely as any.
    likely_N = pi_NV.gather(1, output.argmax_N[kept_N][:, None])[:, 0]
    found["argmax"] = error(likely_N, pi_NV.amax(1)) if len(z_NV) else 0.0
    for name in ("loss_N", "log_prob_N", "entropy_N", "argmax_N", "active_N"):
        assert not getattr(output, name)[~kept_N].any(), name
    return found


# --------------------------------------------------------------------------------------------- what is drawn


def logits_of_kind(kind: str, vocab: int, generator: torch.Generator) -> Tensor:
    """One row of logits [V], exact in bf16 where it is extreme."""
    normal_V = torch.randn(vocab, generator=generator, dtype=torch.float64)
    place = int(torch.randint(vocab, (), generator=generator))
    match kind:
        case "normal":
            return normal_V
        case "sharp":
            return 30 * normal_V
        case "extreme":
            return 1e4 * normal_V.sign()
        case "spread":
            return (1e4 * normal_V).bfloat16().double()
        case "equal":
            return torch.full((vocab,), 3.25, dtype=torch.float64)
        case "tied":
            return normal_V.sign() * 2
        case "one-hot":
            row_V = torch.full((vocab,), -1e4, dtype=torch.float64)
            row_V[place] = 1e4
            return row_V
        case "forbidden":
            row_V = torch.where(normal_V > 0.5, -1e30, normal_V)
            row_V[place] = 0
            return row_V
    raise ValueError(kind)


KINDS = ("normal", "sharp", "extreme", "spread", "equal", "tied", "one-hot", "forbidden")


def tau_between(mass_N: Tensor) -> float:
    """A threshold in the middle of the widest gap between masses, so that rounding moves no token across it."""
    edges = torch.cat([torch.zeros(1), mass_N.double(), torch.full((1,), 1.2)]).sort().values
    widest = int(edges.diff().argmax())
    return float((edges[widest] + edges[widest + 1]) / 2)


def objectives(vocab: int) -> st.SearchStrategy[Any]:
    sed = st.builds(SEDObjective, weight=st.floats(0, 8), top_k=st.integers(1, min(8, vocab)))
    no_mask = st.builds(SEDObjective, weight=st.floats(0, 8), mask=st.just(False))
    gem = st.builds(GEMObjective, beta=st.sampled_from([0.5, 0.7, 1.0, 2.0]), h=st.sampled_from(["linear", "logsigmoid"]))
    return st.one_of(sed, no_mask, gem, st.sampled_from([CEObjective(), DFTObjective(), "policy"]))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Rows of given logits through an identity head, or random states through a random head."""
    vocab, count = draw(st.integers(1, 24)), draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scale, cap = draw(st.sampled_from([1.0, 0.3, 2.0])), draw(st.sampled_from([None, 5.0, 30.0]))
    if draw(st.booleans()):
        kinds = draw(st.lists(st.sampled_from(KINDS), min_size=count, max_size=count))
        hidden_NH = torch.stack([logits_of_kind(kind, vocab, generator) for kind in kinds] or [torch.zeros(vocab)])[:count]
        hidden_NH, weight_VH, bias_V = hidden_NH.double(), torch.eye(vocab, dtype=torch.float64), None
        # Scaling logits near 1e4 rounds their differences in fp32 at 1e-3: that is no error of the head.
        scale, cap = 1.0, None if {"sharp", "extreme", "spread", "one-hot", "forbidden"} & set(kinds) else cap
    else:
        width = draw(st.integers(1, 9))
        hidden_NH = torch.randn(count, width, generator=generator, dtype=torch.float64)
        weight_VH = torch.randn(vocab, width, generator=generator, dtype=torch.float64)
        bias_V = torch.randn(vocab, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    labels_N = torch.randint(vocab, (count,), generator=generator)
    labels_N[torch.rand(count, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = IGNORED_LABEL
    chunk_tokens = draw(st.one_of(st.none(), st.integers(1, count + 1)))
    drawn = draw(objectives(vocab))
    case = Case(hidden_NH, weight_VH, bias_V, labels_N, scale, cap, CEObjective(), None, chunk_tokens)
    return with_objective(case, drawn, generator)


def with_objective(case: Case, drawn: Any, generator: torch.Generator) -> Case:
    """The case with its objective, and with tau or old log-probs that fit its logits. The inputs are rounded to bf16
    first, so that the same tau suits every dtype."""
    case = case.to(torch.bfloat16).to(torch.float64)
    pi_NV = case.logits(case.leaves()).detach().softmax(1)
    if drawn == "policy":
        kept_N = case.labels_N != IGNORED_LABEL
        log_p_N = torch.zeros(len(kept_N), dtype=torch.float64)
        log_p_N[kept_N] = pi_NV.log().gather(1, case.labels_N[kept_N][:, None])[:, 0].clamp(min=-50)
        # Ratios on both sides of both bounds, none so near that rounding moves it across.
        steps = torch.tensor([-0.5, -0.1, 0.1, 0.5], dtype=torch.float64)
        noise_N = steps[torch.randint(4, kept_N.shape, generator=generator)]
        advantage_N = torch.randn(len(kept_N), generator=generator, dtype=torch.float64)
        return replace(case, objective=PolicyObjective(advantage_N, log_p_N + noise_N, CLIP_LOW, CLIP_HIGH))
    if isinstance(drawn, SEDObjective) and drawn.mask:
        return replace(case, objective=drawn, tau=tau_between(pi_NV.topk(drawn.top_k, dim=1).values.sum(1)))
    return replace(case, objective=drawn)


# ----------------------------------------------------------------------------------------------- properties


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=PHASES)
@given(cases())
def test_float64_equals_autograd_of_the_formulas(case: Case) -> None:
    found = errors(case, torch.float64)
    target(max(found.values()), label="float64")
    assert max(found.values()) <= 1e-10, found


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, phases=PHASES)
@given(cases())
def test_fp32_is_within_1e_5(case: Case) -> None:
    found = errors(case, torch.float32)
    target(max(found.values()), label="fp32")
    assert max(found.values()) <= 1e-5, found


OBJECTIVES = [
    CEObjective(), SEDObjective(), SEDObjective(weight=1.1, top_k=8), SEDObjective(mask=False), DFTObjective(),
    GEMObjective(), GEMObjective(h="logsigmoid"), "policy",
]  # fmt: skip
IDS = ["ce", "sed", "sed-1.1-8", "sed-no-mask", "dft", "gem", "gem-logsigmoid", "policy"]


def distances(case: Case) -> list[tuple[float, float]]:
    """Of loss and gradients: how far the head and eager, both bf16, lie from fp32 of the same numbers (2-norm)."""
    exact = case.to(torch.float32)
    exact_leaves, eager_leaves, leaves = exact.leaves(), case.leaves(), case.leaves()
    truth_N, eager_N = exact.truth(exact_leaves), case.truth(eager_leaves)
    output = case.head(leaves)
    wanted = torch.autograd.grad(truth_N.sum() / 7, exact_leaves)
    eager = torch.autograd.grad(eager_N.sum() / 7, eager_leaves)
    actual = torch.autograd.grad(output.loss, leaves)
    kept_N = case.labels_N != IGNORED_LABEL
    triples = [(output.loss_N[kept_N], eager_N.detach(), truth_N.detach()), *zip(actual, eager, wanted, strict=True)]
    return [(float((a - w).norm()), float((e - w).norm())) for a, e, w in triples]


@pytest.mark.parametrize("seed", range(1 if INTERPRETED else 3))
@pytest.mark.parametrize("shape", [(1.0, None, False), (0.6, 5.0, True)], ids=["plain", "all"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_bf16_is_no_further_from_fp32_than_eager(objective: Any, shape: tuple[float, float | None, bool], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, vocab = (24, 60) if INTERPRETED else (160, 300)
    scale, cap, with_bias = shape
    bias_V = torch.randn(vocab, generator=generator) if with_bias else None
    hidden_NH, weight_VH = torch.randn(count, 32, generator=generator) / 3, torch.randn(vocab, 32, generator=generator)
    labels_N = torch.randint(vocab, (count,), generator=generator)
    labels_N[::5] = IGNORED_LABEL
    case = Case(hidden_NH, weight_VH, bias_V, labels_N, scale, cap, CEObjective(), None, None)
    case = with_objective(case, objective, generator).to(torch.bfloat16)
    # The interpreter cuts digits off where everything else rounds to the nearest: errors up to twice as large.
    allowance = 2.1 if INTERPRETED else 1.05
    for head, eager in distances(case):
        assert head <= allowance * eager + 1e-6


@settings(max_examples=EXAMPLES // 3, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 8))
def test_statistics_alone_are_those_of_the_loss(case: Case, top_k: int) -> None:
    vocab = case.weight_VH.shape[0]
    options: dict[str, Any] = {"bias_V": case.bias_V, "logit_scale": case.logit_scale, "softcap": case.softcap}
    if top_k > vocab:
        with pytest.raises(ValueError, match=rf"top_k in 1\.\.{vocab}"):
            token_statistics(case.hidden_NH, case.weight_VH, case.labels_N, top_k=top_k, **options)
        with pytest.raises(ValueError, match=rf"top_k in 1\.\.{vocab}"):
            replace(case, objective=SEDObjective(top_k=top_k), tau=0.5).head(case.leaves())
        return
    alone = token_statistics(case.hidden_NH, case.weight_VH, case.labels_N, top_k=top_k, **options)
    beside = replace(case, objective=SEDObjective(top_k=top_k), tau=0.5).head(case.leaves())
    for name in ("log_prob_N", "entropy_N", "topk_mass_N"):
        torch.testing.assert_close(getattr(alone, name), getattr(beside, name), rtol=0, atol=1e-12, msg=name)
    assert alone.topk_mass_N is not None
    assert ((alone.topk_mass_N >= 0) & (alone.topk_mass_N <= 1)).all()


@settings(max_examples=EXAMPLES // 3, deadline=None, derandomize=True)
@given(cases(), st.integers(1, 10))
def test_chunks_do_not_change_anything(case: Case, chunk_tokens: int) -> None:
    whole_leaves, leaves = case.leaves(), case.leaves()
    whole, chunked = replace(case, chunk_tokens=None).head(whole_leaves), replace(case, chunk_tokens=chunk_tokens).head(leaves)
    assert whole.active_N.equal(chunked.active_N)
    assert error(chunked.loss_N, whole.loss_N) <= 1e-13
    pairs = zip(torch.autograd.grad(chunked.loss, leaves), torch.autograd.grad(whole.loss, whole_leaves), strict=True)
    assert all(error(actual, wanted) <= 1e-13 for actual, wanted in pairs)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's own process")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_everything_here_holds_for_the_triton_rows_in_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert run.returncode == 0, run.stdout[-4000:]
    assert " passed" in run.stdout
