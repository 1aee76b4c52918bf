from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.loops.timeline import ENGINES, SCORERS, TRAINERS, Span, Timeline, covered_s


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_overlapping_spans_cover_their_union() -> None:
    spans = [Span(ENGINES, "rollout", *borders) for borders in ((0, 4), (1, 2), (3, 6), (8, 9))]
    assert covered_s(spans) == 7
    assert covered_s([]) == 0


def test_windows_cut_what_goes_on_and_idle_is_the_rest(tmp_path: Path) -> None:
    clock = Clock()
    timeline = Timeline(clock)
    rollout = timeline.begin("rollout", ENGINES)
    clock.now_s += 3
    timeline.end(rollout)
    with timeline.span("sync", ENGINES, TRAINERS):
        clock.now_s += 1
    ahead = timeline.begin("rollout", ENGINES)
    with timeline.span("train", TRAINERS):
        clock.now_s += 2
    clock.now_s += 2
    first = timeline.cut()
    assert first.figures() == {
        "iteration_s": 8,
        "seconds_rollout": 7,
        "seconds_sync": 1,
        "seconds_train": 2,
        "engines_busy_s": 8,
        "engines_idle_s": 0,
        "trainers_busy_s": 3,
        "trainers_idle_s": 5,
    }
    clock.now_s += 1
    timeline.end(ahead)
    with timeline.span("score", SCORERS):
        clock.now_s += 3
    second = timeline.cut()
    assert second.spans == (Span(ENGINES, "rollout", 8, 9), Span(SCORERS, "score", 9, 12))
    assert second.figures()["engines_idle_s"] == 3
    assert timeline.cut().spans == ()
    for number, window in enumerate((first, second), start=1):
        window.append_to(tmp_path / "timeline.jsonl", number)
    lines = [json.loads(line) for line in (tmp_path / "timeline.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "iteration": 2,
        "start_s": 8,
        "end_s": 12,
        "spans": [["engines", "rollout", 8, 9], ["scorers", "score", 9, 12]],
    }
    assert [span[2] for span in lines[0]["spans"]] == [0, 3, 3, 4, 4]


def test_a_span_ends_when_its_work_fails() -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match="x"), timeline.span("train", TRAINERS):
        raise ValueError("x")
    timeline.cut()
    assert timeline.cut().spans == ()
