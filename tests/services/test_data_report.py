"""What a stage leaves on its rows before training, its place in the job's report, and the same from the command line."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sedsft.data.files import read_values
from sedsft.tasks.tiny_model import countdown_tokenizer
from services.data_report import benchmark_problems, main
from services.jobspec import JOB_SPEC, SFTStage, stages_of
from services.loops.sft_data import sft_examples
from services.report import build_report
from services.run import Run

LEAK = "3 7 2 5>24"


def spec(root: Path, **sft: Any) -> dict[str, Any]:
    """Eleven rows of which one is bad, one repeats another and two hold the benchmark's first problem."""
    countdown_tokenizer().save_pretrained(root / "model")
    questions = [LEAK, *(f"{n} 7>{n + 7}" for n in range(1, 9)), LEAK]
    rows = [json.dumps({"prompt": question, "completion": "7+3=10"}) + "\n" for question in questions]
    (root / "rows.jsonl").write_text("".join(rows) + "<script>\n", encoding="utf-8")
    (root / "held_out.jsonl").write_text(rows[1], encoding="utf-8")
    (root / "bench.jsonl").write_text(
        "".join(json.dumps({"problem": problem, "answer": "1"}) + "\n" for problem in (LEAK, "9 9 9>27")), encoding="utf-8"
    )
    data = {"path": str(root / "rows.jsonl"), "on_bad_row": "skip"}
    stage = {"objective": {"type": "ce"}, "data": data, "steps": 1, "max_length": 100} | sft
    benchmark = {"name": "countdown", "path": str(root / "bench.jsonl")}
    return {
        "type": "pipeline",
        "name": "demo",
        "stages": [
            {"type": "sft", "name": "tune", "model": {"path": str(root / "model")}, "sft": stage},
            {"type": "eval", "name": "test", "models": {"a": {"stage": "tune"}}, "eval": {"benchmarks": [benchmark]}},
        ],
    }


class _Page(HTMLParser):
    """Text of a page, and whether its tags close and load nothing."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        assert not [name for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")]
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "line", "rect", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_stage(tmp_path: Path, job: dict[str, Any]) -> Path:
    """Read the rows of the job's SFT stage as the stage does, and give the attempt's folder."""
    parsed = JOB_SPEC.validate_python(job)
    stage = stages_of(parsed)[0]
    assert isinstance(stage, SFTStage)
    run = Run(tmp_path / "job_1" / "attempt-1", parsed)
    with run.stage(0, stage.name) as folder:
        sft_examples(run, stage.sft, folder, tmp_path / "model")
    run.finish("succeeded", None)
    return run.folder


def test_a_stage_leaves_files_events_and_a_section_of_the_jobs_report(tmp_path: Path) -> None:
    job = spec(tmp_path)
    attempt = read_stage(tmp_path, job)
    folder = attempt / "stages" / "tune"
    parts = json.loads((folder / "data_report.json").read_text())
    assert set(parts) == {"training"}
    training = parts["training"]
    assert [training[name] for name in ("rows_read", "kept", "skipped", "dropped", "cut")] == [11, 10, 1, 0, 0]
    assert (training["duplicates"], training["listed_duplicates"]) == (1, [{"place": "line 10", "first": "line 1"}])
    events = {placed.value["kind"]: placed.value for placed in read_values(str(attempt / "events.jsonl"), None)}  # type: ignore[index]
    assert events["data_report"]["data"]["reasons"] == {"invalid_json": 1}
    assert events["data_report"]["data"]["rows_read"] == 11
    assert "11 rows read = 10 kept + 1 skipped + 0 dropped" in events["data_report"]["message"]
    warning = events["warning"]
    assert (warning["data"]["about"], warning["data"]["ngram"], warning["data"]["rows"]) == ("benchmark_overlap", 1, 2)
    assert "1 of 2 problems of countdown share" in warning["message"]
    for path in (folder / "data_report.html", build_report(attempt, job)):
        page = _Page(path)
        assert "11 rows read = 10 kept + 1 skipped + 0 dropped as too long" in page.text
        assert "<bos> 3 7 2 5 > 24 :" in page.text
        assert "7 + 3 = 10 <eos>" in page.text
        assert "expected JSON, got" in page.text
        assert "line 10 repeats line 1" in page.text
        assert "line 1: problem 1, whole" in page.text


def test_held_out_rows_of_their_own_are_a_part_without_overlap(tmp_path: Path) -> None:
    job = spec(tmp_path, held_out={"path": str(tmp_path / "held_out.jsonl")})
    attempt = read_stage(tmp_path, job)
    parts = json.loads((attempt / "stages" / "tune" / "data_report.json").read_text())
    assert (parts["held_out"]["kept"], parts["held_out"]["overlap"]) == (1, [])
    assert parts["training"]["overlap"][0]["exact"] == 1


def test_benchmarks_are_read_once_and_told_apart_by_stage(tmp_path: Path) -> None:
    job = spec(tmp_path)
    first = job["stages"][1]
    same = {"name": "countdown", "path": str(tmp_path / "bench.jsonl")}
    part = same | {"max_rows": 1}
    job["stages"].append(first | {"name": "again", "eval": {"benchmarks": [same]}})
    assert list(benchmark_problems(JOB_SPEC.validate_python(job))) == ["countdown"]
    job["stages"].append(first | {"name": "part", "eval": {"benchmarks": [part]}})
    problems = benchmark_problems(JOB_SPEC.validate_python(job))
    assert {name: len(texts) for name, texts in problems.items()} == {"test/countdown": 2, "part/countdown": 1}
    assert benchmark_problems(JOB_SPEC.validate_python(job["stages"][0])) == {}


def test_the_command_line_reports_what_a_job_would_be_refused_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job, path, out = spec(tmp_path), tmp_path / "spec.json", tmp_path / "out"
    path.write_text(json.dumps(job))
    assert main([str(path), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "tune, training rows: 11 read = 10 kept + 1 skipped + 0 dropped, 0 cut, 1 repeated" in told
    assert "line 11: invalid_json: expected JSON" in told
    assert "1 of 2 problems of countdown share" in told
    assert _Page(out / "tune" / "data_report.html").text
    job["stages"][0]["sft"]["data"]["on_bad_row"] = "error"
    path.write_text(json.dumps(job))
    assert main([str(path), "--out", str(out)]) == 1
    path.write_text("{}")
    assert main([str(path), "--out", str(out)]) == 1
    assert capsys.readouterr().err.startswith("error ")
