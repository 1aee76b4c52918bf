"""Real DeepSpeed ranks on gloo, one process each, against plain PyTorch in this process."""

from __future__ import annotations

import hashlib
import json
import math
import os
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from services.training.ranks import trainer_env
from tests.services.tiny_llama import random_llama, save_tokenizer
from tests.services.training.rank_main import OPTIMIZER, TAU, TEMPERATURE, Case, examples, policy_rows

ROOT = Path(__file__).parents[3]

# Two processes import torch, transformers and DeepSpeed for every test.
pytestmark = pytest.mark.timeout(400)


def save_model(folder: Path, *, tied: bool = True) -> str:
    """fp32 weights, so that fp32 cases do not start from rounded ones."""
    model = random_llama(0).float()
    if not tied:
        config = model.config
        config.tie_word_embeddings = False
        torch.manual_seed(1)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


def run_ranks(folder: Path, world_size: int, cases: list[Case]) -> dict[str, list[dict[str, Any]]]:
    """Run `cases` one after the other on `world_size` processes; what each rank recorded, by case."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    plan = {"port": port, "world_size": world_size, "cases": [asdict(case) for case in cases]}
    (folder / "plan.json").write_text(json.dumps(plan))
    env = {**os.environ, **trainer_env(gpu=False, threads=1), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("rank_main.py")), str(folder)]
    processes = [
        subprocess.Popen([*command, str(rank)], env=env, stderr=subprocess.PIPE, text=True) for rank in range(world_size)
    ]
    try:
        errors = [process.communicate(timeout=350)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world_size, "\n".join(e[-2000:] for e in errors)
    return {
        case.name: [json.loads((folder / f"{case.name}.rank{rank}.json").read_text()) for rank in range(world_size)]
        for case in cases
    }


def sed_loss_sum(model: LlamaForCausalLM, rows: int) -> Tensor:
    """Sum of SED losses of the rows by autograd on full logits, one row at a time, without padding."""
    total = torch.zeros(())
    for example in examples(rows):
        ids_T = torch.from_numpy(example.input_ids_T).long()
        log_probs_TV = model(input_ids=ids_T[None]).logits[0, :-1].float().log_softmax(-1)
        log_prob_T = log_probs_TV.gather(1, ids_T[1:, None])[:, 0]
        active_T = log_probs_TV.exp().topk(2).values.sum(1).detach() < TAU
        loss_T = -log_prob_T + active_T * (log_prob_T.exp() - 0.5) ** 2
        total = total + loss_T[torch.from_numpy(example.trained_T[1:])].sum()
    return total


def reference_gradients(model_path: str, rows: int) -> tuple[float, dict[str, Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    loss = sed_loss_sum(model, rows)
    (loss / sum(int(e.trained_T.sum()) for e in examples(rows))).backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def reference_training(model_path: str, steps: int, rows: int, dtype: torch.dtype) -> tuple[list[float], LlamaForCausalLM]:
    """Losses and the model after `steps` of torch's own AdamW with clipping, on fp32 master weights."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    masters = [torch.nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
    groups = [
        {"params": [p for p in masters if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
        {"params": [p for p in masters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=OPTIMIZER.betas)
    denominator = sum(int(e.trained_T.sum()) for e in examples(rows))
    losses = []
    # Warm-up of one step to half the peak, then a cosine over the remaining two: 1 and (1 + cos(pi / 2)) / 2.
    for rate in [0.5e-3, 1e-3, 0.5e-3][:steps]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.zero_grad()
        loss = sed_loss_sum(model, rows)
        (loss / denominator).backward()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            master.grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, OPTIMIZER.grad_clip)
        optimizer.step()
        for master, parameter in zip(masters, model.parameters(), strict=True):
            parameter.data.copy_(master)
        losses.append(loss.item())
    return losses, model


def assert_gradients(folder: Path, name: str, expected: dict[str, Tensor], rtol: float = 0.0) -> None:
    found = load_file(folder / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            found[parameter], gradient, rtol=rtol, atol=1e-6, msg=lambda m, p=parameter: f"{name} {p}: {m}"
        )


def gradient_case(name: str, model_path: str, zero_stage: int, micro_batch_size: int, rows: int) -> Case:
    return Case(name, model_path, "gradients", zero_stage, micro_batch_size=micro_batch_size, rows=rows)


def test_gradient_does_not_depend_on_ranks_and_micro_batches(tmp_path: Path, model_path: str) -> None:
    loss, expected = reference_gradients(model_path, rows=7)
    alone = [gradient_case("one", model_path, 0, 8, rows=7), gradient_case("four", model_path, 2, 2, rows=7)]
    found = run_ranks(tmp_path, 1, alone)
    assert [found[case.name][0]["micro_batches"] for case in alone] == [1, 4]
    two = [
        gradient_case("two", model_path, 2, 4, rows=7),
        gradient_case("uneven", model_path, 2, 1, rows=7),
        gradient_case("idle", model_path, 2, 4, rows=1),
        Case("packed", model_path, "gradients", 2, pack_tokens=24, rows=7),
    ]
    found |= run_ranks(tmp_path, 2, two)
    assert [rank["micro_batches"] for rank in found["uneven"]] == [4, 3]
    assert [rank["micro_batches"] for rank in found["idle"]] == [1, 0]
    assert [rank["micro_batches"] for rank in found["packed"]] == [2, 2]
    for name in ("one", "four", "two", "uneven", "packed"):
        assert sum(rank["loss"] for rank in found[name]) == pytest.approx(loss, rel=1e-6)
        assert_gradients(tmp_path, name, expected)
    assert_gradients(tmp_path, "idle", reference_gradients(model_path, rows=1)[1], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_zero_stages_train_alike_and_export(tmp_path: Path, tied: bool) -> None:
    path = save_model(tmp_path / "model", tied=tied)
    losses, reference = reference_training(path, 3, 7, torch.float32)
    cases = [Case(f"z{stage}", path, zero_stage=stage, micro_batch_size=2) for stage in range(4)]
    cases.append(Case("packed", path, zero_stage=3, pack_tokens=24))
    gradients = [gradient_case(f"g{stage}", path, stage, 2, rows=7) for stage in (0, 1, 3)]
    found = run_ranks(tmp_path, 2, [*cases, *gradients])
    expected = reference_gradients(path, rows=7)[1]
    for case in gradients:
        assert_gradients(tmp_path, case.name, expected)
    for case in cases:
        ranks = found[case.name]
        assert [sum(rank["steps"][i]["loss"] for rank in ranks) for i in range(3)] == pytest.approx(losses, rel=1e-5)
        assert ranks[0]["steps"][2]["grad_norm"] == pytest.approx(ranks[1]["steps"][2]["grad_norm"])
        assert ranks[1]["files"] == ["trainer/rank-1.safetensors"]
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(ranks[0]["files"])
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / case.name)
        assert exported.dtype == torch.float32
        assert ("lm_head.weight" in load_file(tmp_path / case.name / "model.safetensors")) is not tied
        assert len(AutoTokenizer.from_pretrained(tmp_path / case.name)) == 72
        ids_T = torch.from_numpy(examples(7)[0].input_ids_T).long()[None]
        with torch.no_grad():
            torch.testing.assert_close(exported(ids_T).logits, reference(ids_T).logits, rtol=0, atol=2e-3)
            probabilities_TV = exported(ids_T).logits[0].softmax(-1)
        inspected, active = ranks[0]["inspected"][0]
        assert len(active) == len(inspected) == ids_T.shape[1]
        for position, trained in enumerate(examples(7)[0].trained_T):
            if not trained:
                assert inspected[position] is None
                assert not active[position]
            else:
                probability = probabilities_TV[position - 1, ids_T[0, position]].item()
                assert inspected[position] == pytest.approx(probability, abs=1e-5)


@pytest.mark.slow
def test_bf16_stages_train_alike(tmp_path: Path, model_path: str) -> None:
    cases = [Case(f"z{stage}", model_path, zero_stage=stage, precision="bf16", micro_batch_size=2) for stage in range(4)]
    found = run_ranks(tmp_path, 2, cases)
    losses, _ = reference_training(model_path, 3, 7, torch.bfloat16)
    for case in cases:
        sums = [sum(rank["steps"][i]["loss"] for rank in found[case.name]) for i in range(3)]
        assert sums == pytest.approx(losses, rel=1e-2), case.name
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / case.name, dtype="auto")
        assert exported.dtype == torch.bfloat16


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("zero_stage", range(4))
def test_going_on_from_any_step_ends_in_the_same_weights(tmp_path: Path, precision: str, zero_stage: int) -> None:
    model = random_llama(0).float()
    model.config.attention_dropout = 0.2
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    case = Case("run", str(tmp_path / "model"), "resume", zero_stage, precision, micro_batch_size=1, rows=5)
    [compared, _] = [rank["compared"] for rank in run_ranks(tmp_path, 2, [case])["run"]]
    folder = tmp_path / "run"
    # Three epochs of five rows in batches of two, two and one.
    assert len(compared) == 2 * 9
    assert len({sha256(folder / str(step) / "model.safetensors") for step in range(1, 10)}) == 9
    for found, expected in compared:
        for name in ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors"):
            assert sha256(folder / found / name) == sha256(folder / expected / name), (found, expected, name)


@pytest.mark.slow
def test_recomputed_activations_give_the_same_gradients(tmp_path: Path, model_path: str) -> None:
    cases = [
        replace(gradient_case(f"z{stage}", model_path, stage, 2, rows=7), gradient_checkpointing=True) for stage in (0, 2, 3)
    ]
    run_ranks(tmp_path, 2, cases)
    expected = reference_gradients(model_path, rows=7)[1]
    for case in cases:
        assert_gradients(tmp_path, case.name, expected)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_skipped_step_leaves_no_trace(tmp_path: Path, model_path: str, precision: str) -> None:
    cases = [Case(f"z{stage}", model_path, "skip", stage, precision, micro_batch_size=1, steps=4) for stage in range(4)]
    found = run_ranks(tmp_path, 2, cases)
    for case in cases:
        for rank in found[case.name]:
            assert [math.isfinite(norm) for norm in rank["norms"]] == [True, False, False, True]
        folder = tmp_path / case.name
        for same in (("one", "loss", "gradient"), ("clean", "skipped", "resumed", "restarted")):
            for name in ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors"):
                assert len({sha256(folder / step / name) for step in same}) == 1, (case.name, same, name)
        assert sha256(folder / "one" / "model.safetensors") != sha256(folder / "clean" / "model.safetensors")


@pytest.mark.slow
def test_policy_update_against_autograd(tmp_path: Path, model_path: str) -> None:
    plain = {"tis_cap": None, "dual_clip": None}
    cases = [Case(f"z{stage}", model_path, "policy", stage, micro_batch_size=2, steps=1, grpo=plain) for stage in (2, 3)]
    found = run_ranks(tmp_path, 2, cases)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    rows = policy_rows(7)
    losses, gaps, clipped, tokens = torch.zeros(()), 0.0, 0, 0
    log_probs = []
    for row in rows:
        ids_T = torch.from_numpy(np.concatenate([row.prompt_ids_T, row.response_ids_R])).long()
        logits_RV = model(input_ids=ids_T[None]).logits[0, len(row.prompt_ids_T) - 1 : -1].float() / TEMPERATURE
        log_prob_R = logits_RV.log_softmax(-1).gather(1, ids_T[len(row.prompt_ids_T) :, None])[:, 0]
        old_R = torch.from_numpy(row.sampler_log_probs_R)
        ratio_R = (log_prob_R - old_R).exp()
        plain_R, bounded_R = ratio_R * row.advantage, ratio_R.clamp(0.8, 1.28) * row.advantage
        losses = losses - torch.minimum(plain_R, bounded_R).sum()
        clipped += int((bounded_R < plain_R).sum())
        gaps += float((log_prob_R - old_R).detach().abs().sum())
        tokens += len(old_R)
        log_probs.append(log_prob_R.detach().numpy())
    (losses / tokens).backward()
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]))
    for case in cases:
        ranks = found[case.name]
        assert ["expected a finite loss and gradient at optimizer step 1" in rank["diverged"] for rank in ranks] == [True, True]
        for rank, record in enumerate(ranks):
            for values, expected in zip(record["log_probs"], log_probs[rank::2], strict=True):
                np.testing.assert_allclose(values, expected, atol=1e-5)
        sums = {name: sum(record["steps"][0][name] for record in ranks) for name in ranks[0]["steps"][0]}
        assert sums["loss"] == pytest.approx(losses.item(), rel=1e-5)
        assert sums["logprob_gap"] == pytest.approx(gaps, rel=1e-5)
        assert (sums["clipped"], sums["tokens"]) == (clipped, tokens)
        assert ranks[0]["steps"][0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert_exported_weights_are_the_trained_ones(tmp_path / case.name, ranks[0]["log_probs_after"][0])


def assert_exported_weights_are_the_trained_ones(folder: Path, log_probs: list[float]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    row = policy_rows(7)[0]
    ids_T = torch.from_numpy(np.concatenate([row.prompt_ids_T, row.response_ids_R])).long()
    with torch.no_grad():
        logits_RV = model(input_ids=ids_T[None]).logits[0, len(row.prompt_ids_T) - 1 : -1] / TEMPERATURE
    expected = logits_RV.log_softmax(-1).gather(1, ids_T[len(row.prompt_ids_T) :, None])[:, 0]
    np.testing.assert_allclose(log_probs, expected, atol=1e-5)
