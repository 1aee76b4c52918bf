"""Every row once per pass, the same batch for a step whether or not the steps before it were drawn."""

import numpy as np
import pytest

from sedsft.data.order import RowOrder


def test_epochs_cover_every_row_once_and_end_with_a_smaller_batch() -> None:
    order = RowOrder(num_rows=10, batch_size=4, seed=3, epochs=2)
    batches = list(order.batches())
    assert order.num_steps == 6
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    for epoch in (batches[:3], batches[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(10))
    assert list(np.concatenate(batches[:3])) != list(np.concatenate(batches[3:]))


def test_steps_fill_every_batch_across_passes() -> None:
    order = RowOrder(num_rows=5, batch_size=4, seed=3, steps=5)
    batches = list(order.batches())
    assert [len(batch) for batch in batches] == [4] * 5
    stream = np.concatenate(batches)
    for number in range(4):
        assert sorted(stream[5 * number : 5 * number + 5]) == list(range(5))


def test_a_batch_may_be_larger_than_the_file() -> None:
    [batch] = RowOrder(num_rows=3, batch_size=7, seed=0, steps=1).batches()
    assert np.bincount(batch).sum() == 7
    assert sorted(batch[:3]) == sorted(batch[3:6]) == [0, 1, 2]
    [small] = RowOrder(num_rows=3, batch_size=7, seed=0, epochs=1).batches()
    assert sorted(small) == [0, 1, 2]


@pytest.mark.parametrize("length", [{"epochs": 3}, {"steps": 9}])
def test_resuming_continues_the_same_order(length: dict[str, int]) -> None:
    whole = list(RowOrder(7, 3, -1, **length).batches())
    rest = list(RowOrder(7, 3, -1, **length).batches(first_step=4))
    assert len(whole) == len(rest) + 4
    for expected, got in zip(whole[4:], rest, strict=True):
        np.testing.assert_array_equal(expected, got)


def test_seeds_differ_and_steps_out_of_range_are_refused() -> None:
    first, second = (RowOrder(100, 100, seed, epochs=1).batch(0) for seed in (1, 2))
    assert list(first) != list(second)
    with pytest.raises(IndexError, match=r"expected a step in 0\.\.0, got 1"):
        RowOrder(100, 100, 1, epochs=1).batch(1)
    with pytest.raises(ValueError, match="exactly one of epochs and steps"):
        RowOrder(100, 100, 1)
    with pytest.raises(ValueError, match="at least 1"):
        RowOrder(0, 100, 1, steps=1)
