"""Bars and curves of gates and ledgers, and their place in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sedsft.config import DataConfig
from sedsft.evaluation.gate import judged
from sedsft.gate_config import GateConfig
from services.exploration_report import gate_panels, ledger_charts
from services.loops.gate import _write
from services.report import build_report
from services.rundir import RunWriter

FIGURES = {
    "pass@1": 0.3, "pass@G": 0.8, "groups_with_variance": 0.5, "distinct_answers": 4.0, "self_bleu": 40.0, "token_entropy": 0.5,
}  # fmt: skip


def written(folder: Path) -> dict[str, Any]:
    config = GateConfig(data=DataConfig(path="rl.jsonl"), min_groups_with_variance=0.4)
    candidates = [judged("ce", FIGURES | {"groups_with_variance": 0.25}, config), judged("sed", FIGURES, config)]
    folder.mkdir(parents=True)
    _write(folder, config, {}, candidates, candidates[1])
    gate: dict[str, Any] = json.loads((folder / "gate.json").read_text())
    return gate


def test_bars_are_as_long_as_their_values(tmp_path: Path) -> None:
    panels = {panel.title: panel for panel in gate_panels(written(tmp_path / "gate"))}
    assert list(panels) == ["pass@G", "groups with variance", "distinct answers", "self bleu", "token entropy"]
    ce, sed = panels["groups with variance"].bars
    assert sed.width == 2 * ce.width
    assert (ce.outcome, ce.promoted, sed.outcome, sed.promoted) == ("wrong", False, "right", True)
    threshold = panels["groups with variance"].threshold
    assert threshold is not None
    x, text = threshold
    assert (round(x - panels["groups with variance"].left, 1), text) == (round(0.8 * sed.width, 1), "0.4")
    assert panels["pass@G"].threshold is None


def test_curves_of_a_ledger() -> None:
    def entry(iteration: int, pass_1: float) -> dict[str, Any]:
        return {"iteration": iteration, "pass@1": pass_1, "pass@4": 0.8, "token_entropy": None, "distinct_answers": 2.0}

    charts = ledger_charts({"rl": [entry(0, 0.25), entry(5, 0.5)]})
    assert [chart.title for chart in charts] == ["Probes of rl", "Distinct answers of the probes"]
    assert [(line.name, line.last) for line in charts[0].lines] == [("pass@1", "0.5"), ("pass@4", "0.8")]


def test_both_are_in_the_report(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "job_1" / "attempt-1")
    written(writer.folder / "stages" / "choose")
    (writer.folder / "stages" / "rl").mkdir()
    line = {"iteration": 0, "pass@1": 0.25, "pass@4": 0.8, "token_entropy": 0.5, "distinct_answers": 2.0}
    (writer.folder / "stages" / "rl" / "ledger.jsonl").write_text(json.dumps(line) + "\n")
    for step, values in ((0, {"ledger_pass@1": 0.25}), (1, {"reward": 0.1})):
        writer.metrics("rl", step, values)
    spec = {"type": "pipeline", "stages": [{"type": "gate", "name": "choose"}, {"type": "rl", "name": "rl"}]}
    html = build_report(writer.folder, spec).read_text(encoding="utf-8")
    assert "choose: sed promoted" in html
    assert "✗ not ready" in html
    assert "≥ 0.400" in html
    assert "most groups without variance" in html
    assert html.count('<h2 id="results"') == 0, "the gate's figures have a section of their own"
    assert "<figcaption>Probes of rl" in html
    assert "<figcaption>Reward" in html
    assert "<figcaption>Ledger" not in html
