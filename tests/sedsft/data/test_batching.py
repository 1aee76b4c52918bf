from __future__ import annotations

import numpy as np
import pytest
import torch

from sedsft.data.batching import (
    MicroBatch,
    PolicyMicroBatch,
    labelled_values,
    policy_micro_batches,
    response_micro_batches,
    sft_micro_batches,
)
from sedsft.records import Example, PolicyRow
from sedsft.vocabulary import IGNORED_LABEL as IGNORED


def example(ids: list[int], trained: list[int]) -> Example:
    return Example(np.array(ids, np.int32), np.array(trained, bool), line=1)


def test_examples_are_padded_on_the_right_and_labels_shifted() -> None:
    short, long = example([5, 6, 7], [0, 0, 1]), example([1, 2, 3, 4], [0, 1, 0, 1])
    [batch] = sft_micro_batches([short, long], micro_batch_size=2)
    assert batch.rows == (1, 0)  # longest first
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch.labels_BT.tolist() == [[2, IGNORED, 4, IGNORED], [IGNORED, 7, IGNORED, IGNORED]]
    assert batch.labels_N.shape == (8,)
    assert {t.dtype for t in (batch.input_ids_BT, batch.labels_BT, batch.attention_mask_BT)} == {torch.int64}


def test_rows_of_like_length_share_a_batch() -> None:
    rows = [example([1] * n, [0] + [1] * (n - 1)) for n in (3, 9, 4, 10, 3)]
    batches = sft_micro_batches(rows, micro_batch_size=2)
    assert [b.rows for b in batches] == [(3, 1), (2, 0), (4,)]
    assert [b.input_ids_BT.shape for b in batches] == [(2, 10), (2, 4), (1, 3)]
    assert sum(int((b.labels_BT != IGNORED).sum()) for b in batches) == 8 + 9 + 3 + 2 + 2


def test_no_rows_make_no_batches() -> None:
    assert sft_micro_batches([], 4) == []


def policy_row(prompt: list[int], response: list[int], log_probs: list[float], advantage: float) -> PolicyRow:
    return PolicyRow(np.array(prompt, np.int32), np.array(response, np.int32), np.array(log_probs, np.float32), advantage)


def test_policy_values_stand_where_their_labels_stand() -> None:
    rows = [policy_row([1, 2], [3, 4, 5], [-0.5, -0.25, -2.0], 1.5), policy_row([1], [9], [-3.0], -1.0)]
    [batch] = policy_micro_batches(rows, micro_batch_size=8)
    assert batch.labels_BT.tolist() == [[IGNORED, 3, 4, 5, IGNORED], [9, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert batch.advantage_BT.tolist() == [[0, 1.5, 1.5, 1.5, 0], [-1, 0, 0, 0, 0]]
    assert batch.old_log_prob_BT.tolist() == [[0, -0.5, -0.25, -2.0, 0], [-3, 0, 0, 0, 0]]


def test_values_come_back_per_row() -> None:
    [batch] = response_micro_batches([([1, 2], [3, 4]), ((7,), (8,))], micro_batch_size=2)
    values = labelled_values(batch, torch.arange(8))
    assert [v.tolist() for v in values] == [[1, 2], [4]]


def test_a_response_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one prompt and one response token, got 2 and 0"):
        response_micro_batches([([1, 2], [])], 1)


@pytest.mark.parametrize("kind", [MicroBatch, PolicyMicroBatch])
def test_an_empty_batch_has_a_token_but_no_label(kind: type[MicroBatch]) -> None:
    batch = kind.empty()
    assert batch.rows == ()
    assert batch.input_ids_BT.shape == (1, 1)
    assert batch.attention_mask_BT.tolist() == [[1]]
    assert batch.labels_N.tolist() == [IGNORED]
    assert labelled_values(batch, torch.ones(1)) == []


def test_moving_keeps_rows_and_kind() -> None:
    [batch] = policy_micro_batches([policy_row([1], [2], [-1.0], 0.5)], 1)
    moved = batch.to(torch.device("meta"))
    assert moved.rows == (0,)
    assert moved.advantage_BT.device.type == moved.input_ids_BT.device.type == "meta"
