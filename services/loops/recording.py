"""Rollouts of an RL stage over all attempts of a job: written before they are used, read back instead of sampled again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from sedsft.records import RolloutGroup
from services.checkpoints import identity_diff
from services.errors import RecordingInvalid
from services.rollout_record import FOLDER, RecordedIteration, read_rollouts, read_table, recorded_files, write_rollouts
from services.run import Run


def check_recorded(recorded: RecordedIteration, identity: Mapping[str, Any], path: Path) -> None:
    """Refuse rollouts that were drawn under other settings, rows or models.

    Raises:
        RecordingInvalid: names each field that differs, with both values.
    """
    if diff := identity_diff(recorded.identity, identity):
        raise RecordingInvalid(
            f"expected rollouts of this stage in {path}, these settings of theirs differ: {diff}. Use the same settings, or "
            "submit the job anew"
        )


class Recording:
    """Rollouts of one stage of a run."""

    def __init__(self, run: Run, stage: str, identity: Mapping[str, Any]) -> None:
        self._run, self._identity = run, identity
        self._folder = run.folder / "stages" / stage / FOLDER
        self._files = recorded_files(run.folder, stage)

    def holds(self, iteration: int) -> bool:
        """Whether an earlier attempt has recorded the iteration."""
        return iteration in self._files

    def read(self, iteration: int) -> list[RolloutGroup] | None:
        """The scored groups of an iteration; None where they have to be sampled. A damaged file is reported as an event.

        Raises:
            RecordingInvalid: the file is that of other settings.
        """
        path = self._files.get(iteration)
        if path is None:
            return None
        try:
            recorded = read_rollouts(path)
        except RecordingInvalid as error:
            self._run.event("recording_broken", error.message, path=str(path), iteration=iteration)
            return None
        check_recorded(recorded, self._identity, path)
        self._run.event("rollouts_read", f"rollouts of iteration {iteration} read from {path}", iteration=iteration)
        return recorded.groups

    def seeds(self) -> dict[int, set[int]]:
        """Seeds of the groups of each recorded iteration; empty where the file is damaged, which `read` reports."""
        found: dict[int, set[int]] = {}
        for iteration, path in self._files.items():
            try:
                table = read_table(path, ["sample", "seed"])
            except RecordingInvalid:
                continue
            found[iteration] = set(table.filter(pc.field("sample") == 0)["seed"].to_pylist())
        return found

    def first_version(self) -> int | None:
        """Version of the weights that the stage began with; None where iteration 1 is not recorded or damaged."""
        try:
            rows = read_table(self._files[1], ["weight_version"])["weight_version"].to_pylist() if 1 in self._files else []
        except RecordingInvalid:
            return None
        return max(rows, default=None)

    def write(self, iteration: int, groups: Sequence[RolloutGroup]) -> None:
        """Record the scored groups of an iteration; on disk when this returns."""
        write_rollouts(self._folder, iteration, groups, self._identity)
