"""What became of every rollout group that was asked for, and how old the weights were that drew those that are used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sedsft.records import RolloutGroup
from services.errors import GroupsLost, StaleSamples


@dataclass
class GroupCounts:
    """Groups since the stage began in this process; at every step submitted = accepted + dropped + running."""

    submitted: int = 0
    """Asked for, or read from a recording."""
    accepted: int = 0
    """Entered an iteration."""
    dropped: int = 0
    """Left because their weights were too old; asked for again, which counts anew."""

    def check(self, running: int) -> None:
        """Raise `GroupsLost` unless the counts add up with the `running` groups that somebody holds."""
        if self.submitted != self.accepted + self.dropped + running:
            raise GroupsLost(
                f"expected submitted = accepted + dropped + running rollout groups, got {self.submitted} = {self.accepted} + "
                f"{self.dropped} + {running}; the loop lost or doubled one, report it"
            )

    def figures(self, running: int) -> dict[str, float]:
        """The counts as figures of an iteration."""
        counts = {"submitted": self.submitted, "accepted": self.accepted, "dropped": self.dropped, "running": running}
        return {f"groups_{name}": float(count) for name, count in counts.items()}


def staleness(groups: Sequence[RolloutGroup], version: int) -> Counter[int]:
    """Number of samples by how many updates the weights that drew them are older than `version`."""
    return Counter(version - sample.weight_version for group in groups for sample in group.samples)


def within(groups: Sequence[RolloutGroup], version: int, bound: int) -> bool:
    """Whether every sample was drawn with `version` or at most `bound` versions before."""
    return all(0 <= age <= bound for age in staleness(groups, version))


def check_staleness(groups: Sequence[RolloutGroup], version: int, bound: int, iteration: int) -> None:
    """Refuse an update with samples of weights that it must not use.

    Raises:
        StaleSamples: a sample is more than `bound` versions older than `version`, or newer.
    """
    ages = staleness(groups, version)
    if wrong := {age: count for age, count in sorted(ages.items()) if not 0 <= age <= bound}:
        found = ", ".join(f"{count} of version {version - age}" for age, count in wrong.items())
        raise StaleSamples(
            f"expected every sample of iteration {iteration} to be drawn with weight version {version} or at most {bound} "
            f"before it, got {found} among {ages.total()}; none was trained on. Report it: the loop should have dropped them"
        )


def staleness_figures(groups: Sequence[RolloutGroup], version: int) -> dict[str, float]:
    """`staleness_mean` and `staleness_max` over samples, in updates, and `samples_stale_<age>`."""
    ages = staleness(groups, version)
    mean = sum(age * count for age, count in ages.items()) / ages.total()
    by_age = {f"samples_stale_{age}": float(ages[age]) for age in sorted(ages)}
    return {"staleness_mean": mean, "staleness_max": float(max(ages)), **by_age}
