"""Weights gathered bucket by bucket from real DeepSpeed ranks, against the checkpoint of the same moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from sedsft.config import LoRAConfig
from services.training.adapters import add_adapters, merged_state
from services.training.export import WeightExport
from tests.services.tiny_llama import random_llama
from tests.services.training.rank_main import EXPORT_BUCKET_BYTES, Case
from tests.services.training.test_engine import run_ranks, save_model

pytestmark = pytest.mark.timeout(400)

LORA: dict[str, Any] = {"lora": {"rank": 4, "alpha": 8}}


class Open:
    """Parameters that are whole anyway; counts what was asked for."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, parameters: Any) -> Open:
        self.asked.append(len(parameters))
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_adapters_are_merged_on_the_way() -> None:
    model = random_llama(0)
    add_adapters(model, LoRAConfig(rank=4, alpha=8), seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    opened = Open()
    export = WeightExport(model, opened, 40_000)
    streamed = dict(export.stream())
    expected = merged_state(model, dict(model.named_parameters()))
    assert streamed.keys() == expected.keys() == dict(random_llama(0).named_parameters()).keys()
    assert all(torch.equal(streamed[name], expected[name]) for name in streamed)
    assert not torch.equal(
        streamed["model.layers.0.self_attn.q_proj.weight"], random_llama(0).model.layers[0].self_attn.q_proj.weight
    )
    # Three parameters for each of seven layers in four blocks, and ten others: nine norms and the embedding.
    assert sum(opened.asked) == 3 * 28 + 10
    assert export.as_in_files()


def test_experts_that_files_keep_apart_are_told() -> None:
    config = Qwen2MoeConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
    )
    assert not WeightExport(Qwen2MoeForCausalLM(config), Open(), 1 << 20).as_in_files()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_exported_is_what_a_checkpoint_keeps(tmp_path: Path, precision: str) -> None:
    paths = {"tied": save_model(tmp_path / "tied"), "untied": save_model(tmp_path / "untied", tied=False)}
    plain = [("tied", 0), ("tied", 1), ("tied", 2), ("tied", 3), ("untied", 3)]
    adapted = [("tied", 0), ("tied", 2), ("tied", 3)]
    cases = [
        Case(f"{tied}-z{stage}{suffix}", paths[tied], "export", stage, precision, micro_batch_size=2, grpo=grpo)
        for suffix, grpo, chosen in (("", {}, plain), ("-lora", LORA, adapted))
        for tied, stage in chosen
    ]
    start = {tied: load_file(Path(path) / "model.safetensors") for tied, path in paths.items()}
    for name, ranks in run_ranks(tmp_path, 2, cases).items():
        streamed, saved = (
            load_file(tmp_path / f"{name}.safetensors"),
            load_file(tmp_path / f"{name}-saved" / "model.safetensors"),
        )
        files = sorted((tmp_path / name).glob("*.safetensors"))
        exported = {key: tensor for file in files for key, tensor in load_file(file).items()}
        assert streamed.keys() == saved.keys() == exported.keys() == start[name.split("-")[0]].keys(), name
        assert all(torch.equal(saved[key], streamed[key]) and torch.equal(saved[key], exported[key]) for key in saved), name
        changed = [key for key in saved if not torch.equal(saved[key].float(), start[name.split("-")[0]][key].float())]
        assert any("q_proj" in key for key in changed), name
        # One file a bucket, in the order of the buckets, and nothing twice.
        index = json.loads((tmp_path / name / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        # Streamed twice.
        assert 2 * len(files) == len(ranks[0]["gathered"]) > 8
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.equal(model.state_dict()["model.norm.weight"], saved["model.norm.weight"])
        for record in ranks:
            assert max(record["gathered"]) <= EXPORT_BUCKET_BYTES
            assert record["names"] == ranks[0]["names"]
            assert record["as_in_files"]
            whole = sum(tensor.numel() for tensor in saved.values())
            assert (record["held"] < 0.1 * whole) == (name.split("-")[1] == "z3"), name
