"""Packed rows and attention. Legend: H hidden width, T positions of a pack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
)

from sedsft.data.batching import packed_micro_batches
from sedsft.records import Example
from services.errors import ModelError
from services.training.attention import PACKED_ATTENTION, prepare_packing, row_options

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SMALL: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.02,
}
ROWS = [Example(np.arange(1, 1 + n, dtype=np.int32), np.ones(n, bool), line=1) for n in (7, 3, 1, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL),
        Gemma2Config(**SMALL, sliding_window=2),
        GPT2Config(vocab_size=72, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
        Qwen3MoeConfig(**SMALL, **EXPERTS),
    ],
    ids=lambda config: config.model_type,
)
def test_attention_alone_keeps_packed_rows_apart(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    prepare_packing(AutoModelForCausalLM.from_config(config, dtype=dtype), longest_row=8)


@pytest.mark.parametrize(
    ("config", "attention"),
    [
        (LlamaConfig(**SMALL), PACKED_ATTENTION),
        (Gemma2Config(**SMALL, sliding_window=7), PACKED_ATTENTION),
        (Gemma2Config(**SMALL, sliding_window=2), "sdpa"),
        (GPT2Config(vocab_size=72, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2), PACKED_ATTENTION),
        (Qwen3MoeConfig(**SMALL, **EXPERTS), PACKED_ATTENTION),
    ],
)
def test_packed_rows_have_the_hidden_states_and_gradients_of_single_rows(config: PreTrainedConfig, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    alone_TH = [model.base_model(**b.inputs).last_hidden_state[0] for row in ROWS for b in packed_micro_batches([row], 7)]
    sum(hidden_TH.square().sum() for hidden_TH in alone_TH).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    model.zero_grad()
    prepare_packing(model, longest_row=7)
    model.eval()
    assert model.config._attn_implementation == attention
    [pack] = packed_micro_batches(ROWS, 16)
    hidden_TH = model.base_model(**pack.inputs, **row_options(model, pack)).last_hidden_state[0]
    hidden_TH.square().sum().backward()
    torch.testing.assert_close(hidden_TH, torch.cat([alone_TH[row] for row in pack.rows]), rtol=1e-4, atol=1e-5)
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * largest)


def test_a_saved_model_does_not_name_this_attention(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    prepare_packing(model, longest_row=8)
    model.save_pretrained(tmp_path)
    assert PACKED_ATTENTION not in (tmp_path / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path)._attn_implementation != PACKED_ATTENTION


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        Qwen3NextConfig(
            **SMALL,
            **EXPERTS,
            shared_expert_intermediate_size=16,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        FalconH1Config(
            **SMALL, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=8
        ),
        Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
        RecurrentGemmaConfig(
            vocab_size=72,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=2,
            lru_width=32,
            attention_window_size=8,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_layers_that_mix_packed_rows_are_refused(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    # As small as random weights leave it, the gradient from row to row is not zero.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with pytest.raises(ModelError, match=f"expected packed rows not to see each other in {type(model).__name__}, they do"):
        prepare_packing(model, longest_row=8)
