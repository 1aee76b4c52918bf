"""Order in which rows are trained on: seeded, and computable for any step without the steps before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Row indices of each optimizer step. Every pass over the rows has its own permutation, drawn from (seed, pass).

    With `epochs`, each pass ends with a smaller batch when the rows do not divide evenly; no batch spans two passes. With
    `steps`, every batch has `batch_size` rows and runs on into the next pass where a pass ends within it, so a row can occur
    twice in one batch. Exactly one of `epochs` and `steps` is given.
    """

    num_rows: int
    batch_size: int
    seed: int
    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_rows < 1 or self.batch_size < 1:
            raise ValueError(f"expected rows and a batch size of at least 1, got {self.num_rows} and {self.batch_size}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"expected exactly one of epochs and steps, got {self.epochs} and {self.steps}")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else (self.epochs or 0) * self._steps_per_epoch

    @property
    def _steps_per_epoch(self) -> int:
        return -(-self.num_rows // self.batch_size)

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of optimizer step `step`, counted from 0."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"expected a step in 0..{self.num_steps - 1}, got {step}")
        if self.steps is None:
            epoch, place = divmod(step, self._steps_per_epoch)
            return self._permutation(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        first = step * self.batch_size
        first_pass, last_pass = first // self.num_rows, (first + self.batch_size - 1) // self.num_rows
        rows = np.concatenate([self._permutation(number) for number in range(first_pass, last_pass + 1)])
        start = first - first_pass * self.num_rows
        return rows[start : start + self.batch_size]

    def batches(self, first_step: int = 0) -> Iterator[npt.NDArray[np.int64]]:
        """Batches from `first_step` to the end; a resumed run passes the number of steps it has done."""
        for step in range(first_step, self.num_steps):
            yield self.batch(step)

    def _permutation(self, number: int) -> npt.NDArray[np.int64]:
        return _permutation(self.num_rows, self.seed % 2**64, number)


class RefillOrder:
    """Rows of one step and of its refills: refills go on where the last step of the whole run ends, and skip what the step has.

    Which rows a refill draws depends on the rows drawn before it in the same step, and on nothing else.
    """

    def __init__(self, order: RowOrder, step: int, max_refills: int) -> None:
        """`order` has `steps`; `step` is counted from 0."""
        self._first, self._max_refills = order.num_steps + step * max_refills - 1, max_refills
        self._rows = order.batch(step)
        self._order = replace(order, steps=order.num_steps * (1 + max_refills))
        self._taken: set[int] = set()

    def draw(self, refill: int, count: int) -> list[int]:
        """At most `count` rows, for `refill` 0 the first ones of the step; fewer where rows of the refill are taken already."""
        if not 0 <= refill <= self._max_refills:
            raise IndexError(f"expected a refill in 0..{self._max_refills}, got {refill}")
        if refill == 0:
            rows = [int(row) for row in self._rows[:count]]
        else:
            following = dict.fromkeys(int(row) for row in self._order.batch(self._first + refill))
            rows = [row for row in following if row not in self._taken][:count]
        self._taken.update(rows)
        return rows


@lru_cache(maxsize=4)
def _permutation(num_rows: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    permutation = np.random.default_rng((seed, number)).permutation(num_rows)
    permutation.flags.writeable = False
    return permutation
