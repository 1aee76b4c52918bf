from __future__ import annotations

import math

import pytest

from services.charts import BOTTOM, HEIGHT, LEFT, MAX_POINTS, RIGHT, TOP, WIDTH, bar_chart, figure, line_chart


def test_corners_of_the_plot() -> None:
    chart = line_chart("Loss", "", {"a": [(0, 0.0), (10, 100.0)]})
    assert chart is not None
    (start, end) = [tuple(map(float, point.split(","))) for point in chart.lines[0].runs[0].split()]
    assert start == (LEFT, HEIGHT - BOTTOM)
    assert end[0] == WIDTH - RIGHT
    assert end[1] == pytest.approx(TOP + (HEIGHT - TOP - BOTTOM) * 0.04 / 1.04, abs=0.1)
    assert [label for _, label in chart.x_ticks] == ["0", "2", "4", "6", "8", "10"]


def test_values_that_are_not_finite_break_the_line() -> None:
    chart = line_chart("x", "", {"a": [(1, 1.0), (2, 2.0), (3, math.nan), (4, 4.0), (5, math.inf)]})
    assert chart is not None
    line = chart.lines[0]
    assert (len(line.runs), len(line.dots), line.last) == (1, 1, "4")
    assert line_chart("x", "", {"a": [(1, math.nan)], "b": []}) is None


def test_colours_do_not_move_when_a_series_is_absent() -> None:
    both = line_chart("x", "", {"a": [(1, 1.0)], "b": [(1, 2.0)]})
    second = line_chart("x", "", {"a": [], "b": [(1, 2.0)]})
    assert both is not None
    assert second is not None
    assert [line.colour for line in second.lines] == [both.lines[1].colour]


def test_constant_and_long_series() -> None:
    constant = line_chart("x", "", {"a": [(1, 0.0), (2, 0.0)]})
    assert constant is not None
    assert all(label.lstrip("-") == label for _, label in constant.y_ticks)
    long = line_chart("x", "", {"a": [(i, float(i)) for i in range(10 * MAX_POINTS)]})
    assert long is not None
    assert len(long.lines[0].runs[0].split()) == MAX_POINTS


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.12345, "0.1235"), (12.345, "12.35"), (1234.5, "1,234"), (2e-05, "2e-05"), (3.0, "3")]
)
def test_figures(value: float, text: str) -> None:
    assert figure(value) == text


def test_bars_stand_side_by_side_on_the_axis_and_the_highest_fills_the_plot() -> None:
    chart = bar_chart("Lengths", "", [(1, 5, 10), (6, 10, 0), (11, 15, 20)], "tokens")
    third = (WIDTH - LEFT - RIGHT) / 3
    assert [bar[0] for bar in chart.bars] == [pytest.approx(LEFT + i * third, abs=0.1) for i in range(3)]
    assert [bar[3] for bar in chart.bars] == [(HEIGHT - TOP - BOTTOM) / 2, 0, HEIGHT - TOP - BOTTOM]
    assert all(bar[1] + bar[3] == HEIGHT - BOTTOM for bar in chart.bars)
    assert [bar[4] for bar in chart.bars] == ["1–5: 10", "6–10: 0", "11–15: 20"]
    assert [label for _, label in bar_chart("x", "", [(3, 3, 1)], "").y_ticks] == ["0", "1"]
