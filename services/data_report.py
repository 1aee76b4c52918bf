"""The report on a stage's rows before any worker starts: JSON, a page of its own, and figures for the job's report.

    python -m services.data_report SPEC [--out folder]

checks the rows of every SFT stage of a job spec without starting anything; paths are those of this machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from sedsft.config import DataConfig, SFTConfig
from sedsft.data import DataFileError, TokenizerError
from sedsft.data.chat import load_tokenizer
from sedsft.data.encoding import EncodeSettings
from sedsft.data.ingest import StoredRows, store_rows
from sedsft.data.lengths import LengthLimit
from sedsft.data.overlap import NGRAM_WORDS, BenchmarkOverlap, OverlapScan
from sedsft.data.report import DataReport, build_data_report
from sedsft.data.sources import read_benchmark
from services.charts import Bars, bar_chart
from services.jobspec import JOB_SPEC, EvalStage, JobSpec, SFTStage, model_refs, stages_of
from services.run import Run
from services.rundir import write_atomically

LISTED_ROWS = 200
"""Bad rows on a page."""
_TITLES = {"training": "Training rows", "held_out": "Held-out rows"}


def benchmark_problems(spec: JobSpec) -> dict[str, tuple[str, ...]]:
    """Texts of the problems that the job evaluates on, by the benchmark's name; behind the stage's where names meet."""
    stages = [stage for stage in stages_of(spec) if isinstance(stage, EvalStage)]
    sources = {(b.path, b.max_rows): (stage.name, b) for stage in reversed(stages) for b in reversed(stage.eval.benchmarks)}
    names = [benchmark.name for _, benchmark in sources.values()]
    return {
        benchmark.name if names.count(benchmark.name) == 1 else f"{stage}/{benchmark.name}": tuple(
            row.messages[-1]["content"] for row in read_benchmark(benchmark.path, benchmark.max_rows)
        )
        for stage, benchmark in reversed(sources.values())
    }


def report_data(run: Run, folder: Path, rows: StoredRows, held_out: StoredRows | None, model_path: Path) -> None:
    """Leave the report on the rows of a stage in its `folder`, its key figures in an event, and overlap in a warning.

    `held_out` are rows of their own, if the stage has them.
    """
    reports = data_reports(run.spec, rows, held_out, load_tokenizer(model_path))
    write_data_report(folder, reports)
    for part, report in reports.items():
        fates = f"{report.kept} kept + {report.skipped} skipped + {report.dropped} dropped"
        run.event("data_report", f"{report.source}: {report.rows_read} rows read = {fates}", part=part, **report.key_figures())
        for own in report.overlap:
            if own.ngram:
                run.event("warning", f"{report.source}: {overlap_message(own)}", about="benchmark_overlap", **asdict(own))


def overlap_message(overlap: BenchmarkOverlap) -> str:
    """What was found of a benchmark, and what to do."""
    return (
        f"{overlap.ngram} of {overlap.problems} problems of {overlap.benchmark} share {NGRAM_WORDS} words in a row, or all of "
        f"fewer, with {overlap.rows} training rows, {overlap.exact} stand there whole; remove these rows, or do not rely on "
        "this benchmark"
    )


def data_reports(
    spec: JobSpec, rows: StoredRows, held_out: StoredRows | None, tokenizer: PreTrainedTokenizerBase
) -> dict[str, DataReport]:
    """Reports by part. Training rows are compared with the job's benchmarks; `held_out` is not trained on."""
    problems = benchmark_problems(spec)
    reports = {"training": build_data_report(rows, tokenizer, OverlapScan(problems) if problems else None)}
    if held_out is not None:
        reports["held_out"] = build_data_report(held_out, tokenizer)
    return reports


def write_data_report(folder: Path, reports: Mapping[str, DataReport]) -> None:
    """Write data_report.json and data_report.html into `folder`, whose name is the stage's."""
    parts = {part: report.as_dict() for part, report in reports.items()}
    write_atomically(folder / "data_report.json", json.dumps(parts, indent=1, allow_nan=False))
    environment = template_environment()
    page = environment.get_template("data_report.html.jinja").render(
        name=folder.name,
        parts=parts,
        built=datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_atomically(folder / "data_report.html", page)


def template_environment() -> Environment:
    """Templates of this room, with what shows a data report in any of them."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["length_charts"] = length_charts
    environment.globals |= {"ngram_words": NGRAM_WORDS, "data_titles": _TITLES, "listed_rows": LISTED_ROWS}
    return environment


def length_charts(part: Mapping[str, Any]) -> list[Bars]:
    """Histograms of one part of data_report.json."""

    def bins(lengths: Mapping[str, Any]) -> list[tuple[int, int, int]]:
        return [(own["low"], own["high"], own["rows"]) for own in lengths["histogram"]]

    return [
        bar_chart("Row lengths", "rows by tokens", bins(part["tokens"]), "tokens"),
        bar_chart("Trained tokens", "rows by tokens that carry a loss", bins(part["trained"]), "tokens"),
    ]


def check_data(spec: JobSpec, out: Path) -> int:
    """Write the reports of every SFT stage below `out` and say what was found; how many rows the job would be refused for."""
    refused = 0
    models: dict[str, Path] = {}
    for stage in stages_of(spec):
        if isinstance(stage, EvalStage):
            continue
        # The tokenizer of a checkpoint is that of the model it began with; which one a gate will promote is not known yet.
        ref = model_refs(stage)[0]
        models[stage.name] = Path(ref.path) if ref.path is not None else models[str(ref.stage)]
        if not isinstance(stage, SFTStage):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            rows = _all_rows(stage.sft, stage.sft.data, models[stage.name], Path(scratch, "training.arrow"))
            held_out = None
            if stage.sft.held_out is not None:
                held_out = _all_rows(stage.sft, stage.sft.held_out, models[stage.name], Path(scratch, "held_out.arrow"))
            reports = data_reports(spec, rows, held_out, load_tokenizer(models[stage.name]))
        folder = out / stage.name
        folder.mkdir(parents=True, exist_ok=True)
        write_data_report(folder, reports)
        for part, report in reports.items():
            data = stage.sft.data if part == "training" else stage.sft.held_out
            assert data is not None, "expected settings for every part"
            refused += report.skipped if data.on_bad_row == "error" else 0
            refused += report.dropped if stage.sft.on_too_long == "error" else 0
            _tell(stage.name, part, report)
        sys.stdout.write(f"{folder / 'data_report.html'}\n")
    return refused


def _all_rows(config: SFTConfig, data: DataConfig, model: Path, path: Path) -> StoredRows:
    """Rows as the stage would read them, with those that it would be refused for left out rather than raised."""
    limit = LengthLimit(config.max_length, "cut" if config.on_too_long == "cut" else "drop")
    settings = EncodeSettings(model, limit)
    return store_rows(
        path, data.model_copy(update={"on_bad_row": "skip"}), settings, config.encode_processes, lambda done: None
    )


def _tell(stage: str, part: str, report: DataReport) -> None:
    fates = f"{report.kept} kept + {report.skipped} skipped + {report.dropped} dropped, {report.cut} cut"
    lines = [f"{stage}, {_TITLES[part].lower()}: {report.rows_read} read = {fates}, {report.duplicates} repeated"]
    lines += [f"  {row.place}: {row.kind}: {row.reason}" for row in report.bad_rows]
    lines += [f"  {overlap_message(own)}" for own in report.overlap if own.ngram]
    sys.stdout.write("\n".join(lines) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and tell; errors as one message. Exit code 1 where the job would be refused."""
    parser = argparse.ArgumentParser(prog="python -m services.data_report", description="Check the rows of a job spec.")
    parser.add_argument("spec", type=Path, help="job spec as JSON")
    parser.add_argument("--out", type=Path, default=Path("data_report"), help="folder to write")
    given = parser.parse_args(arguments)
    try:
        return 1 if check_data(JOB_SPEC.validate_json(given.spec.read_bytes()), given.out) else 0
    except (DataFileError, TokenizerError, ValidationError, OSError) as error:
        sys.stderr.write(f"error {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
