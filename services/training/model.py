"""Opening a model folder, and its last layer taken apart for the chunked head. N tokens, H hidden width, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from services.errors import ModelError


@dataclass(frozen=True)
class LinearHead:
    """The model's last layer: logits = logit_scale * cap(hidden @ weight.T + bias), cap(x) = softcap * tanh(x / softcap)."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    logit_scale: float
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """Everything but the weight, as the keyword arguments of `sedsft.head`."""
        return {"bias_V": self.bias_V, "logit_scale": self.logit_scale, "softcap": self.softcap}

    def at_temperature(self, temperature: float) -> LinearHead:
        """The head whose softmax is that of sampling at `temperature`."""
        return replace(self, logit_scale=self.logit_scale / temperature)


def open_model(path: str, dtype: torch.dtype) -> PreTrainedModel:
    """A causal language model from a local folder: safetensors only, no remote code.

    Raises:
        ModelError: the folder cannot be opened as such, or `linear_head` would not give the model's own logits.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"expected a model folder with config.json and safetensors weights at {path}, got: {error}. "
            "Give a folder that AutoModelForCausalLM.from_pretrained opens without remote code"
        ) from error
    _check_head(model)
    return model


def linear_head(model: PreTrainedModel) -> LinearHead:
    """The last layer with what Cohere (`logit_scale`), Granite (`logits_scaling`) and Gemma (soft cap) do to its output."""
    config = model.config
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    output = model.get_output_embeddings()
    return LinearHead(output.weight, getattr(output, "bias", None), scale, getattr(config, "final_logit_softcapping", None))


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    """Compare the logits of `linear_head` with the model's own on a few tokens; other architectures do other things."""
    head = linear_head(model)
    ids_BT = torch.arange(4)[None]
    model.eval()
    expected_BTV = model(input_ids=ids_BT, use_cache=False).logits.float()
    hidden_BTH = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    logits_BTV = functional.linear(hidden_BTH, head.weight_VH, head.bias_V).float()
    if head.softcap is not None:
        logits_BTV = head.softcap * torch.tanh(logits_BTV / head.softcap)
    gap = float((logits_BTV * head.logit_scale - expected_BTV).abs().max())
    # False for weights that are not finite: the first training step names those.
    if gap > 1e-2 * float(expected_BTV.abs().max()):
        raise ModelError(
            f"expected the logits of {type(model).__name__} to be its last layer with logit scale {head.logit_scale} and "
            f"soft cap {head.softcap}, they differ by {gap:.3g}; this architecture is not supported for training"
        )
