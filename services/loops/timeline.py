"""When engines, scorers and trainers worked: spans from any thread, cut into windows of one iteration each.

stages/<stage>/timeline.jsonl     per iteration: {"iteration", "start_s", "end_s", "spans": [[lane, name, start_s, end_s]]}
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

FILE = "timeline.jsonl"
ENGINES, SCORERS, TRAINERS = "engines", "scorers", "trainers"
LANES = (ENGINES, SCORERS, TRAINERS)


@dataclass(frozen=True)
class Span:
    """Work of one lane, in seconds since the timeline began."""

    lane: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Window:
    """A stretch of time with the parts of all spans that lie in it."""

    start_s: float
    end_s: float
    spans: tuple[Span, ...]

    def busy_s(self, lane: str) -> float:
        """Seconds in which something of the lane was under way."""
        return covered_s([span for span in self.spans if span.lane == lane])

    def figures(self) -> dict[str, float]:
        """`iteration_s`, `seconds_<name>` of each kind of work, `<lane>_busy_s` and `<lane>_idle_s` of engines and trainers."""
        whole_s = self.end_s - self.start_s
        figures = {"iteration_s": whole_s}
        for name in dict.fromkeys(span.name for span in self.spans):
            figures[f"seconds_{name}"] = covered_s([span for span in self.spans if span.name == name])
        for lane in (ENGINES, TRAINERS):
            figures |= {f"{lane}_busy_s": (busy_s := self.busy_s(lane)), f"{lane}_idle_s": whole_s - busy_s}
        return figures

    def append_to(self, path: Path, iteration: int) -> None:
        """Write the window as a line of `path`, spans in the order of their beginnings."""
        spans = [
            [span.lane, span.name, round(span.start_s, 4), round(span.end_s, 4)]
            for span in sorted(self.spans, key=lambda span: span.start_s)
        ]
        line = {"iteration": iteration, "start_s": round(self.start_s, 4), "end_s": round(self.end_s, 4), "spans": spans}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def covered_s(spans: Sequence[Span]) -> float:
    """Seconds that at least one of the spans covers."""
    covered, reached_s = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        covered += max(0.0, span.end_s - max(span.start_s, reached_s))
        reached_s = max(reached_s, span.end_s)
    return covered


class Timeline:
    """Collects spans; any thread may open and close them. `clock` gives seconds and never goes back."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._origin_s, self._cut_s = clock, clock(), 0.0
        self._lock = threading.Lock()
        self._keys = itertools.count()
        self._open: dict[int, list[Span]] = {}
        self._closed: list[Span] = []

    def begin(self, name: str, *lanes: str) -> int:
        """Work begins on `lanes`; returns what `end` wants."""
        with self._lock:
            now_s, key = self._now_s(), next(self._keys)
            self._open[key] = [Span(lane, name, now_s, now_s) for lane in lanes]
            return key

    def end(self, key: int) -> None:
        """The work has ended."""
        with self._lock:
            now_s = self._now_s()
            self._closed += [Span(span.lane, span.name, span.start_s, now_s) for span in self._open.pop(key)]

    @contextmanager
    def span(self, name: str, *lanes: str) -> Iterator[None]:
        """Work on `lanes` inside the block."""
        key = self.begin(name, *lanes)
        try:
            yield
        finally:
            self.end(key)

    def cut(self) -> Window:
        """The window from the last cut to now; of work that goes on, the part so far."""
        with self._lock:
            start_s, end_s = self._cut_s, self._now_s()
            going_on = [Span(span.lane, span.name, span.start_s, end_s) for spans in self._open.values() for span in spans]
            spans = [
                Span(span.lane, span.name, max(span.start_s, start_s), min(span.end_s, end_s))
                for span in (*self._closed, *going_on)
                if span.end_s > start_s
            ]
            self._closed, self._cut_s = [], end_s
        return Window(start_s, end_s, tuple(spans))

    def _now_s(self) -> float:
        return self._clock() - self._origin_s
