"""When training goes on, goes back or ends after steps whose loss or gradient was not finite."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

SKIPS_IN_A_ROW = 3
"""Steps skipped one after the other that send training back to the last good checkpoint."""


@dataclass(frozen=True)
class Skips:
    """Skipped steps so far; part of the checkpoint, but for `total` and `gone_back_from`, which a way back does not undo.

    A run of three in a row sends training back once: what has passed by then, such as a fault of the machine, leaves no trace.
    If three in a row happen again no later than where they had happened before, training has diverged.
    """

    total: int = 0
    """All skipped steps of the run, those that were trained again after a way back included."""
    in_a_row: int = 0
    gone_back_from: int = 0
    """Step from which training last went back; 0: never."""

    def trained(self) -> Skips:
        """Behind a step that was not skipped."""
        return replace(self, in_a_row=0)

    def skipped(self) -> Skips:
        """Behind a step that was skipped."""
        return replace(self, total=self.total + 1, in_a_row=self.in_a_row + 1)

    def gone_back(self, step: int) -> Skips:
        """Behind the way back from `step`."""
        return replace(self, in_a_row=0, gone_back_from=step)

    def verdict(self, step: int) -> Literal["go on", "go back", "diverged"]:
        """What follows on `step`, the one that these skips end with."""
        if self.in_a_row < SKIPS_IN_A_ROW:
            return "go on"
        return "diverged" if step <= self.gone_back_from else "go back"
