from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from sedsft.config import SEDObjective
from sedsft.data.batching import (
    MicroBatch,
    PolicyMicroBatch,
    balanced_shards,
    labelled_values,
    packed_micro_batches,
    policy_micro_batches,
    response_micro_batches,
    sft_micro_batches,
)
from sedsft.head import linear_objective_loss
from sedsft.records import Example, PolicyRow
from sedsft.tasks.tiny_model import countdown_model
from sedsft.vocabulary import IGNORED_LABEL as IGNORED


def example(ids: list[int], trained: list[int]) -> Example:
    return Example(np.array(ids, np.int32), np.array(trained, bool), line=1)


def test_examples_are_padded_on_the_right_and_labels_shifted() -> None:
    short, long = example([5, 6, 7], [0, 0, 1]), example([1, 2, 3, 4], [0, 1, 0, 1])
    [batch] = sft_micro_batches([short, long], micro_batch_size=2)
    assert batch.rows == (1, 0)  # longest first
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4], [5, 6, 7, 0]]
    assert batch.inputs.keys() == {"input_ids", "use_cache"}
    assert batch.labels_BT.tolist() == [[2, IGNORED, 4, IGNORED], [IGNORED, 7, IGNORED, IGNORED]]
    assert batch.labels_N.shape == (8,)
    assert {t.dtype for t in (batch.input_ids_BT, batch.labels_BT)} == {torch.int64}


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
    assert batch.sampler_log_prob_BT.tolist() == [[0, -0.5, -0.25, -2.0, 0], [-3, 0, 0, 0, 0]]
    assert batch.old_log_prob_BT is batch.reference_log_prob_BT is None


def test_policy_values_stand_where_the_labels_of_packed_rows_stand() -> None:
    rows = [policy_row([1], [9], [-3.0], -1.0), policy_row([1, 2], [3, 4, 5], [-0.5, -0.25, -2.0], 1.5)]
    old = [np.array([-1.0], np.float32), np.array([-1.5, -2.5, -3.5], np.float32)]
    rows = [replace(row, old_log_probs_R=values) for row, values in zip(rows, old, strict=True)]
    [batch] = policy_micro_batches(rows, micro_batch_size=1, pack_tokens=8)
    assert (batch.rows, batch.row_lengths) == ((1, 0), (5, 2))
    assert batch.labels_BT.tolist() == [[IGNORED, 3, 4, 5, IGNORED, 9, IGNORED]]
    assert batch.advantage_BT.tolist() == [[0, 1.5, 1.5, 1.5, 0, -1, 0]]
    assert batch.sampler_log_prob_BT.tolist() == [[0, -0.5, -0.25, -2.0, 0, -3, 0]]
    assert batch.old_log_prob_BT is not None
    assert batch.old_log_prob_BT.tolist() == [[0, -1.5, -2.5, -3.5, 0, -1, 0]]
    with pytest.raises(ValueError, match="of all rows of a batch or of none, got those of 1 of 2"):
        policy_micro_batches([rows[0], replace(rows[1], old_log_probs_R=None)], 2)


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
    assert batch.labels_N.tolist() == [IGNORED]
    assert labelled_values(batch, torch.ones(1)) == []


def test_moving_keeps_rows_and_kind() -> None:
    [batch] = policy_micro_batches([policy_row([1], [2], [-1.0], 0.5)], 1)
    moved = batch.to(torch.device("meta"))
    assert moved.rows == (0,)
    assert moved.advantage_BT.device.type == moved.input_ids_BT.device.type == "meta"


def test_packed_rows_stand_end_to_end_and_no_label_crosses_a_border() -> None:
    rows = [example([5, 6, 7], [1, 0, 1]), example([1, 2, 3, 4], [1, 1, 0, 1]), example([9], [1])]
    [batch] = packed_micro_batches(rows, pack_tokens=8)
    assert batch.rows == (1, 0, 2)
    assert batch.row_lengths == (4, 3, 1)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 4, 5, 6, 7, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.labels_BT.tolist() == [[2, IGNORED, 4, IGNORED, IGNORED, 7, IGNORED, IGNORED]]
    assert {t.dtype for t in (batch.input_ids_BT, batch.inputs["position_ids"], batch.labels_BT)} == {torch.int64}
    assert [v.tolist() for v in labelled_values(batch, torch.arange(8))] == [[0, 2], [5], []]
    assert batch.to(torch.device("meta")).row_lengths == (4, 3, 1)


def test_each_row_goes_where_it_fits_best() -> None:
    # 7 | 6 | 4 would leave 2 in the second, 3 in the third; the 3 fills the first, the 2 the second.
    batches = packed_micro_batches([random_example(n) for n in (2, 7, 3, 6, 4, 2)], pack_tokens=10)
    assert [b.rows for b in batches] == [(1, 2), (3, 4), (0, 5)]
    assert [b.input_ids_BT.shape for b in batches] == [(1, 10), (1, 10), (1, 4)]
    assert packed_micro_batches([], 4) == []


def test_every_row_is_packed_once_within_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 500).tolist()
    rows = [random_example(n) for n in lengths]
    batches = packed_micro_batches(rows, pack_tokens=64)
    assert sorted(itertools.chain.from_iterable(b.rows for b in batches)) == list(range(500))
    assert max(b.input_ids_BT.shape[1] for b in batches) <= 64
    assert [b.rows for b in packed_micro_batches(rows, pack_tokens=64)] == [b.rows for b in batches]
    # Best-fit decreasing needs at most 11/9 of the fewest packs, and 4 (Johnson 1973); the fewest are at least the quotient.
    assert len(batches) <= 11 / 9 * -(-sum(lengths) // 64) + 4


@pytest.mark.parametrize("length", [0, 5])
def test_a_row_that_cannot_be_packed_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"1 to pack_tokens=4 tokens, got {length} in row 1"):
        packed_micro_batches([random_example(3), random_example(length)], 4)


def random_example(length: int) -> Example:
    rng = np.random.default_rng(length)
    return Example(rng.integers(4, 72, length, dtype=np.int32), rng.random(length) < 0.7, line=length)


MIXED_ROWS = [random_example(n) for n in (1, 2, 30, 17, 5, 24, 2, 9, 40, 11)]


def log_probs(model: LlamaForCausalLM, batches: Sequence[MicroBatch]) -> dict[int, np.ndarray]:
    """Log-probabilities of the labels of every row, by row."""
    found: dict[int, np.ndarray] = {}
    for batch in batches:
        values_NV = model.get_output_embeddings()(hidden_states(model, batch)).log_softmax(-1)
        values_N = values_NV.gather(1, batch.labels_N.clamp(min=0)[:, None])[:, 0]
        found.update(zip(batch.rows, labelled_values(batch, values_N), strict=True))
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_rows_have_the_log_probs_of_single_rows(attention: str) -> None:
    model = countdown_model(0, 0.2).eval()
    model.set_attn_implementation(attention)
    packed = packed_micro_batches(MIXED_ROWS, 64)
    assert len(packed[0].rows) > 1
    together = log_probs(model, packed)
    assert together.keys() == set(range(len(MIXED_ROWS)))
    for index, row in enumerate(MIXED_ROWS):
        alone = log_probs(model, packed_micro_batches([row], 64))[0]
        assert len(alone) == row.trained_T[1:].sum()
        np.testing.assert_allclose(together[index], alone, rtol=0, atol=1e-5)


def hidden_states(model: LlamaForCausalLM, batch: MicroBatch) -> torch.Tensor:
    return model.model(**batch.inputs).last_hidden_state.flatten(0, 1)


@torch.no_grad()
def test_rows_that_see_each_other_would_be_noticed() -> None:
    model = countdown_model(0, 0.2)
    batch = packed_micro_batches(MIXED_ROWS, 64)[0]
    leaking = replace(batch, row_lengths=None)
    assert float((hidden_states(model, leaking) - hidden_states(model, batch)).abs().max()) > 0.1


def test_a_step_has_the_same_gradient_packed_and_padded() -> None:
    denominator = int(sum(row.trained_T[1:].sum() for row in MIXED_ROWS))

    def gradients(batches: Sequence[MicroBatch]) -> dict[str, torch.Tensor]:
        model = countdown_model(0, 0.06)
        for batch in batches:
            hidden_NH, weight_VH = hidden_states(model, batch), model.get_output_embeddings().weight
            output = linear_objective_loss(
                hidden_NH, weight_VH, batch.labels_N, SEDObjective(), tau=0.5, denominator=denominator
            )
            output.loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    padded = gradients(sft_micro_batches(MIXED_ROWS, 4))
    packed = gradients(packed_micro_batches(MIXED_ROWS, 64))
    assert padded.keys() == packed.keys()
    assert max(float(g.abs().max()) for g in padded.values()) > 1e-3
    for name, gradient in padded.items():
        torch.testing.assert_close(packed[name], gradient, rtol=0, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_longest_rows_are_dealt_first_and_each_to_the_lightest_rank() -> None:
    # 9 -> 0, 8 -> 1, 6 -> 1 (8 < 9), 5 -> 0, 4 -> both at 14: 0, 3 -> 1.
    assert balanced_shards([4, 9, 5, 8, 3, 6], 2) == [[0, 1, 2], [3, 4, 5]]
    assert balanced_shards([2], 3) == [[0], [], []]
    assert balanced_shards([], 2) == [[], []]
    with pytest.raises(ValueError, match="at least one rank, got 0"):
        balanced_shards([1], 0)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_ranks_share_out_all_rows_evenly(num_ranks: int) -> None:
    rng = np.random.default_rng(num_ranks)
    for count in (num_ranks - 1, num_ranks, 37, 128):
        lengths = rng.integers(1, 2049, count).tolist()
        shards = balanced_shards(lengths, num_ranks)
        assert sorted(itertools.chain.from_iterable(shards)) == list(range(count))
        loads = [sum(lengths[row] for row in shard) for shard in shards]
        assert max(loads) - min(loads) <= max(lengths, default=0)
        # Graham 1969: the heaviest of m ranks carries at most 4/3 - 1/(3m) of the best possible, itself at least both of these.
        best = max(sum(lengths) / num_ranks, max(lengths, default=0))
        assert max(loads) <= (4 / 3 - 1 / (3 * num_ranks)) * best + max(lengths, default=0) / 3
        assert shards == balanced_shards(lengths, num_ranks)
