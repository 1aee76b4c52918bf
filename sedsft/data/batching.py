"""Rows to ranks and to padded or packed micro-batches, and per-token results back to rows.

Shape suffixes: B rows of a padded micro-batch (1 of a packed one), T positions, N = B * T flat, R labelled tokens of one row.
Padding stands on the right, where causal rows never look, so that padded batches need no attention mask. Packed rows stand end
to end; their positions restart at 0, and the lengths of the rows tell attention where one ends.
Labels are shifted once, here: position t carries the label of token t + 1, so results at t speak about token t + 1.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from sedsft.records import Example, PolicyRow
from sedsft.vocabulary import IGNORED_LABEL


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Rows of one forward pass. `rows[i]` is the index, in the list the batch was made from, of its i-th row."""

    rows: tuple[int, ...]
    input_ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    row_lengths: tuple[int, ...] | None = None
    """Tokens of each packed row, in order, with B = 1; None in a padded batch."""

    @property
    def labels_N(self) -> torch.Tensor:
        """Labels in the order of flattened hidden states."""
        return self.labels_BT.flatten()

    @property
    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of the model's backbone. From the positions of packed rows transformers makes an attention mask
        that keeps them apart, but only where the pass keeps no cache."""
        if self.row_lengths is None:
            return {"input_ids": self.input_ids_BT, "use_cache": False}
        positions = torch.cat([torch.arange(length) for length in self.row_lengths])[None]
        return {"input_ids": self.input_ids_BT, "position_ids": positions.to(self.input_ids_BT.device), "use_cache": False}

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on `device`."""
        tensors: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self) if f.name.endswith("_BT")}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})

    @classmethod
    def empty(cls) -> Self:
        """A batch of one padding token without label: it costs a forward pass and adds exactly nothing.

        A rank that has run out of rows computes it so that its collectives match those of the other ranks.
        """
        ids_BT = torch.zeros(1, 1, dtype=torch.long)
        tensors: dict[str, Any] = {f.name: torch.zeros(1, 1) for f in fields(cls) if f.name.endswith("_BT")}
        return cls(rows=(), **{**tensors, "input_ids_BT": ids_BT, "labels_BT": ids_BT + IGNORED_LABEL})


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PolicyMicroBatch(MicroBatch):
    """A micro-batch of responses; its extra tensors are aligned with the labels and 0 where there is none."""

    advantage_BT: torch.Tensor
    sampler_log_prob_BT: torch.Tensor
    old_log_prob_BT: torch.Tensor | None = None
    reference_log_prob_BT: torch.Tensor | None = None
    """These two as in `PolicyRow`: None where the rows have none."""


def sft_micro_batches(examples: Sequence[Example], micro_batch_size: int) -> list[MicroBatch]:
    """Pad `examples` into batches of at most `micro_batch_size` rows, longest rows first to keep padding small."""
    batches = []
    for rows in _by_length([len(e.input_ids_T) for e in examples], micro_batch_size):
        chosen = [examples[row] for row in rows]
        labels = [np.where(e.trained_T, e.input_ids_T, IGNORED_LABEL)[1:] for e in chosen]
        batches.append(MicroBatch(rows, *_padded([e.input_ids_T for e in chosen], labels)))
    return batches


def packed_micro_batches(examples: Sequence[Example], pack_tokens: int) -> list[MicroBatch]:
    """Lay `examples` end to end in batches of shape [1, T <= pack_tokens]; no label crosses from one row into the next.

    Best-fit decreasing: the longest row first, each into the fullest batch that still has room for it.

    Raises:
        ValueError: a row has no token or more than `pack_tokens`.
    """
    return [
        _packed(rows, [examples[row] for row in rows]) for rows in _packs([len(e.input_ids_T) for e in examples], pack_tokens)
    ]


def balanced_shards(lengths: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Indices of rows of `lengths` tokens for each rank, ascending, with about the same number of tokens on all.

    Longest first, each row goes to the rank with the fewest tokens so far (the first of equals), so two ranks differ by at
    most the longest row. A pure function of its arguments.

    Raises:
        ValueError: `num_ranks` is less than 1.
    """
    if num_ranks < 1:
        raise ValueError(f"expected at least one rank, got {num_ranks}")
    shards: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for row in _longest_first(lengths):
        load, rank = loads[0]
        shards[rank].append(row)
        heapq.heapreplace(loads, (load + lengths[row], rank))
    return [sorted(shard) for shard in shards]


def policy_micro_batches(
    policy_rows: Sequence[PolicyRow], micro_batch_size: int, pack_tokens: int | None = None
) -> list[PolicyMicroBatch]:
    """Prompts with their responses, padded or packed; every response token is labelled and carries the response's advantage.

    Raises:
        ValueError: log-probabilities that some rows have and others lack, or as `packed_micro_batches`.
    """
    batches = []
    for plain in response_micro_batches(
        [(r.prompt_ids_T, r.response_ids_R) for r in policy_rows], micro_batch_size, pack_tokens
    ):
        chosen = [policy_rows[row] for row in plain.rows]
        tensors: dict[str, Any] = {
            "advantage_BT": _placed(plain, [np.full(len(r.response_ids_R), r.advantage, np.float32) for r in chosen]),
            "sampler_log_prob_BT": _placed(plain, [r.sampler_log_probs_R for r in chosen]),
            "old_log_prob_BT": _placed_if_any(plain, [r.old_log_probs_R for r in chosen]),
            "reference_log_prob_BT": _placed_if_any(plain, [r.reference_log_probs_R for r in chosen]),
        }
        inputs: dict[str, Any] = {f.name: getattr(plain, f.name) for f in fields(plain)}
        batches.append(PolicyMicroBatch(**inputs, **tensors))
    return batches


def response_micro_batches(
    sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]], micro_batch_size: int, pack_tokens: int | None = None
) -> list[MicroBatch]:
    """(prompt ids, response ids) pairs in batches of at most `micro_batch_size` rows or, with `pack_tokens`, laid end to end;
    every response token is labelled.

    Raises:
        ValueError: a pair lacks prompt or response, or as `packed_micro_batches`.
    """
    examples = [_response(np.asarray(prompt, np.int32), np.asarray(response, np.int32)) for prompt, response in sequences]
    if pack_tokens is None:
        return sft_micro_batches(examples, micro_batch_size)
    return packed_micro_batches(examples, pack_tokens)


def labelled_values(batch: MicroBatch, values_N: torch.Tensor) -> list[npt.NDArray[np.float32]]:
    """Split flat per-position values into one array per row, R long: its labelled tokens in order."""
    values_BT = values_N.detach().float().cpu().numpy().reshape(batch.labels_BT.shape)
    labelled_BT = (batch.labels_BT != IGNORED_LABEL).cpu().numpy()
    if batch.row_lengths is None:
        return [values_BT[b][labelled_BT[b]] for b in range(len(batch.rows))]
    borders = np.cumsum(batch.row_lengths)[:-1]
    rows = zip(np.split(values_BT[0], borders), np.split(labelled_BT[0], borders), strict=True)
    return [values_T[labelled_T] for values_T, labelled_T in rows]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    """Row indices, longest first; equal lengths keep their order."""
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def _by_length(lengths: Sequence[int], micro_batch_size: int) -> list[tuple[int, ...]]:
    """Row indices in chunks, longest first."""
    order = _longest_first(lengths)
    return [tuple(order[i : i + micro_batch_size]) for i in range(0, len(order), micro_batch_size)]


def _packs(lengths: Sequence[int], pack_tokens: int) -> list[list[int]]:
    """Row indices of each pack."""
    packs: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, pack), ascending
    for row in _longest_first(lengths):
        length = lengths[row]
        if not 1 <= length <= pack_tokens:
            raise ValueError(f"expected rows of 1 to pack_tokens={pack_tokens} tokens, got {length} in row {row}")
        at = bisect_left(rooms, (length, 0))
        if at == len(rooms):
            rooms.append((pack_tokens, len(packs)))
            packs.append([])
        free, pack = rooms.pop(at)
        packs[pack].append(row)
        insort(rooms, (free - length, pack))
    return packs


def _packed(rows: Sequence[int], chosen: Sequence[Example]) -> MicroBatch:
    ids = [e.input_ids_T.astype(np.int64) for e in chosen]
    labels = [np.append(np.where(e.trained_T, e.input_ids_T, IGNORED_LABEL)[1:], IGNORED_LABEL) for e in chosen]
    ids_BT, labels_BT = (torch.from_numpy(np.concatenate(parts)[None]).long() for parts in (ids, labels))
    return MicroBatch(tuple(rows), ids_BT, labels_BT, tuple(len(row) for row in ids))


def _response(prompt_T: npt.NDArray[np.int32], response_R: npt.NDArray[np.int32]) -> Example:
    """A prompt with its response as an example whose response is trained."""
    num_prompt, num_response = len(prompt_T), len(response_R)
    if not num_prompt or not num_response:
        raise ValueError(f"expected at least one prompt and one response token, got {num_prompt} and {num_response}")
    return Example(np.concatenate([prompt_T, response_R]), np.arange(num_prompt + num_response) >= num_prompt, line=0)


def _padded(
    rows: Sequence[npt.NDArray[np.integer]], labels: Sequence[npt.NDArray[np.integer]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, each [B, T] int64 with T the longest row. Padding has id 0 and no label."""
    num_positions = max(len(row) for row in rows)
    ids_BT = np.zeros((len(rows), num_positions), np.int64)
    labels_BT = np.full_like(ids_BT, IGNORED_LABEL)
    for b, (row, row_labels) in enumerate(zip(rows, labels, strict=True)):
        ids_BT[b, : len(row)] = row
        labels_BT[b, : len(row) - 1] = row_labels
    return torch.from_numpy(ids_BT), torch.from_numpy(labels_BT)


def _placed(batch: MicroBatch, values: Sequence[npt.NDArray[np.float32]]) -> torch.Tensor:
    """[B, T]: the rows' values, in order, where their labels stand."""
    labelled_BT = batch.labels_BT.numpy() != IGNORED_LABEL
    values_BT = np.zeros(labelled_BT.shape, np.float32)
    values_BT[labelled_BT] = np.concatenate(values)
    return torch.from_numpy(values_BT)


def _placed_if_any(batch: MicroBatch, values: Sequence[npt.NDArray[np.float32] | None]) -> torch.Tensor | None:
    given = [row for row in values if row is not None]
    if not given:
        return None
    if len(given) < len(values):
        raise ValueError(
            f"expected log-probabilities of all rows of a batch or of none, got those of {len(given)} of {len(values)}"
        )
    return _placed(batch, given)
