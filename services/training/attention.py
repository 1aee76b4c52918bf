"""Attention over packed rows without a mask: each row attends to itself alone, so the cost is the sum of the rows' squares,
not the square of their sum. Registered with transformers as `PACKED_ATTENTION`.

Legend: T positions of all rows of a pack, D width of an attention head, H hidden width; batches have B = 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sedsft.data.batching import MicroBatch
from services.errors import ModelError

PACKED_ATTENTION = "sedsft_packed"
_CHECKED_ROW = 4


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: Sequence[int] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of the rows that stand end to end; without `row_lengths` all positions are one row.

    Shapes: query, key and value [1, heads, T, D], T the sum of `row_lengths`; returns [1, T, heads, D].
    """
    if row_lengths is None or len(row_lengths) == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)  # type: ignore[no-any-return]
    lengths = list(row_lengths)
    rows = zip(*(torch.split(states, lengths, dim=2) for states in (query, key, value)), strict=True)
    return torch.cat([sdpa_attention_forward(module, *row, attention_mask, **options)[0] for row in rows], dim=1), None


def _no_mask(*_: Any, **__: Any) -> None:
    """What transformers asks for a mask: every row is causal and has no padding on its left, so none is needed."""


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)


def row_options(model: PreTrainedModel, batch: MicroBatch) -> dict[str, Any]:
    """What the model's backbone needs beside `batch.inputs`."""
    if model.config._attn_implementation != PACKED_ATTENTION:
        return {}
    return {"row_lengths": batch.row_lengths}


def prepare_packing(model: PreTrainedModel, longest_row: int) -> None:
    """Let `model` take packs of rows of up to `longest_row` tokens: by `packed_attention`, or by transformers' masks where the
    model keeps row lengths from its attention or has a sliding window shorter than a row.

    Raises:
        ModelError: rows see each other either way, as through recurrent, convolution and linear attention layers.
    """
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if window is None or window >= longest_row:
        usual = model.config._attn_implementation
        model.set_attn_implementation(PACKED_ATTENTION)
        if _rows_stay_apart(model):
            return
        model.set_attn_implementation(usual)
    if not _rows_stay_apart(model):
        raise ModelError(
            f"expected packed rows not to see each other in {type(model).__name__}, they do, since it has layers other than "
            "attention that mix tokens; leave out pack_tokens and set micro_batch_size"
        )


def _rows_stay_apart(model: PreTrainedModel) -> bool:
    """The gradient of one packed row's hidden states with respect to the other's embeddings is exactly 0."""
    embedded: list[torch.Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output_BTH: embedded.append(output_BTH))
    ids_BT = torch.arange(2 * _CHECKED_ROW, device=model.device)[None]
    batch = MicroBatch((0, 1), ids_BT, ids_BT, (_CHECKED_ROW, _CHECKED_ROW))
    model.eval()
    try:
        hidden_BTH = model.base_model(**batch.inputs, **row_options(model, batch)).last_hidden_state
    finally:
        hook.remove()
    second_TH = hidden_BTH[0, _CHECKED_ROW:]
    # No two weights alike: those that suit a norm would hide everything.
    weights_TH = torch.linspace(-1, 1, second_TH.numel(), dtype=second_TH.dtype, device=second_TH.device).view_as(second_TH)
    (gradient_BTH,) = torch.autograd.grad(second_TH, embedded[0], weights_TH)
    return not bool((gradient_BTH[0, :_CHECKED_ROW].abs() > 0).any())
