"""Trainer ranks with faults: gradients that become infinite, and files that are written when the test says so."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sedsft.records import Example
from services.checkpoints import FileRecord, on_disk
from services.training.sft_worker import SFTWorker


class PoisonedWorker(SFTWorker):
    """Gradients are infinite at the steps that poison.json beside the model folder lists, with "once" the first time only."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._healed: set[int] = set()

    def train_step(self, examples: Sequence[Example], denominator: int, tau: float | None, step: int) -> Any:
        plan = json.loads((Path(self._setup.model_path).parent / "poison.json").read_text())
        hooks = []
        if step in plan["steps"] and step not in self._healed:
            hooks.append(self._engine._parameters[-1].register_hook(lambda gradient: gradient * math.inf))
            if plan["once"]:
                self._healed.add(step)
        outcome = super().train_step(examples, denominator, tau, step)
        for hook in hooks:
            hook.remove()
        return outcome


class _Files:
    """Stands where the engine stands: one file per rank, written as soon as there is a file `go` beside the folder."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def snapshot(self) -> bytes:
        return bytes([self._rank]) * 1000

    def write(self, snapshot: bytes, folder: Path) -> list[FileRecord]:
        (folder / f"rank-{self._rank}.json").write_bytes(snapshot[:500])
        while not (folder.parent / "go").exists():
            time.sleep(0.01)
        if (folder.parent / "full").exists() and self._rank == 1:
            raise OSError(28, "No space left on device")
        (folder / f"rank-{self._rank}.json").write_bytes(snapshot)
        return [on_disk(folder, f"rank-{self._rank}.json")]


class SlowWriter(SFTWorker):
    """Writes when the test says so; everything about threads is that of the real worker."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._engine = _Files(index)  # type: ignore[assignment]

    def echo(self, value: int) -> int:
        return value
