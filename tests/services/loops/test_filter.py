"""What the difficulty filter decides and writes; the stage itself runs in tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sedsft.config import DataConfig, FilterConfig
from sedsft.data.sources import read_prompt_rows
from sedsft.records import Prompt, RolloutGroup, Row, Sample, Score
from services.loops.filter import COUNTS, _taken_over, artifact_row, judged
from services.run import FILTERED_ROWS, Run

CONFIG = FilterConfig(data=DataConfig(path="unused.jsonl"), samples=4, low=0.25, high=0.5)
RIGHT, WRONG, LATE = Score(1.0, "scored"), Score(0.0, "scored"), Score(float("nan"), "timeout")


@pytest.mark.parametrize(
    ("scores", "fate", "right", "scored"),
    [
        ([RIGHT, WRONG, WRONG, WRONG], "kept", 1, 4),
        ([RIGHT, RIGHT, WRONG, WRONG], "kept", 2, 4),
        ([RIGHT, RIGHT, RIGHT, WRONG], "outside", 3, 4),
        ([RIGHT] * 4, "all_right", 4, 4),
        ([WRONG] * 4, "all_wrong", 0, 4),
        ([RIGHT, WRONG, LATE, LATE], "kept", 1, 2),
        ([RIGHT, LATE, LATE, LATE], "all_right", 1, 1),
        ([LATE] * 4, "unscored", 0, 0),
        # A bonus for the form of a wrong answer does not make it right.
        ([Score(0.2, "scored", correct=False)] * 4, "all_wrong", 0, 4),
    ],
)
def test_fate_of_a_prompt(scores: list[Score], fate: str, right: int, scored: int) -> None:
    sample = Sample((1,), (-0.5,), "", False, 1)
    group = RolloutGroup(Prompt((1,), "1", "2", 0), (sample,) * len(scores), tuple(scores))
    assert judged(group, CONFIG) == (fate, {"right": right, "scored": scored})


def test_kept_rows_read_back_as_they_were(tmp_path: Path) -> None:
    turns = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1 = ?\n„zwei“"})
    rows = [Row(turns, "2", 7, "a.jsonl", "math_dapo"), Row(turns[1:], "\\frac{1}{2}", 9, "b.jsonl")]
    written = [json.dumps(artifact_row(row, {"right": 1, "scored": 4}), ensure_ascii=False) for row in rows]
    (tmp_path / FILTERED_ROWS).write_text("\n".join(written) + "\n", encoding="utf-8")
    found = read_prompt_rows(DataConfig(path=str(tmp_path / FILTERED_ROWS))).rows
    assert [(row.messages, row.answer, row.data_source) for row in found] == [
        (row.messages, row.answer, row.data_source) for row in rows
    ]


class Attempt:
    """As much of a run as taking over asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events = folder, []

    def event(self, kind: str, message: str, /, **data: object) -> None:
        self.events.append(kind)

    data = Run.data


def test_a_later_attempt_takes_over_only_what_is_complete(tmp_path: Path) -> None:
    folders = [tmp_path / f"attempt-{number}" / "stages" / "hard" for number in (1, 2, 3, 4)]
    for number, folder in enumerate(folders, start=1):
        folder.mkdir(parents=True)
        if number < 4:
            (folder / FILTERED_ROWS).write_text(str(number))
        if number < 3:
            (folder / "table.json").write_text("{}")
            (folder / COUNTS).write_text("{}")
    run = Attempt(tmp_path / "attempt-4")
    assert _taken_over(run, "hard", folders[3])  # type: ignore[arg-type]
    assert (folders[3] / FILTERED_ROWS).read_text() == "2"
    assert run.events == ["filter_taken_over"]
    assert run.data(DataConfig(path="stage:hard")).path == str(folders[3] / FILTERED_ROWS)
    assert run.data(DataConfig(path="/x/rows.jsonl")).path == "/x/rows.jsonl"
    first = Attempt(tmp_path / "attempt-1")
    assert not _taken_over(first, "hard", folders[0])  # type: ignore[arg-type]
