"""What the report draws of sampling beside training: idle shares, how old samples are, and a timeline of two iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.charts import COLOURS, Bars, Chart, Series, bar_chart, figure, line_chart, round_ticks

OVERLAP_FIGURES = (
    *("iteration_s", "engines_busy_s", "engines_idle_s", "trainers_busy_s", "trainers_idle_s", "staleness_", "samples_stale_"),
    *("groups_submitted", "groups_accepted", "groups_dropped", "groups_running"),
)
"""What the names of these figures begin with among those of the iterations."""
WIDTH, LANE_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 34, 64, 12, 18, 30
SHOWN_ITERATIONS = 2
_LANES = ("engines", "scorers", "trainers")
_COLOURS = dict(zip(("rollout", "train", "score", "ledger", "sync"), COLOURS, strict=False))
_AGES = "samples_stale_"

Curves = Mapping[str, Mapping[int, float]]


@dataclass(frozen=True)
class TimelineBar:
    """A stretch of work."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    text: str


@dataclass(frozen=True)
class TimelineView:
    """Iterations as lanes of bars. `lanes` are (y of the text, name), `borders` (x, text) of the iterations' beginnings."""

    title: str
    height: int
    lanes: tuple[tuple[float, str], ...]
    bars: tuple[TimelineBar, ...]
    borders: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    legend: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class OverlapView:
    """All of one stage."""

    stage: str
    mode: str
    timeline: TimelineView | None
    charts: tuple[Chart, ...]
    ages: Bars | None
    dropped: int


def overlap_view(stage: str, mode: str, curves: Curves, lines: Sequence[Mapping[str, Any]]) -> OverlapView | None:
    """What an RL stage has left in its figures and in timeline.jsonl; None when it has no iteration behind it."""
    if not curves.get("iteration_s"):
        return None
    idle = {lane: _share(curves, f"{lane}_idle_s") for lane in ("engines", "trainers")}
    means = ", ".join(f"{lane} {_mean(series):.2f}" for lane, series in idle.items())
    charts = [
        line_chart(f"Idle share: {stage}", f"of an iteration's time; mean {means}", idle, "iteration"),
        line_chart(
            f"Staleness: {stage}",
            "updates between drawing and use",
            {name: sorted(curves.get(f"staleness_{name}", {}).items()) for name in ("mean", "max")},
            "iteration",
        ),
    ]
    ages = {int(name.removeprefix(_AGES)): sum(values.values()) for name, values in curves.items() if name.startswith(_AGES)}
    bins = [(age, age, int(ages.get(age, 0))) for age in range(max(ages) + 1)] if ages else []
    return OverlapView(
        stage,
        mode,
        timeline_view(lines),
        tuple(chart for chart in charts if chart is not None),
        bar_chart(f"Samples by staleness: {stage}", "all iterations", bins, "updates") if bins else None,
        int(max(curves.get("groups_dropped", {0: 0.0}).values())),
    )


def _share(curves: Curves, name: str) -> Series:
    whole = curves["iteration_s"]
    return sorted((step, value / whole[step]) for step, value in curves.get(name, {}).items() if whole.get(step))


def _mean(series: Series) -> float:
    return sum(value for _, value in series) / max(len(series), 1)


def timeline_view(lines: Sequence[Mapping[str, Any]]) -> TimelineView | None:
    """Two iterations from the middle of a stage; of iterations that were begun again, the last time."""
    last = {line["iteration"]: line for line in lines}
    numbers = sorted(last)
    start = max(0, (len(numbers) - SHOWN_ITERATIONS + 1) // 2)
    shown = [last[number] for number in numbers[start : start + SHOWN_ITERATIONS]]
    # A stage that was entered again counts its seconds anew.
    shown = [line for line in shown if line["start_s"] >= shown[0]["start_s"]]
    if not shown:
        return None
    from_s = float(shown[0]["start_s"])
    whole_s = max(float(shown[-1]["end_s"]) - from_s, 1e-6)

    def across(at_s: float) -> float:
        return round(LEFT + (at_s - from_s) / whole_s * (WIDTH - LEFT - RIGHT), 1)

    bars = []
    for line in shown:
        for lane, name, start_s, end_s in line["spans"]:
            x, y = across(start_s), TOP + _LANES.index(lane) * LANE_HEIGHT + 4
            text = f"{lane}: {name}, {figure(end_s - start_s)} s"
            width = max(0.5, round(across(end_s) - x, 1))
            bars.append(TimelineBar(x, y, width, LANE_HEIGHT - 8, _COLOURS.get(name, COLOURS[-1]), text))
    height = TOP + len(_LANES) * LANE_HEIGHT + BOTTOM
    names = dict.fromkeys(name for line in shown for _, name, *_ in line["spans"])
    return TimelineView(
        f"Iterations {shown[0]['iteration']} and {shown[-1]['iteration']}" if len(shown) > 1 else f"Iteration {numbers[start]}",
        height,
        tuple((TOP + (index + 0.5) * LANE_HEIGHT + 4, lane) for index, lane in enumerate(_LANES)),
        tuple(bars),
        tuple((across(line["start_s"]), f"iteration {line['iteration']}") for line in shown),
        tuple((across(from_s + tick), figure(tick)) for tick in round_ticks(0.0, whole_s, 8)),
        tuple((name, _COLOURS.get(name, COLOURS[-1])) for name in names),
    )
