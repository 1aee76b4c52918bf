from __future__ import annotations

import json
import re
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from services.report import build_report, cell
from services.rundir import CheckpointRecord, Result, RunWriter, StatusReason

SPEC: dict[str, Any] = {
    "type": "pipeline",
    "name": "demo",
    "metadata": {"owner": "<me>"},
    "stages": [
        {"type": "sft", "name": "ce"},
        {"type": "sft", "name": "sed"},
        {"type": "rl", "name": "rl-sed"},
        {"type": "eval", "name": "final"},
    ],
}


class _Tags(HTMLParser):
    """Checks that tags close in order and collects attributes that could load something."""

    VOID = frozenset(("meta", "line", "circle", "polyline", "br"))

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: set[str] = set()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def read(path: Path) -> tuple[str, _Tags]:
    html, tags = path.read_text(encoding="utf-8"), _Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    assert tags.loads == []
    assert "script" not in tags.names
    return html, tags


@pytest.fixture
def writer(tmp_path: Path) -> RunWriter:
    return RunWriter(tmp_path / "job_1" / "attempt-1")


def leave(writer: RunWriter, stage: str, file: str, value: Any) -> None:
    folder = writer.folder / "stages" / stage
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def whole_job(writer: RunWriter) -> None:
    for stage in ("ce", "sed", "rl-sed", "final"):
        writer.event("stage_started", f"stage {stage} started", stage=stage)
        for step in (1, 2, 3):
            if stage in ("ce", "sed"):
                writer.metrics(stage, step, {"loss": 1.0 / step, "ce": 0.9 / step, "entropy": 0.5})
            elif stage == "rl-sed":
                writer.metrics(
                    stage, step, {"reward": 0.1 * step, "seconds_rollout": 2.0, "seconds_train": 1.0, "novel_figure": 1.5}
                )
        if stage != "final":
            record = CheckpointRecord(stage, 3, f"/runs/{stage}/step-3", "ab" * 32)
            writer.event("checkpoint", f"published {record.path}", **asdict(record))
        writer.event("stage_ended", f"stage {stage} ended", stage=stage)
    calibration = {
        "tau": 0.9, "mask_ratio": 0.7, "top_k": 2, "num_tokens": 1234, "realised_mask_share": 0.7,
        "quantiles": [i / 10 for i in range(11)],
    }  # fmt: skip
    leave(writer, "sed", "calibration.json", calibration)
    tokens = [
        {"text": "<|user|>", "trained": False, "p": None, "mass": None, "active": False},
        {"text": "7\n", "trained": True, "p": 0.9, "mass": 0.5, "active": True},
        {"text": "=", "trained": True, "p": 0.99, "mass": 0.99, "active": False},
    ]
    leave(writer, "sed", "tokens.json", {"tau": 0.9, "top_k": 2, "rows": [{"line": 4, "tokens": tokens}]})
    leave(writer, "rl-sed", "readiness.json", {"prompts": 32, "pass@1": 0.25, "token_entropy": None})
    row = {"model": "sed", "avg": 0.4567, "self_bleu": 43.21, "timeout": 1, "self_bleu_signature": "nrefs:7"}
    table = {"columns": ["model", "benchmark", "avg", "self_bleu", "timeout"]}
    leave(writer, "final", "table.json", table | {"rows": [row | {"benchmark": "3"}, row | {"benchmark": "mean"}]})
    responses = [
        {"text": "<img src=x onerror=alert(1)>", "reward": 1.0, "status": "scored"},
        {"text": "y" * 5000, "reward": 0.0, "status": "timeout"},
    ]
    sample = {"model": "sed", "benchmark": "3", "problem": "1 2 3>6", "answer": "</div>", "responses": responses}
    leave(writer, "final", "samples.json", [sample])


def test_whole_job(writer: RunWriter) -> None:
    whole_job(writer)
    html, _ = read(build_report(writer.folder, SPEC))
    assert '<span class="badge succeeded">succeeded</span>' in html, "built before the terminal record, as the driver does"
    assert "3 checkpoints" in html
    for stage in ("ce", "sed", "rl-sed"):
        assert f"{stage}, step 3: <code>/runs/{stage}/step-3</code>" in html
    writer.result(Result("succeeded"))
    path = build_report(writer.folder, SPEC)
    assert path == writer.folder / "report.html"
    html, _ = read(path)
    assert '<span class="badge succeeded">succeeded</span>' in html
    for title in ("Loss", "Reward", "Novel figure", "Seconds per phase: rl-sed", "Top-k mass before training"):
        assert f"<figcaption>{title}" in html
    loss_chart = next(part for part in html.split("<figure>") if part.startswith("\n<figcaption>Loss"))
    assert loss_chart.count("<polyline") == 2
    assert ">ce <" in loss_chart
    assert ">sed <" in loss_chart
    assert '<tr class="mean">' in html
    assert "43.2<" in html
    assert "(nrefs:7)" in html
    assert "1 of 2 trained tokens active" in html
    assert 'title="p 0.9000 · top-2 mass 0.5000"' in html
    assert "1 of 2 right" in html
    assert "1,000 more characters" in html
    assert "&lt;img src=x onerror=alert(1)&gt;" in html
    assert "&lt;me&gt;" in html


def test_failed_midway_without_a_terminal_record(writer: RunWriter) -> None:
    writer.event("stage_started", "stage ce started", stage="ce")
    writer.metrics("ce", 1, {"loss": 2.0, "ce": float("nan")})
    writer.event("failed", "expected a finite loss, got nan", code="diverged")
    html, _ = read(build_report(writer.folder, SPEC))
    assert '<span class="badge failed">failed</span>' in html
    assert "<strong>diverged</strong>: expected a finite loss, got nan" in html
    assert "did not end" in html
    assert html.count("not started") == 3
    assert '<td class="error"><strong>failed</strong></td>' in html


def test_empty_folder_and_single_stage_job(tmp_path: Path) -> None:
    folder = tmp_path / "job_2" / "attempt-1"
    folder.mkdir(parents=True)
    html, _ = read(build_report(folder, {"type": "sft", "name": "solo"}))
    assert '<span class="badge unfinished">unfinished</span>' in html
    assert "solo" in html


def test_terminal_record_wins_over_events(writer: RunWriter) -> None:
    writer.event("failed", "first", code="internal")
    writer.result(Result("cancelled", StatusReason("cancelled", "stopped on request")))
    html, _ = read(build_report(writer.folder, SPEC))
    assert '<span class="badge cancelled">cancelled</span>' in html
    assert "stopped on request" in html


def test_damaged_files_are_shown(writer: RunWriter) -> None:
    whole_job(writer)
    leave(writer, "final", "table.json", '{"columns": [')
    with (writer.folder / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    html, _ = read(build_report(writer.folder, SPEC))
    assert len(re.findall("<strong>Damaged file</strong>", html)) == 2
    assert "stages/final/table.json" in html


@pytest.mark.parametrize(
    ("value", "column", "text"),
    [
        (None, "avg", "–"),
        (0.45678, "avg", "0.457"),
        (43.21, "self_bleu", "43.2"),
        (1200, "scored", "1,200"),
        ("x", "model", "x"),
    ],
)
def test_cells(value: Any, column: str, text: str) -> None:
    assert cell(value, column) == text
