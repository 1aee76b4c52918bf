"""How sampling and training of an RL stage overlap in time: settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sedsft.config_base import Config


class SyncOverlap(Config):
    """Engines and trainers take turns: every sample is drawn with the weights that it updates."""

    mode: Literal["sync"] = "sync"
    """Which of the modes this is."""


class OneStepOffOverlap(Config):
    """While the trainers train on an iteration, the engines sample the next one with the weights from before that update."""

    mode: Literal["one_step_off"] = "one_step_off"
    """Which of the modes this is."""


class AsyncOverlap(Config):
    """Engines sample all the time but for weight syncs; the trainers take the oldest groups as soon as there are enough."""

    mode: Literal["async"] = "async"
    """Which of the modes this is."""
    max_staleness: Annotated[int, Field(ge=1, le=16)] = 1
    """Largest number of updates between the weights that drew a sample and those it updates. At most `max_staleness` + 1
    iterations' groups are under way; those that get older all the same are dropped, counted and drawn again."""


Overlap = Annotated[SyncOverlap | OneStepOffOverlap | AsyncOverlap, Field(discriminator="mode")]
