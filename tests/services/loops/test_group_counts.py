from __future__ import annotations

import pytest

from sedsft.records import Prompt, RolloutGroup, Sample
from services.errors import GroupsLost, StaleSamples
from services.loops.group_counts import GroupCounts, check_staleness, staleness_figures, within


def group(*versions: int) -> RolloutGroup:
    return RolloutGroup(Prompt((1,), "", "", 1), tuple(Sample((2,), (-1.0,), "", False, version) for version in versions))


def test_counts_that_do_not_add_up_are_named() -> None:
    counts = GroupCounts(submitted=9, accepted=4, dropped=2)
    counts.check(running=3)
    assert counts.figures(3) == {"groups_submitted": 9, "groups_accepted": 4, "groups_dropped": 2, "groups_running": 3}
    for running in (2, 4):
        with pytest.raises(GroupsLost, match=rf"got 9 = 4 \+ 2 \+ {running}"):
            counts.check(running)


def test_staleness_counts_updates_between_drawing_and_use() -> None:
    groups = [group(5, 5), group(4, 3), group(5, 4)]
    assert staleness_figures(groups, version=5) == {
        "staleness_mean": 4 / 6,
        "staleness_max": 2,
        "samples_stale_0": 3,
        "samples_stale_1": 2,
        "samples_stale_2": 1,
    }
    check_staleness(groups, 5, 2, 1)
    assert within(groups, 5, 2)
    assert not within(groups, 5, 1)


@pytest.mark.parametrize(("version", "found"), [(5, "1 of version 3 among 4"), (4, "1 of version 5 among 4")])
def test_samples_of_other_versions_never_enter_an_update(version: int, found: str) -> None:
    groups = [group(4, 4), group(5 if version == 4 else 4, 3 if version == 5 else 4)]
    with pytest.raises(StaleSamples, match=f"weight version {version} or at most 1 before it, got {found}"):
        check_staleness(groups, version, 1, 7)
