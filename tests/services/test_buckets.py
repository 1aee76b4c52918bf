"""Buckets of bytes, counted by hand."""

from __future__ import annotations

import pytest

from services.buckets import TensorSpec, fill_buckets


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([], 10, []),
        ([4, 4, 4], 8, [range(2), range(2, 3)]),
        ([4, 4, 4], 12, [range(3)]),
        # What is larger than a bucket goes alone, and what follows begins anew.
        ([3, 20, 3, 3], 6, [range(1), range(1, 2), range(2, 4)]),
        ([20, 20], 6, [range(1), range(1, 2)]),
        ([0, 6, 0, 1], 6, [range(3), range(3, 4)]),
        ([1, 1, 1], 1, [range(1), range(1, 2), range(2, 3)]),
    ],
)
def test_buckets_by_hand(sizes: list[int], limit: int, expected: list[range]) -> None:
    assert fill_buckets(sizes, limit) == expected


def test_buckets_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one byte, got 0"):
        fill_buckets([1], 0)


def test_bytes_of_a_tensor() -> None:
    assert TensorSpec("a", "bfloat16", (3, 5), 2).num_bytes == 30
    assert TensorSpec("scalar", "float32", (), 4).num_bytes == 4
