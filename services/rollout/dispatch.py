"""Which engine gets which prompt: pure bookkeeping, no engine and no clock.

A prompt with its whole group of samples is the unit, so a group shares one prefix on one engine. Prompts are handed out one by
one to the least-loaded engine, so one that takes long delays none of the others.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, Protocol, TypeVar

from services.errors import WorkerDied


class Life(NamedTuple):
    """One process of an engine: its number, and how often it was restarted before."""

    engine: int
    restarts: int

    def __str__(self) -> str:
        return f"rollout-{self.engine}" + (f" (restart {self.restarts})" if self.restarts else "")


class Versioned(Protocol):
    """A sample, as far as the dispatcher looks into it."""

    @property
    def weight_version(self) -> int:
        """Version of the weights that drew it."""


SampleT = TypeVar("SampleT", bound=Versioned)
Verdict = Literal["taken", "late", "wrong_version"]


@dataclass(frozen=True)
class Load:
    """The work of one call: at first `prompts` prompts of `group_size` samples, all to be drawn with the weights `version`."""

    prompts: int
    group_size: int
    version: int
    limit: int
    """Samples that one engine may hold; an idle engine takes a prompt whatever its group's size."""


class Dispatcher(Generic[SampleT]):
    """Hands out prompts 0..P-1 until each is answered once. After every step: P = answered + running + waiting."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._prompts = load.prompts
        self._waiting = deque(range(load.prompts))
        self._running: dict[int, Life] = {}
        self._held: Counter[Life] = Counter()
        self._lost_by: dict[int, Life] = {}
        self._answers: dict[int, Sequence[SampleT]] = {}
        self.late = 0
        """Answers dropped because the engine had been given up, or the prompt was answered or handed to another before."""
        self.wrong_version = 0
        """Answers dropped because a sample was drawn with other weights."""
        self.redispatched = 0
        """Prompts that were handed out a second time after their engine was lost."""

    @property
    def done(self) -> bool:
        """True when every prompt is answered."""
        return len(self._answers) == self._prompts

    @property
    def missing(self) -> int:
        """Prompts that are not answered."""
        return self._prompts - len(self._answers)

    def add(self, prompts: int) -> None:
        """So many prompts more, numbered on."""
        self._waiting.extend(range(self._prompts, self._prompts + prompts))
        self._prompts += prompts

    def assign(self, ready: Iterable[Life]) -> list[tuple[Life, int]]:
        """Hand waiting prompts to the engines of `ready` that have room, each to the one with the fewest samples."""
        engines = sorted(ready)
        size, limit = self._load.group_size, self._load.limit
        given: list[tuple[Life, int]] = []
        while self._waiting and engines:
            engine = min(engines, key=lambda life: self._held[life])
            if self._held[engine] and (self._held[engine] + 1) * size > limit:
                break
            prompt = self._waiting.popleft()
            self._running[prompt] = engine
            self._held[engine] += 1
            given.append((engine, prompt))
        self.check()
        return given

    def answer(self, engine: Life, prompt: int, samples: Sequence[SampleT]) -> Verdict:
        """Take the answer, unless the prompt is not that engine's any more or the weights were others.

        Raises:
            WorkerDied: wrong weights, and the prompt had been lost before.
        """
        if self._running.get(prompt) != engine:
            self.late += 1
            return "late"
        if any(sample.weight_version != self._load.version for sample in samples) or len(samples) != self._load.group_size:
            self.wrong_version += 1
            self._take_back([prompt], engine)
            return "wrong_version"
        del self._running[prompt]
        self._held[engine] -= 1
        self._answers[prompt] = samples
        self.check()
        return "taken"

    def lost(self, engine: Life, *, blame: bool = True) -> int:
        """Take back what the engine holds, first in line again; returns how many. Without `blame` it does not count as lost.

        Raises:
            WorkerDied: a prompt was lost before; another engine would likely die of it too.
        """
        prompts = sorted(prompt for prompt, holder in self._running.items() if holder == engine)
        self._take_back(prompts, engine if blame else None)
        return len(prompts)

    def _take_back(self, prompts: Sequence[int], blamed: Life | None) -> None:
        twice = {prompt: self._lost_by[prompt] for prompt in prompts if blamed is not None and prompt in self._lost_by}
        for prompt in reversed(prompts):
            self._held[self._running.pop(prompt)] -= 1
            self._waiting.appendleft(prompt)
            if blamed is not None:
                self._lost_by[prompt] = blamed
                self.redispatched += 1
        self.check()
        if twice:
            named = ", ".join(f"{prompt} (on {first} and {blamed})" for prompt, first in list(twice.items())[:5])
            raise WorkerDied(
                f"expected each prompt to lose at most one engine, {len(twice)} lost two; by place in the call: {named}. "
                "Look at the engines' lines in the job's log (memory limit, signal, unsupported operation): the prompts may be "
                "what ends them"
            )

    def results(self) -> list[Sequence[SampleT]]:
        """The answers in the prompts' order; call it when `done`."""
        return [self._answers[prompt] for prompt in range(self._prompts)]

    def running(self) -> dict[Life, int]:
        """Prompts that each engine holds now."""
        return {engine: count for engine, count in self._held.items() if count}

    def check(self) -> None:
        """Raise `RuntimeError` unless prompts = answered + running + waiting, as it must be whatever happened."""
        answered, running, waiting = len(self._answers), len(self._running), len(self._waiting)
        if answered + running + waiting != self._prompts or running != self._held.total():
            raise RuntimeError(
                f"expected {self._prompts} prompts = answered + running + waiting, got {answered} + {running} + {waiting} "
                f"({self._held.total()} held by engines); the dispatcher lost or doubled one, report it"
            )
