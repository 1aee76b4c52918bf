from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    HyperCLOVAXConfig,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
)

from services.errors import ModelError
from services.training.model import linear_head, open_model

TINY: dict[str, Any] = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.3,
}


def save(folder: Path, config: PreTrainedConfig) -> str:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (LlamaConfig(**TINY), 1.0, None),
        (CohereConfig(**TINY, logit_scale=0.25), 0.25, None),
        (GraniteConfig(**TINY, logits_scaling=8.0), 0.125, None),
        (Gemma2Config(**TINY, final_logit_softcapping=5.0), 1.0, 5.0),
    ],
)
def test_the_last_layer_of_an_architecture_is_known(
    tmp_path: Path, config: PreTrainedConfig, scale: float, softcap: float | None
) -> None:
    head = linear_head(open_model(save(tmp_path, config), torch.float32))
    assert (head.logit_scale, head.softcap) == (scale, softcap)
    assert head.weight_VH.shape == (72, 32)
    assert head.at_temperature(0.5).options == {"bias_V": None, "logit_scale": 2 * scale, "softcap": softcap}


def test_an_architecture_with_another_last_layer_is_refused(tmp_path: Path) -> None:
    # It multiplies by what Granite divides by.
    path = save(tmp_path, HyperCLOVAXConfig(**TINY, logits_scaling=8.0))
    with pytest.raises(ModelError, match="expected the logits of HyperCLOVAXForCausalLM to be its last layer"):
        open_model(path, torch.float32)


def test_a_folder_without_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a model folder"):
        open_model(str(tmp_path), torch.float32)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, LlamaConfig(**TINY))
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        open_model(path, torch.float32)


def test_a_model_without_attention_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, MambaConfig(vocab_size=72, hidden_size=32, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match="scaled_dot_product_attention"):
        open_model(path, torch.float32)
