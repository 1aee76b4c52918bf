"""What the report draws of gates and exploration ledgers: bars with thresholds, and curves over the iterations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, figure, line_chart

LEDGER_FIGURES = "ledger_"
"""What the names of a ledger's figures begin with among those of the iterations."""
GATE_FIGURES = ("pass@G", "groups_with_variance", "distinct_answers", "self_bleu", "token_entropy")
_NAMES_WIDTH, _VALUE_WIDTH = 60, 50
_LABEL_CHARS = 16


@dataclass(frozen=True)
class GateBar:
    """A candidate's figure. `outcome` is "right" or "wrong" by its threshold; `promoted` marks the winner."""

    label: str
    y: float
    width: float
    height: float
    value: str
    outcome: str
    promoted: bool


@dataclass(frozen=True)
class GatePanel:
    """One figure of all candidates; `threshold` is where its line stands, and its text."""

    title: str
    left: float
    bars: tuple[GateBar, ...]
    threshold: tuple[float, str] | None


def gate_panels(gate: Mapping[str, Any]) -> list[GatePanel]:
    """A panel per figure from what a gate has left in gate.json."""
    panels = []
    for label in GATE_FIGURES:
        values = [candidate["figures"].get(label) for candidate in gate["candidates"]]
        threshold = gate["thresholds"].get(label)
        top = max([value for value in [*values, threshold] if value is not None], default=0.0)
        if top > 0:
            panels.append(_panel(label, gate, threshold, top))
    return panels


def _panel(label: str, gate: Mapping[str, Any], threshold: float | None, top: float) -> GatePanel:
    left, candidates = LEFT + _NAMES_WIDTH, gate["candidates"]
    pitch = (HEIGHT - 2 * TOP) / len(candidates)
    scale = (WIDTH - RIGHT - _VALUE_WIDTH - left) / top
    bars = []
    for index, candidate in enumerate(candidates):
        value, name = candidate["figures"].get(label), candidate["name"]
        missed = any(miss["figure"] == label for miss in candidate["misses"])
        bars.append(
            GateBar(
                name if len(name) <= _LABEL_CHARS else "…" + name[1 - _LABEL_CHARS :],
                round(TOP + pitch * index + 0.2 * pitch, 1),
                round(max(0.5, (value or 0.0) * scale), 1),
                round(0.6 * pitch, 1),
                "–" if value is None else figure(value),
                "wrong" if missed else "right",
                name == gate["winner"],
            )
        )
    line = None if threshold is None else (round(left + threshold * scale, 1), figure(threshold))
    return GatePanel(label.replace("_", " "), left, tuple(bars), line)


def ledger_charts(ledgers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Chart]:
    """pass@1 and pass@k of each stage in a chart of its own, entropy and distinct answers of all stages in one each."""
    charts = []
    for stage, entries in ledgers.items():
        rates = dict.fromkeys(name for entry in entries for name in entry if name.startswith("pass@"))
        charts.append(line_chart(f"Probes of {stage}", "fixed prompts and seeds", {r: _series(entries, r) for r in rates}, _X))
    for name, title in (("token_entropy", "Entropy of the probes"), ("distinct_answers", "Distinct answers of the probes")):
        note = "nats per token" if name == "token_entropy" else "per prompt"
        charts.append(line_chart(title, note, {stage: _series(entries, name) for stage, entries in ledgers.items()}, _X))
    return [chart for chart in charts if chart is not None]


_X = "iteration"


def _series(entries: Sequence[Mapping[str, Any]], name: str) -> Series:
    return [(entry["iteration"], entry[name]) for entry in entries if entry.get(name) is not None]
