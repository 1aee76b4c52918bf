"""Adapters against a plain peft model: merged by hand, trained by DeepSpeed ranks, saved, gone on with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from sedsft.config import CEObjective, LoRAConfig
from sedsft.head import linear_objective_loss
from services.errors import ModelError
from services.training.adapters import add_adapters, merged_state, save_adapters
from tests.services.tiny_llama import random_llama
from tests.services.training.rank_main import OPTIMIZER, Case, examples
from tests.services.training.test_engine import assert_gradients, run_ranks, save_model, sed_loss_sum, sha256

LORA: dict[str, Any] = {"rank": 4, "alpha": 8}
SEED = 42
"""Of a job that names none."""
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
IDS_BT = torch.arange(1, 25).view(2, 12)

pytestmark = pytest.mark.timeout(400)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Not cast as a whole: the frequencies of its positions would be rounded, which a folder does not keep."""
    source = random_llama(0)
    model = LlamaForCausalLM._from_config(source.config, dtype=dtype)
    model.load_state_dict(source.state_dict())
    return model.eval()


@torch.no_grad()
def randomise(model: PreTrainedModel) -> None:
    """Adapters that do something: B is zero where they start."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.normal_(std=0.1)


def trained_names(model: PreTrainedModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(IDS_BT).logits.float()


def plain_peft(path: str, **settings: Any) -> PeftModel:
    """The adapters that `LORA` describes, as peft alone makes them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(SEED)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **settings))


# ------------------------------------------------------------------------------------------------- in one process


def test_a_merge_by_hand() -> None:
    model = llama()
    add_adapters(model, LoRAConfig(rank=2, alpha=6, target_modules=("layers.1.self_attn.q_proj",)), seed=0)
    name = "model.layers.1.self_attn.q_proj"
    layer = model.get_submodule(name)
    with torch.no_grad():
        for matrix in (layer.base_layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight):
            matrix.zero_()
        layer.base_layer.weight[5, 7] = 0.5
        layer.lora_A.default.weight[:, 7] = torch.tensor([1.0, 2.0])
        layer.lora_B.default.weight[5] = torch.tensor([10.0, -1.0])
    state = model.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    merged = merged_state(model, state)
    # 0.5 + 6 / 2 * (10 * 1 - 1 * 2)
    assert merged[f"{name}.weight"][5, 7] == 24.5
    assert merged[f"{name}.weight"].count_nonzero() == 1
    assert merged.keys() == llama().state_dict().keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merged_model_computes_what_the_adapted_one_does(dtype: torch.dtype, tmp_path: Path) -> None:
    model = llama(dtype)
    add_adapters(model, LoRAConfig(**LORA), seed=0)
    assert torch.equal(logits(model), logits(llama(dtype)))
    randomise(model)
    model.save_pretrained(tmp_path, state_dict=merged_state(model, model.state_dict()))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert plain.dtype == dtype
    expected_BTV = logits(model)
    assert (expected_BTV - logits(llama())).abs().max() > 0.5
    # In bf16 the merged weights are rounded once more.
    bound = 1e-4 if dtype == torch.float32 else 0.05 * float(expected_BTV.abs().max())
    torch.testing.assert_close(logits(plain), expected_BTV, rtol=0, atol=bound)


def test_layers_that_keep_their_weight_transposed() -> None:
    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=72, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(settings)
    add_adapters(model, LoRAConfig(**LORA), seed=0)
    assert {name.split(".")[-4] for name in trained_names(model)} == {"c_attn", "c_proj", "c_fc"}
    randomise(model)
    plain = GPT2LMHeadModel(settings)
    plain.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(logits(plain), logits(model))


def test_peft_reads_the_adapters(tmp_path: Path) -> None:
    model = llama()
    add_adapters(model, LoRAConfig(**LORA, dropout=0.25, target_modules=("q_proj", "up_proj")), seed=0)
    randomise(model)
    save_adapters(model, model.state_dict(), tmp_path)
    adapted = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(adapted), logits(model))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 8, 0.25)
    assert settings["inference_mode"] is True
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * 2 * 4


def test_only_adapters_train_and_they_come_from_the_seed() -> None:
    first, second, other = llama(), llama(), llama()
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    add_adapters(first, LoRAConfig(**LORA), seed=7)
    assert torch.equal(torch.rand(1), expected)
    add_adapters(second, LoRAConfig(**LORA), seed=7)
    add_adapters(other, LoRAConfig(**LORA), seed=8)
    a = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first.get_parameter(a), second.get_parameter(a))
    assert not torch.equal(first.get_parameter(a), other.get_parameter(a))
    assert {name.split(".")[-4] for name in trained_names(first)} == LINEAR
    assert all(".lora_" in name for name in trained_names(first))
    # Seven matrices in four blocks, each with A and B.
    assert len(trained_names(first)) == 7 * 4 * 2


@pytest.mark.parametrize("name", ["lm_head", "query", "proj", "embed_tokens", "q_proj.weight"])
def test_names_of_nothing_that_can_be_adapted_are_refused(name: str) -> None:
    with pytest.raises(ModelError, match=f"got {name}; these exist: down_proj, gate_proj, k_proj, o_proj, q_proj"):
        add_adapters(llama(), LoRAConfig(target_modules=("q_proj", name)), seed=0)


@pytest.mark.parametrize("names", [(), ("",), ("q_proj", "q_proj")])
def test_settings_that_would_do_nothing_are_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError):
        LoRAConfig(target_modules=names)
    assert LoRAConfig.model_validate_json('{"target_modules": ["q_proj"]}').target_modules == ("q_proj",)


def test_a_frozen_head_costs_no_gradient_of_its_weight() -> None:
    torch.manual_seed(0)
    # The counter does not see the product in place that fp32 makes.
    hidden_NH, weight_VH = torch.randn(8, 16, dtype=torch.bfloat16), torch.randn(72, 16, dtype=torch.bfloat16)
    labels_N = torch.arange(8)
    gradients, flops = [], []
    for trained in (True, False):
        hidden_NH = hidden_NH.detach().requires_grad_()
        weight_VH = weight_VH.detach().requires_grad_(trained)
        with FlopCounterMode(display=False) as counter:
            linear_objective_loss(hidden_NH, weight_VH, labels_N, CEObjective(), denominator=8).loss.backward()
        gradients.append(hidden_NH.grad)
        flops.append(counter.get_total_flops())
    assert weight_VH.grad is None
    assert torch.equal(gradients[0], gradients[1])
    # One product of [8, 16] and [16, 72] less.
    assert flops[0] - flops[1] == 2 * 8 * 16 * 72


# ---------------------------------------------------------------------------------------------- by DeepSpeed ranks


def lora_case(name: str, path: str, zero_stage: int, **settings: Any) -> Case:
    return Case(name, path, zero_stage=zero_stage, **{"micro_batch_size": 2, "lora": LORA, **settings})


def reference_training(path: str) -> tuple[list[float], PeftModel]:
    """Losses and the peft model after three steps of torch's own AdamW with clipping."""
    model = plain_peft(path)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay)
    denominator = sum(int(e.trained_T.sum()) for e in examples(7))
    losses = []
    for rate in (0.5e-3, 1e-3, 0.5e-3):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        loss = sed_loss_sum(model, 7)
        (loss / denominator).backward()
        torch.nn.utils.clip_grad_norm_(parameters, OPTIMIZER.grad_clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, model


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_zero_stages_train_as_plain_peft_does_and_export(tmp_path: Path, tied: bool) -> None:
    path = save_model(tmp_path / "model", tied=tied)
    losses, reference = reference_training(path)
    cases = [lora_case(f"z{stage}", path, stage) for stage in (range(4) if tied else (0, 3))]
    cases.append(lora_case("packed", path, 3, pack_tokens=24, micro_batch_size=8))
    found = run_ranks(tmp_path, 2, cases)
    base = load_file(tmp_path / "model" / "model.safetensors")
    for case in cases:
        ranks, folder = found[case.name], tmp_path / case.name
        assert [sum(rank["steps"][i]["loss"] for rank in ranks) for i in range(3)] == pytest.approx(losses, rel=1e-5)
        written = set(ranks[0]["files"])
        assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors"} <= written
        merged = load_file(folder / "model.safetensors")
        assert merged.keys() == base.keys()
        assert json.loads((folder / "config.json").read_text()) == json.loads((Path(path) / "config.json").read_text())
        changed = {name.split(".")[-2] for name, weight in merged.items() if not torch.equal(weight, base[name])}
        assert changed == LINEAR
        exported = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(exported), logits(reference), rtol=0, atol=2e-3)
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), folder / "adapter")
        torch.testing.assert_close(logits(adapted), logits(exported), rtol=0, atol=1e-4)
        states = [load_file(folder / "trainer" / f"rank-{rank}.safetensors") for rank in range(2)]
        masters = [sum(v.numel() for k, v in state.items() if k.startswith("master.")) for state in states]
        numel = sum(p.numel() for p in reference.parameters() if p.requires_grad)
        # Partitions are padded to equal lengths.
        expected = [numel, numel] if case.zero_stage == 0 else [numel // 2, numel // 2]
        assert masters == pytest.approx(expected, rel=0.01)
        assert all(v.dtype == torch.float32 for state in states for k, v in state.items() if not k.startswith("rng"))


@pytest.mark.slow
def test_gradients_are_those_of_plain_peft(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    model = plain_peft(path)
    (sed_loss_sum(model, 7) / sum(int(e.trained_T.sum()) for e in examples(7))).backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    cases = [lora_case(f"g{stage}", path, stage, kind="gradients") for stage in (0, 2, 3)]
    cases += [replace(case, name=f"{case.name}-recomputed", gradient_checkpointing=True) for case in cases]
    run_ranks(tmp_path, 1, cases)
    for case in cases:
        assert_gradients(tmp_path, case.name, expected)


@pytest.mark.slow
def test_bf16_stages_train_alike(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    losses, reference = reference_training(path)
    cases = [lora_case(f"z{stage}", path, stage, precision="bf16", gradient_checkpointing=stage == 2) for stage in range(4)]
    found = run_ranks(tmp_path, 2, cases)
    for case in cases:
        sums = [sum(rank["steps"][i]["loss"] for rank in found[case.name]) for i in range(3)]
        assert sums == pytest.approx(losses, rel=2e-2), case.name
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / case.name, dtype="auto")
        assert exported.dtype == torch.bfloat16
        expected_BTV = logits(reference)
        torch.testing.assert_close(logits(exported), expected_BTV, rtol=0, atol=0.05 * float(expected_BTV.abs().max()))


@pytest.mark.slow
def test_dropout_comes_from_the_seed_and_ends_with_training(tmp_path: Path) -> None:
    path = save_model(tmp_path / "model")
    wet = lora_case("wet", path, 2, lora=LORA | {"dropout": 0.5})
    found = run_ranks(tmp_path, 2, [wet, replace(wet, name="again"), lora_case("dry", path, 2)])
    steps = {name: [[figures["loss"] for figures in rank["steps"]] for rank in ranks] for name, ranks in found.items()}
    assert steps["wet"] == steps["again"]
    # While B is zero nothing shows.
    assert [rank[0] for rank in steps["wet"]] == pytest.approx([rank[0] for rank in steps["dry"]])
    assert steps["wet"][0][2] != pytest.approx(steps["dry"][0][2], rel=1e-6)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "wet")
    example = examples(7)[0]
    ids_T = torch.from_numpy(example.input_ids_T).long()
    with torch.no_grad():
        prob_T = exported(ids_T[None]).logits[0, :-1].softmax(-1).gather(1, ids_T[1:, None])[:, 0]
    inspected, _ = found["wet"][0]["inspected"][0]
    assert [p for p in inspected if p is not None] == pytest.approx(prob_T[example.trained_T[1:]].tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("zero_stage", "precision"), [*((stage, "bf16") for stage in range(4)), (0, "fp32"), (3, "fp32")])
def test_going_on_from_any_step_ends_in_the_same_weights(tmp_path: Path, zero_stage: int, precision: str) -> None:
    path = save_model(tmp_path / "model")
    case = lora_case(
        "run", path, zero_stage, kind="resume", precision=precision, micro_batch_size=1, rows=3, lora=LORA | {"dropout": 0.3}
    )
    compared, folder = run_ranks(tmp_path, 2, [case])["run"][0]["compared"], tmp_path / "run"
    # Three epochs of three rows in batches of two and one; the second leaves a rank without rows.
    assert len(compared) == 2 * 6
    assert len({sha256(folder / str(step) / "model.safetensors") for step in range(1, 7)}) == 6
    files = (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "trainer/rank-0.safetensors",
        "trainer/rank-1.safetensors",
    )
    for found, expected in compared:
        for name in files:
            assert sha256(folder / found / name) == sha256(folder / expected / name), (found, expected, name)
