"""Checkpoints of a stage that are written while it trains: ranks copy, threads write, the driver publishes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from services import checkpoints
from services.actor_group import ActorGroup
from services.checkpoints import CheckpointInfo, FileRecord
from services.loops.ranks import SAVE_TIMEOUT_S, prune, publish_files
from services.run import Run


@dataclass(frozen=True)
class _Pending:
    """A checkpoint that the ranks are writing."""

    folder: Path
    info: CheckpointInfo
    card: str


class CheckpointSaver:
    """Saves without making training wait for the disk: only for the copy, and for a former save that is not done yet.

    One checkpoint is written at a time. It is published, and older ones removed, by `poll` or `wait` once all ranks have
    written their files; until then it is a folder that nobody reads.
    """

    def __init__(self, run: Run, trainers: ActorGroup, folder: Path, keep: int) -> None:
        """`folder`: that of the stage. `keep`: newest checkpoints that stay."""
        self._run, self._trainers, self._folder, self._keep = run, trainers, folder, keep
        self._pending: _Pending | None = None

    def begin(self, info: CheckpointInfo, card: str) -> float:
        """Save the state of now as a checkpoint with `info` and the model card `card`; seconds that training waited."""
        started = time.monotonic()
        self.wait()
        writing = checkpoints.begin(self._folder / "checkpoints", info.step, int(self._run.attempt))
        self._trainers.call("begin_save", writing, timeout_s=SAVE_TIMEOUT_S)
        self._pending = _Pending(writing, info, card)
        return time.monotonic() - started

    def poll(self) -> None:
        """Publish the pending checkpoint if all ranks have written it. Raises what went wrong in a writing thread."""
        self._collect(wait=False)

    def wait(self) -> None:
        """Publish the pending checkpoint, if there is one, as soon as all ranks have written it."""
        self._collect(wait=True)

    def _collect(self, *, wait: bool) -> None:
        if self._pending is None:
            return
        per_rank: list[list[FileRecord] | None] = self._trainers.call("saved", wait, timeout_s=SAVE_TIMEOUT_S)
        files = [file for own in per_rank if own is not None for file in own]
        if any(own is None for own in per_rank):
            return
        pending, self._pending = self._pending, None
        publish_files(self._run, pending.folder, files, pending.info, pending.card)
        prune(self._run, self._folder, self._keep)
