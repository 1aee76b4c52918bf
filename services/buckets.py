"""Tensors in buckets of bytes: what is gathered from sharded trainers, and sent to engines, at a time.

Both ends of a transfer fill buckets by this one rule, so they agree on where one ends without saying so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before anybody has made it."""

    name: str
    dtype: str
    """As an attribute of torch: `bfloat16`."""
    shape: tuple[int, ...]
    item_bytes: int
    """Bytes of an element."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.item_bytes


class WeightStream(Protocol):
    """The weights of a model as the ranks of a trainer hold them together, by the names and shapes of its files."""

    def specs(self) -> list[TensorSpec]:
        """What `stream` will yield, in its order. Not collective."""

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor whole, on the device of training, good until the next optimizer step. Collective: every rank goes
        through all of it, in this order."""


def fill_buckets(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive items, by their indices, in buckets whose sizes sum to at most `limit`; a larger item stands alone.

    Raises:
        ValueError: `limit` is not positive.
    """
    if limit < 1:
        raise ValueError(f"expected buckets of at least one byte, got {limit}")
    buckets: list[range] = []
    room = 0
    for index, size in enumerate(sizes):
        if buckets and size <= room:
            buckets[-1] = range(buckets[-1].start, index + 1)
        else:
            buckets.append(range(index, index + 1))
            room = limit
        room -= size
    return buckets
