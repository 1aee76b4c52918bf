"""Trainer ranks that kill themselves with SIGKILL where a file beside the model folder says so, once for each file.

`die-<rank>-<method>-<n>`: at the n-th call, from 1, of `train_step`, `update` or `begin_save` in the life of the process that
finds the file; with the ending `-always` the file stays.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from services.training.policy_worker import PolicyWorker
from services.training.sft_worker import SFTWorker


def plan_death(folder: Path, rank: int, method: str, call: int, *, always: bool = False) -> None:
    """Have the rank die there."""
    (folder / f"die-{rank}-{method}-{call}{'-always' * always}").touch()


class Mortal:
    """Counts the calls of a rank and looks for the files."""

    index: int

    def _at(self, method: str) -> None:
        self._calls = getattr(self, "_calls", Counter())
        self._calls[method] += 1
        plan = self._plans / f"die-{self.index}-{method}-{self._calls[method]}"
        always = plan.with_name(f"{plan.name}-always")
        if plan.exists() or always.exists():
            plan.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, setup: Any) -> None:
        self._plans = Path(setup.model_path).parent
        super().setup(setup)  # type: ignore[misc]

    def begin_save(self, folder: Path) -> None:
        self._at("begin_save")
        super().begin_save(folder)  # type: ignore[misc]


class DyingSFTWorker(Mortal, SFTWorker):
    def train_step(self, *arguments: Any) -> Any:
        self._at("train_step")
        return super().train_step(*arguments)


class DyingPolicyWorker(Mortal, PolicyWorker):
    def update(self, *arguments: Any) -> Any:
        self._at("update")
        return super().update(*arguments)

    def export_weights(self, *arguments: Any) -> Any:
        self._at("export_weights")
        return super().export_weights(*arguments)
