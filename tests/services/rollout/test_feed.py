from __future__ import annotations

from sedsft.records import Prompt, Sample
from services.rollout.feed import Ask, Batch


def test_a_batch_is_given_once_and_comes_back_in_order() -> None:
    asks = [Ask(Prompt((i,), "", "", i), seed=10 - i) for i in range(3)]
    batch = Batch(asks)
    assert not batch.ended
    assert list(batch.take()) == asks
    assert batch.ended
    assert list(batch.take()) == []
    for place in (2, 0, 1):
        batch.put(asks[place], (Sample((place,), (-1.0,), "", False, 1),))
    assert [samples[0].response_ids for samples in batch.groups()] == [(0,), (1,), (2,)]
    assert Batch([]).ended
