"""Where the prompts of a stream of samples come from, and where the groups go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sedsft.records import Prompt, Sample


@dataclass(frozen=True)
class Ask:
    """A prompt to sample. Sample g of its group is drawn with `seed` + g."""

    prompt: Prompt
    seed: int


class Feed(Protocol):
    """Source and sink of a stream, called on the thread that streams."""

    def take(self) -> Sequence[Ask]:
        """What is to be sampled from now on; empty when nothing is, for the moment."""

    def put(self, ask: Ask, samples: tuple[Sample, ...]) -> None:
        """The whole group of a prompt that was taken, once each."""

    @property
    def ended(self) -> bool:
        """True when `take` gives nothing more: the stream ends with the last group under way."""


class Batch:
    """Feed of prompts that are all known and have seeds of their own."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        self._asks = list(asks)
        self._groups: dict[int, tuple[Sample, ...]] = {}
        self.ended = not self._asks

    def take(self) -> Sequence[Ask]:
        """All prompts, once."""
        if self.ended:
            return []
        self.ended = True
        return self._asks

    def put(self, ask: Ask, samples: tuple[Sample, ...]) -> None:
        """Keep a group."""
        self._groups[ask.seed] = samples

    def groups(self) -> list[tuple[Sample, ...]]:
        """The groups in the order of the prompts."""
        return [self._groups[ask.seed] for ask in self._asks]
