from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.overlap_report import LEFT, RIGHT, WIDTH, overlap_view, timeline_view
from services.report import build_report
from services.rundir import RunWriter

CURVES = {
    "iteration_s": {1: 4.0, 2: 2.0},
    "engines_idle_s": {1: 2.0, 2: 0.5},
    "trainers_idle_s": {1: 1.0, 2: 1.0},
    "staleness_mean": {1: 0.0, 2: 1.0},
    "staleness_max": {1: 0.0, 2: 1.0},
    "samples_stale_0": {1: 8.0},
    "samples_stale_2": {2: 3.0},
    "groups_dropped": {1: 0.0, 2: 2.0},
}


def line(iteration: int, start_s: float, end_s: float) -> dict[str, Any]:
    half = (start_s + end_s) / 2
    spans = [["engines", "rollout", start_s, end_s], ["trainers", "train", half, end_s]]
    return {"iteration": iteration, "start_s": start_s, "end_s": end_s, "spans": spans}


def test_shares_are_of_the_iterations_time() -> None:
    view = overlap_view("rl", "async", CURVES, [])
    assert view is not None
    idle, staleness = view.charts
    assert [(drawn.name, drawn.last) for drawn in idle.lines] == [("engines", "0.25"), ("trainers", "0.5")]
    assert "engines 0.38, trainers 0.38" in idle.note
    assert [drawn.last for drawn in staleness.lines] == ["1", "1"]
    assert view.ages is not None
    assert [bar[4] for bar in view.ages.bars] == ["0: 8", "1: 0", "2: 3"]
    assert (view.dropped, view.timeline) == (2, None)
    assert overlap_view("rl", "sync", {"reward": {1: 0.5}}, []) is None


def test_the_middle_two_iterations_are_drawn_to_scale() -> None:
    view = timeline_view([line(i, 10.0 * i, 10.0 * i + 10) for i in range(1, 7)])
    assert view is not None
    assert view.title == "Iterations 3 and 4"
    inner = WIDTH - LEFT - RIGHT
    assert [(bar.x, bar.width) for bar in view.bars] == [
        (LEFT, inner / 2),
        (LEFT + inner / 4, inner / 4),
        (LEFT + inner / 2, inner / 2),
        (LEFT + 3 * inner / 4, inner / 4),
    ]
    assert view.bars[1].text == "trainers: train, 5 s"
    assert [text for _, text in view.borders] == ["iteration 3", "iteration 4"]
    assert [name for name, _ in view.legend] == ["rollout", "train"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_short_stages_and_iterations_begun_again(count: int) -> None:
    lines = [line(i, 5.0 * i, 5.0 * i + 5) for i in range(1, count + 1)]
    view = timeline_view([line(count, 900.0, 901.0), *lines])
    assert view is not None
    assert len(view.bars) == 2 * min(2, count)
    # The stage was entered again with iteration 2, and its seconds began anew.
    again = timeline_view([line(1, 50.0, 60.0), line(2, 0.0, 5.0)])
    assert again is not None
    assert (again.title, len(again.bars)) == ("Iteration 1", 2)


def test_report_draws_the_stage(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "job_1" / "attempt-1")
    writer.event("stage_started", "stage rl started", stage="rl")
    for step in (1, 2):
        writer.metrics("rl", step, {name: values[step] for name, values in CURVES.items() if step in values})
    folder = writer.folder / "stages" / "rl"
    folder.mkdir(parents=True)
    (folder / "timeline.jsonl").write_text("".join(f"{line(i, i, i + 1)}\n".replace("'", '"') for i in (1, 2)))
    spec = {"type": "rl", "name": "rl", "grpo": {"overlap": {"mode": "async", "max_staleness": 2}}}
    html = build_report(writer.folder, spec).read_text()
    assert "overlap async, 2 groups dropped as too old" in html
    for title in ("Idle share: rl", "Staleness: rl", "Samples by staleness: rl", "Iterations 1 and 2"):
        assert title in html
    # Drawn there and not once more among the curves.
    assert "Staleness mean" not in html
    assert html.count("<title>engines: rollout, 1 s</title>") == 2
