"""What the gate probes, writes and takes over; the stage itself runs in tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sedsft.config import DataConfig
from sedsft.evaluation.gate import Candidate, judged
from sedsft.gate_config import GateConfig
from sedsft.records import Row
from services.loops.gate import GATE, _drawn, _taken_over, _write

CONFIG = GateConfig(data=DataConfig(path="unused.jsonl"), prompts=3, min_entropy=0.4, seed=1)
FIGURES = {"pass@G": 0.8, "groups_with_variance": 0.6, "distinct_answers": 4.0, "self_bleu": 40.0, "token_entropy": 0.5}
IDENTITY = {"sha256": {"ce": "1", "sed": "2"}}


def candidates() -> list[Candidate]:
    return [judged("ce", FIGURES | {"token_entropy": 0.1}, CONFIG), judged("sed", FIGURES, CONFIG)]


def test_prompts_are_drawn_from_all_rows_and_by_the_seed_alone() -> None:
    rows = [Row(({"role": "user", "content": str(line)},), "1", line) for line in range(100)]
    drawn = [row.line for row in _drawn(rows, CONFIG)]
    assert len(set(drawn)) == 3
    assert drawn == sorted(drawn) == [row.line for row in _drawn(rows, CONFIG)]
    assert drawn != [row.line for row in _drawn(rows, CONFIG.model_copy(update={"seed": 2}))]
    assert max(drawn) > 3
    assert _drawn(rows[:2], CONFIG) == rows[:2]


def test_what_is_written_names_winner_thresholds_and_misses(tmp_path: Path) -> None:
    ce, sed = candidates()
    _write(tmp_path, CONFIG, IDENTITY, [ce, sed], sed)
    gate = json.loads((tmp_path / GATE).read_text())
    assert (gate["winner"], gate["thresholds"], gate["rank_by"]) == ("sed", {"token_entropy": 0.4}, "groups_with_variance")
    assert [miss["figure"] for candidate in gate["candidates"] for miss in candidate["misses"]] == ["token_entropy"]
    table = json.loads((tmp_path / "table.json").read_text())
    assert [(row["candidate"], row["passed"], row["promoted"]) for row in table["rows"]] == [
        ("ce", False, False),
        ("sed", True, True),
    ]


class Attempt:
    """As much of a run as taking over asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.events = folder, []

    def event(self, kind: str, message: str, /, **data: Any) -> None:
        self.events.append(kind)


def test_only_a_decision_about_the_same_weights_is_taken_over(tmp_path: Path) -> None:
    ce, sed = candidates()
    folders = [tmp_path / f"attempt-{number}" / "stages" / "gate" for number in (1, 2, 3, 4)]
    for folder in folders:
        folder.mkdir(parents=True)
    _write(folders[0], CONFIG, IDENTITY, [ce, sed], sed)
    _write(folders[1], CONFIG, IDENTITY, [ce], None)
    _write(folders[2], CONFIG, {"sha256": {"ce": "1", "sed": "3"}}, [ce, sed], sed)
    run = Attempt(tmp_path / "attempt-4")
    assert _taken_over(run, "gate", folders[3], {"sha256": {}}) is None  # type: ignore[arg-type]
    assert _taken_over(run, "gate", folders[3], IDENTITY) == "sed"  # type: ignore[arg-type]
    assert run.events == ["gate_taken_over"]
    assert (folders[3] / GATE).read_text() == (folders[0] / GATE).read_text()
    # A stage that is entered again within its attempt finds its own.
    assert _taken_over(run, "gate", folders[3], IDENTITY) == "sed"  # type: ignore[arg-type]
