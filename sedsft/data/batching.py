"""Rows to padded micro-batches, and per-token results back to rows.

Shape suffixes: B rows of a micro-batch, T positions (padded on the right), N = B * T flat, R labelled tokens of one row.
Labels are shifted once, here: position t carries the label of token t + 1, so results at t speak about token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import numpy.typing as npt
import torch

from sedsft.records import Example, PolicyRow
from sedsft.vocabulary import IGNORED_LABEL


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Rows of one forward pass. `rows[b]` is the index, in the list the batch was made from, of row b."""

    rows: tuple[int, ...]
    input_ids_BT: torch.Tensor
    attention_mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    labels_BT: torch.Tensor

    @property
    def labels_N(self) -> torch.Tensor:
        """Labels in the order of flattened hidden states."""
        return self.labels_BT.flatten()

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`."""
        tensors = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name.endswith("_BT")}
        return replace(self, **tensors)

    @classmethod
    def empty(cls) -> Self:
        """A batch of one padding token without label: it costs a forward pass and adds exactly nothing.

        A rank that has run out of rows computes it so that its collectives match those of the other ranks.
        """
        zero_BT = torch.zeros(1, 1, dtype=torch.long)
        tensors = {f.name: torch.zeros(1, 1) for f in fields(cls) if f.name.endswith("_BT")}
        tensors |= {"input_ids_BT": zero_BT, "position_ids_BT": zero_BT, "attention_mask_BT": zero_BT + 1}
        return cls(rows=(), **{**tensors, "labels_BT": zero_BT + IGNORED_LABEL})


@dataclass(frozen=True, slots=True, eq=False)
class PolicyMicroBatch(MicroBatch):
    """A micro-batch of responses; both extra tensors are aligned with the labels and 0 where there is none."""

    advantage_BT: torch.Tensor
    old_log_prob_BT: torch.Tensor


def sft_micro_batches(examples: Sequence[Example], micro_batch_size: int) -> list[MicroBatch]:
    """Pad `examples` into batches of at most `micro_batch_size` rows, longest rows first to keep padding small."""
    batches = []
    for rows in _by_length([len(e.input_ids_T) for e in examples], micro_batch_size):
        chosen = [examples[row] for row in rows]
        labels = [np.where(e.trained_T, e.input_ids_T, IGNORED_LABEL)[1:] for e in chosen]
        batches.append(MicroBatch(rows, *_padded([e.input_ids_T for e in chosen], labels)))
    return batches


def policy_micro_batches(policy_rows: Sequence[PolicyRow], micro_batch_size: int) -> list[PolicyMicroBatch]:
    """Pad prompts with their responses; every response token is labelled and carries the response's advantage."""
    batches = []
    for rows in _by_length([len(r.prompt_ids_T) + len(r.response_ids_R) for r in policy_rows], micro_batch_size):
        chosen = [policy_rows[row] for row in rows]
        tensors = _responses([(r.prompt_ids_T, r.response_ids_R) for r in chosen])
        num_positions = tensors[0].shape[1]
        starts = [len(r.prompt_ids_T) - 1 for r in chosen]
        advantages = [np.full(len(r.response_ids_R), r.advantage, np.float32) for r in chosen]
        old_log_probs = [r.sampler_log_probs_R for r in chosen]
        floats = (_placed(values, starts, num_positions) for values in (advantages, old_log_probs))
        batches.append(PolicyMicroBatch(rows, *tensors, *floats))
    return batches


def response_micro_batches(sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]], micro_batch_size: int) -> list[MicroBatch]:
    """Pad (prompt ids, response ids) pairs; every response token is labelled."""
    pairs = [(np.asarray(prompt, np.int64), np.asarray(response, np.int64)) for prompt, response in sequences]
    chunks = _by_length([len(prompt) + len(response) for prompt, response in pairs], micro_batch_size)
    return [MicroBatch(rows, *_responses([pairs[row] for row in rows])) for rows in chunks]


def labelled_values(batch: MicroBatch, values_N: torch.Tensor) -> list[npt.NDArray[np.float32]]:
    """Split flat per-position values into one array per row, R long: its labelled tokens in order."""
    values_BT = values_N.detach().float().cpu().numpy().reshape(batch.labels_BT.shape)
    labelled_BT = (batch.labels_BT != IGNORED_LABEL).cpu().numpy()
    return [values_BT[b][labelled_BT[b]] for b in range(len(batch.rows))]


def _by_length(lengths: Sequence[int], micro_batch_size: int) -> list[tuple[int, ...]]:
    """Row indices in chunks, longest first; equal lengths keep their order."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [tuple(order[i : i + micro_batch_size]) for i in range(0, len(order), micro_batch_size)]


def _responses(pairs: Sequence[tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]]) -> tuple[torch.Tensor, ...]:
    labels = []
    for prompt, response in pairs:
        if not len(prompt) or not len(response):
            raise ValueError(f"expected at least one prompt and one response token, got {len(prompt)} and {len(response)}")
        labels.append(np.concatenate([np.full(len(prompt) - 1, IGNORED_LABEL), response]))
    return _padded([np.concatenate(pair) for pair in pairs], labels)


def _padded(
    rows: Sequence[npt.NDArray[np.integer]], labels: Sequence[npt.NDArray[np.integer]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask, positions and labels, each [B, T] int64 with T the longest row.

    Padding has id 0, position 0, no attention and no label; as it stands on the right, causal rows never see it.
    """
    num_positions = max(len(row) for row in rows)
    ids_BT = np.zeros((len(rows), num_positions), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    labels_BT = np.full_like(ids_BT, IGNORED_LABEL)
    for b, (row, row_labels) in enumerate(zip(rows, labels, strict=True)):
        ids_BT[b, : len(row)] = row
        mask_BT[b, : len(row)] = 1
        labels_BT[b, : len(row) - 1] = row_labels
    positions_BT = np.arange(num_positions) * mask_BT
    return tuple(torch.from_numpy(a) for a in (ids_BT, mask_BT, positions_BT, labels_BT))  # type: ignore[return-value]


def _placed(rows: Sequence[npt.NDArray[np.float32]], starts: Sequence[int], num_positions: int) -> torch.Tensor:
    values_BT = np.zeros((len(rows), num_positions), np.float32)
    for b, (row, start) in enumerate(zip(rows, starts, strict=True)):
        values_BT[b, start : start + len(row)] = row
    return torch.from_numpy(values_BT)
