"""Every row once per pass, the same batch for a step whether or not the steps before it were drawn."""

import numpy as np
import pytest

from sedsft.data.order import RefillOrder, RowOrder


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


def test_refills_go_on_behind_the_run_and_skip_what_the_step_has() -> None:
    order = RowOrder(20, 4, seed=3, steps=3)
    longer = RowOrder(20, 4, seed=3, steps=9)
    refills = RefillOrder(order, step=1, max_refills=2)
    first = refills.draw(0, 4)
    assert first == order.batch(1).tolist()
    # Steps 3 and 4 are the refills of step 0, so 5 and 6 are those of step 1.
    second = refills.draw(1, 3)
    assert second == [row for row in longer.batch(5).tolist() if row not in first][:3]
    third = refills.draw(2, 4)
    assert third == [row for row in longer.batch(6).tolist() if row not in first + second]
    again = RefillOrder(order, step=1, max_refills=2)
    assert [again.draw(0, 4), again.draw(1, 3), again.draw(2, 4)] == [first, second, third]
    with pytest.raises(IndexError, match=r"0\.\.2, got 3"):
        refills.draw(3, 1)


def test_refills_end_with_the_rows() -> None:
    refills = RefillOrder(RowOrder(4, 4, seed=0, steps=2), step=0, max_refills=1)
    assert sorted(refills.draw(0, 4)) == [0, 1, 2, 3]
    assert refills.draw(1, 2) == []
