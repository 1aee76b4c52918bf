"""Geometry of the report's charts: figures in, SVG coordinates out. The template draws and escapes.

Coordinates are those of a viewBox of WIDTH x HEIGHT units with the plot area inside the margins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 30
MAX_POINTS = 300
"""Longer series are drawn as the means of this many bins."""

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5c00", "#56b4e9", "#000000")
"""Okabe and Ito's palette, told apart under common colour blindness, its yellow darkened for white paper."""
DASHES = ("", "7 2", "2 2", "9 2 2 2")
"""Lines differ in dashes too, so that one which lies on another shows through, and on black-and-white paper."""

Series = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One series: `points` for an SVG polyline, one per unbroken run of finite values; `dots` are runs of a single value."""

    name: str
    colour: str
    dash: str
    runs: tuple[str, ...]
    dots: tuple[tuple[float, float], ...]
    last: str


@dataclass(frozen=True)
class Chart:
    """A chart ready to be drawn. Ticks are (position, label)."""

    title: str
    note: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_label: str


@dataclass(frozen=True)
class Bars:
    """A histogram ready to be drawn. `bars` are (x, y, width, height, text for the pointer), ticks (position, label)."""

    title: str
    note: str
    bars: tuple[tuple[float, float, float, float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_label: str


def bar_chart(title: str, note: str, bins: Sequence[tuple[int, int, int]], x_label: str) -> Bars:
    """A histogram of `bins`: (lowest, highest, count) with both ends included, side by side from low to high."""
    low, high = bins[0][0], bins[-1][1] + 1
    top = max(count for *_, count in bins)

    def across(x: float) -> float:
        return round(LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(TOP + (top - y) / top * (HEIGHT - TOP - BOTTOM), 1)

    bars = []
    for first, last, count in bins:
        left, right, upper = across(first), across(last + 1), down(count)
        label = f"{first:,}" if first == last else f"{first:,}–{last:,}"
        bars.append((left, upper, max(0.5, round(right - left - 1, 1)), round(down(0) - upper, 1), f"{label}: {count:,}"))
    return Bars(
        title,
        note,
        tuple(bars),
        tuple((across(tick), figure(tick)) for tick in _ticks(low, high, 5, integers=True)),
        tuple((down(tick), figure(tick)) for tick in _ticks(0, top, 4, integers=True)),
        x_label,
    )


def line_chart(title: str, note: str, series: Mapping[str, Series], x_label: str = "step") -> Chart | None:
    """A chart of named series; None when no value is finite. Colours follow the order of `series`, absent ones included."""
    drawn = {name: _thinned(points) for name, points in series.items()}
    finite = [(x, y) for points in drawn.values() for x, y in points if math.isfinite(y)]
    if not finite:
        return None
    x_low, x_high = _span([x for x, _ in finite], 0.0)
    y_low, y_high = _span([y for _, y in finite], 0.04)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        down = TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    lines = []
    for index, (name, points) in enumerate(drawn.items()):
        runs = _runs(points)
        last = next((figure(y) for _, y in reversed(series[name]) if math.isfinite(y)), "–")
        lines.append(
            Line(
                name,
                COLOURS[index % len(COLOURS)],
                DASHES[index % len(DASHES)],
                tuple(" ".join(f"{a},{b}" for a, b in (place(*p) for p in run)) for run in runs if len(run) > 1),
                tuple(place(*run[0]) for run in runs if len(run) == 1),
                last,
            )
        )
    return Chart(
        title,
        note,
        tuple(line for line in lines if line.runs or line.dots),
        tuple((place(tick, y_low)[0], figure(tick)) for tick in _ticks(x_low, x_high, 5, integers=True)),
        tuple((place(x_low, tick)[1], figure(tick)) for tick in _ticks(y_low, y_high, 4, integers=False)),
        x_label,
    )


def round_ticks(low: float, high: float, about: int) -> list[float]:
    """About so many round numbers within low..high."""
    return _ticks(low, high, about, integers=False)


def figure(value: float) -> str:
    """A number in at most four significant digits: 0.1234, 12.34, 1,234, 2.5e-05."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}" if size < 1 else f"{value:.2f}".rstrip("0").rstrip(".")


def _thinned(points: Series) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return list(points)
    edges = [len(points) * i // MAX_POINTS for i in range(MAX_POINTS + 1)]
    bins = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]


def _runs(points: Series) -> list[list[tuple[float, float]]]:
    """Unbroken runs of finite values."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _span(values: Sequence[float], padding: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        margin = abs(low) * 0.1
        return (low - margin, high + margin) if margin else (0.0, 1.0)
    margin = padding * (high - low)
    return (max(0.0, low - margin) if low >= 0 else low - margin), high + margin


def _ticks(low: float, high: float, about: int, *, integers: bool) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) within low..high."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs(math.log(step / raw)))
    if integers:
        step = max(1.0, step)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
