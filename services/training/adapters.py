"""Low-rank adapters on a model that is otherwise frozen, and the plain model that the two make together.

An adapted layer computes W x + scale * B A x with scale = alpha / rank. Shape suffixes: O outputs, I inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sedsft.config import LoRAConfig
from services.errors import ModelError

ADAPTER_FOLDER = "adapter"
"""Where a model folder keeps the adapters that its weights already contain, in peft's format."""

_NAME = "default"


def add_adapters(model: PreTrainedModel, config: LoRAConfig, seed: int) -> None:
    """Freeze `model` and put adapters that change nothing yet (B = 0) on the layers that `config` names.

    A is drawn from `seed` alone, so that it is the same on all ranks; the process's random generator stays as it is.

    Raises:
        ModelError: a name fits no layer that can have adapters; the message lists those that exist.
    """
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=_targets(model, config),
        task_type="CAUSAL_LM",
        base_model_name_or_path=model.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(settings, model, _NAME)


@torch.no_grad()
def merged_state(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dictionary of the plain model that computes what `model`, with its adapters and the weights `state`, does.

    `state` and the model are left as they are.
    """
    return {name: merged(model, name, [state[part] for part in parts]) for name, parts in plain_parts(model, state).items()}


def plain_parts(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every tensor of the plain model with those among `names` that make it: itself, or W, A and B of an adapted layer."""
    adapted = {f"{name}.base_layer.weight": name for name in _adapted(model)}

    def parts(name: str) -> tuple[str, ...]:
        if name not in adapted:
            return (name,)
        return name, *(f"{adapted[name]}.{part}.{_NAME}.weight" for part in ("lora_A", "lora_B"))

    return {name.replace(".base_layer.", "."): parts(name) for name in names if not _is_adapter(name)}


@torch.no_grad()
def merged(model: PreTrainedModel, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor `name` of the plain model from its parts, one or three: itself, or

    W_OI + scale * B_OR A_RI     in fp32, then rounded to the dtype of W
    """
    if len(parts) == 1:
        return parts[0]
    weight, a_RI, b_OR = parts
    layer = model.get_submodule(name.removesuffix(".weight"))
    delta = layer.scaling[_NAME] * (b_OR.float() @ a_RI.float())
    # GPT-2's layers keep [I, O].
    sum_OI: torch.Tensor = weight.float() + (delta.T if layer.fan_in_fan_out else delta)
    return sum_OI.to(weight.dtype)


def save_adapters(model: PreTrainedModel, state: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapters among the weights `state` as `PeftModel.from_pretrained` reads them."""
    adapters = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": weight for name, weight in state.items() if _is_adapter(name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapters, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    replace(model.peft_config[_NAME], inference_mode=True).save_pretrained(folder)


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _adapted(model: PreTrainedModel) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _targets(model: PreTrainedModel, config: LoRAConfig) -> list[str]:
    """Full names of the layers to adapt."""
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D) and module is not head]
    # A name is the end of a full name, from a dot on; the empty one is the end of all.
    endings = [""] if config.target_modules == "all-linear" else [f".{name}" for name in config.target_modules]
    chosen = {ending: {layer for layer in linear if f".{layer}".endswith(ending)} for ending in endings}
    if missing := [ending[1:] or "all-linear" for ending, layers in chosen.items() if not layers]:
        known = ", ".join(sorted({layer.rpartition(".")[2] for layer in linear})) or "none"
        raise ModelError(
            f"expected linear layers of {type(model).__name__} in lora.target_modules, its output head excepted, got "
            f"{', '.join(missing)}; these exist: {known}"
        )
    return sorted(set().union(*chosen.values()))
