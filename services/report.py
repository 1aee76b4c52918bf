"""Builds report.html from an attempt's folder: one file without scripts or outside assets, from whatever the job left."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from services.charts import Chart, Series, figure, line_chart
from services.data_report import template_environment
from services.exploration_report import LEDGER_FIGURES, gate_panels, ledger_charts
from services.overlap_report import OVERLAP_FIGURES, OverlapView, overlap_view
from services.rundir import CheckpointRecord, Result, StatusReason, read_lines, read_result, write_atomically

MAX_RESPONSE_CHARS = 4_000
MAX_EVENTS = 1_000

_SFT_CURVES = {
    "loss": ("Loss", "mean over trained tokens"),
    "ce": ("Cross-entropy", "−log p of the target"),
    "extra": ("Extra term", "loss − cross-entropy"),
    "masked_share": ("Masked share", "tokens without the diversity term (M = 0)"),
    "tau": ("τ", "top-k mass from which on a token gets no diversity term"),
    "entropy": ("Token entropy", "nats"),
    "target_prob": ("Target probability", "mean p"),
    "learning_rate": ("Learning rate", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "tokens_per_s": ("Tokens per second", "all ranks"),
}
_RL_CURVES = {
    "reward": ("Reward", "mean over scored samples"),
    "entropy": ("Token entropy", "nats"),
    "groups_with_variance": ("Groups with variance", "share of prompts with a learning signal"),
    "clip_fraction": ("Clip fraction", "share of trained tokens"),
    "response_tokens": ("Response length", "tokens"),
    "truncated": ("Truncated", "share of samples"),
    "logprob_gap": ("Log-prob gap", "mean |sampler − trainer|, trained tokens"),
    "tis_weight": ("Importance weight", "mean of min(p old / p sampler, cap), trained tokens"),
    "tis_truncated": ("Truncated weights", "share of trained tokens"),
    "kl": ("Divergence", "mean k3 from the starting model, trained tokens"),
    "probe_gap_mean": ("Probe gap, mean", "after the weight sync"),
    "probe_gap_max": ("Probe gap, largest", "after the weight sync"),
    "policy_loss": ("Policy loss", ""),
    "grad_norm": ("Gradient norm", "before clipping"),
    "learning_rate": ("Learning rate", ""),
    "score_errors": ("Score errors", "samples that could not be scored"),
    "samples_per_s": ("Samples per second", "of the whole iteration"),
}
_PHASES = {"seconds_rollout": "rollout", "seconds_score": "score", "seconds_train": "train", "seconds_sync": "sync"}
_KINDS = {"sft": "Supervised fine-tuning", "rl": "Reinforcement learning"}
_ERROR_SIGNS = ("fail", "error", "invalid", "crash", "died", "timeout", "diverged", "mismatch")
_WARNING_SIGNS = ("warning", "rolled_back", "warning", "dropped", "skipped", "cut", "broken", "refitted", "cancel", "spent")


@dataclass(frozen=True)
class StageView:
    """One stage: its place on the timeline in seconds, and the files it left."""

    name: str
    kind: str
    started_s: float | None
    ended_s: float | None
    table: dict[str, Any] | None
    readiness: dict[str, Any] | None
    samples: list[dict[str, Any]] | None
    tokens: dict[str, Any] | None
    calibration: dict[str, Any] | None
    data: dict[str, Any] | None
    gate: dict[str, Any] | None
    ledger: list[dict[str, Any]]
    timeline: list[dict[str, Any]]


@dataclass(frozen=True)
class CurveSection:
    """Charts of all stages of one kind; `legend` names a colour per stage."""

    title: str
    charts: list[Chart]
    phases: list[Chart]
    calibration: Chart | None


@dataclass
class Attempt:
    """What an attempt's folder holds. `unreadable` collects files that are damaged, which the report shows."""

    folder: Path
    spec: dict[str, Any]
    result: Result | None
    events: list[dict[str, Any]] = field(default_factory=list)
    curves: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)
    """stage -> figure -> step -> value"""
    stages: list[StageView] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def build_report(attempt_folder: Path, spec_json: dict[str, Any]) -> Path:
    """Write `report.html` into `attempt_folder` and return its path. `spec_json` is the resolved job spec.

    Works at any time: before result.json exists, with stages missing, or after a failure.
    """
    attempt = read_attempt(attempt_folder, spec_json)
    environment = template_environment()
    environment.filters |= {"cell": cell, "clock": _clock, "duration": _duration, "severity": severity}
    status, reason = _status(attempt)
    times = [event["time"] for event in attempt.events]
    html = environment.get_template("report.html.jinja").render(
        name=spec_json.get("name", "job"),
        job_id=attempt_folder.parent.name,
        attempt=attempt_folder.name,
        status=status,
        reason=reason,
        metadata=spec_json.get("metadata", {}),
        started=times[0] if times else None,
        total_s=max(times[-1] - times[0], 1e-3) if times else 0.0,
        built=datetime.fromtimestamp(time.time(), UTC).strftime("%Y-%m-%d %H:%M UTC"),
        stages=attempt.stages,
        readiness=[{"stage": stage.name} | stage.readiness for stage in attempt.stages if stage.readiness],
        gates=[(stage, gate_panels(stage.gate)) for stage in attempt.stages if stage.gate],
        ledger=ledger_charts({stage.name: stage.ledger for stage in attempt.stages if stage.ledger}),
        overlaps=_overlaps(attempt),
        sections=[section for kind in _KINDS if (section := _curve_section(attempt, kind))],
        events=attempt.events[-MAX_EVENTS:],
        events_hidden=max(0, len(attempt.events) - MAX_EVENTS),
        unreadable=attempt.unreadable,
        checkpoints=_checkpoints(attempt),
        max_chars=MAX_RESPONSE_CHARS,
        spec_text=json.dumps(spec_json, indent=2, ensure_ascii=False),
    )
    path = attempt_folder / "report.html"
    write_atomically(path, html)
    return path


def read_attempt(folder: Path, spec: dict[str, Any]) -> Attempt:
    """Everything the report needs from `folder`; damaged files are noted, not raised."""
    attempt = Attempt(folder, spec, read_result(folder))
    attempt.events = _lines(folder / "events.jsonl", attempt.unreadable)
    for record in _lines(folder / "metrics.jsonl", attempt.unreadable):
        stage = attempt.curves.setdefault(record["stage"], {})
        for name, value in record["values"].items():
            stage.setdefault(name, {})[record["step"]] = float(value)
    stages = spec["stages"] if spec.get("type") == "pipeline" else [spec]
    attempt.stages = [_stage_view(attempt, stage["name"], stage["type"]) for stage in stages]
    return attempt


def _lines(path: Path, unreadable: list[str]) -> list[dict[str, Any]]:
    records = []
    try:
        for record, _ in read_lines(path):
            records.append(record)
    except json.JSONDecodeError as error:
        unreadable.append(f"{path.name}: expected one JSON object per line, line {len(records) + 1} is not ({error.msg})")
    return records


def _stage_view(attempt: Attempt, name: str, kind: str) -> StageView:
    def moment(event_kind: str) -> float | None:
        found = [e["time"] for e in attempt.events if e["kind"] == event_kind and e["data"].get("stage") == name]
        return found[-1] - attempt.events[0]["time"] if found else None

    def left(file: str) -> Any:
        path = attempt.folder / "stages" / name / file
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            attempt.unreadable.append(f"stages/{name}/{file}: expected JSON ({error})")
            return None

    return StageView(
        name,
        kind,
        moment("stage_started"),
        moment("stage_ended"),
        # A gate's figures have a section of their own.
        left("table.json") if kind != "gate" else None,
        left("readiness.json"),
        left("samples.json"),
        left("tokens.json"),
        left("calibration.json"),
        left("data_report.json"),
        left("gate.json"),
        _lines(attempt.folder / "stages" / name / "ledger.jsonl", attempt.unreadable),
        _lines(attempt.folder / "stages" / name / "timeline.jsonl", attempt.unreadable),
    )


def _status(attempt: Attempt) -> tuple[str, StatusReason | None]:
    """The terminal record's status; without one (it is written after the report), what the events say."""
    if attempt.result is not None:
        return attempt.result.status, attempt.result.reason
    for event in reversed(attempt.events):
        if event["kind"] in ("failed", "cancelled"):
            return event["kind"], StatusReason(str(event["data"].get("code", event["kind"])), event["message"])
    if all(stage.ended_s is not None for stage in attempt.stages):
        return "succeeded", None
    return "unfinished", None


def _checkpoints(attempt: Attempt) -> list[CheckpointRecord]:
    """What the job published, from its events: a job that died has them too, and the terminal record comes after the report."""
    removed = {event["data"]["path"] for event in attempt.events if event["kind"] == "checkpoint_removed"}
    records = [CheckpointRecord(**event["data"]) for event in attempt.events if event["kind"] == "checkpoint"]
    return [record for record in records if record.path not in removed]


def _curve_section(attempt: Attempt, kind: str) -> CurveSection | None:
    """Curves of all stages of one kind in common charts, so that objectives can be compared."""
    names = [stage.name for stage in attempt.stages if stage.kind == kind]
    if not any(attempt.curves.get(name) for name in names):
        return None
    known = _SFT_CURVES if kind == "sft" else _RL_CURVES
    present = dict.fromkeys(figure_name for name in names for figure_name in attempt.curves.get(name, {}))
    drawn = (*known, *_PHASES, *(key for key in present if key.startswith((LEDGER_FIGURES, *OVERLAP_FIGURES))))
    others = {key: (key.replace("_", " ").capitalize(), "") for key in present if key not in drawn}
    charts = []
    for key, (title, note) in {**known, **others}.items():
        chart = line_chart(title, note, {name: _series(attempt, name, key) for name in names})
        if chart:
            charts.append(chart)
    phases = []
    for name in names if kind == "rl" else ():
        chart = line_chart(f"Seconds per phase: {name}", "", {label: _series(attempt, name, k) for k, label in _PHASES.items()})
        if chart:
            phases.append(chart)
    return CurveSection(_KINDS[kind], charts, phases, _calibration_chart(attempt) if kind == "sft" else None)


def _overlaps(attempt: Attempt) -> list[OverlapView]:
    stages = attempt.spec["stages"] if attempt.spec.get("type") == "pipeline" else [attempt.spec]
    modes = {stage["name"]: stage.get("grpo", {}).get("overlap", {}).get("mode", "sync") for stage in stages}
    views = [
        overlap_view(stage.name, modes[stage.name], attempt.curves.get(stage.name, {}), stage.timeline)
        for stage in attempt.stages
        if stage.kind == "rl"
    ]
    return [view for view in views if view is not None]


def _series(attempt: Attempt, stage: str, name: str) -> Series:
    return sorted(attempt.curves.get(stage, {}).get(name, {}).items())


def _calibration_chart(attempt: Attempt) -> Chart | None:
    series = {
        stage.name: [(100.0 * i / 10, y) for i, y in enumerate(stage.calibration["quantiles"])] if stage.calibration else []
        for stage in attempt.stages
        if stage.kind == "sft"
    }
    return line_chart("Top-k mass before training", "quantiles over calibration tokens", series, "% of tokens")


def cell(value: Any, column: str) -> str:
    """A table cell: shares and scores in three decimals, Self-BLEU and lengths in one, counts as they are, None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if column in ("self_bleu", "response_tokens"):
        return f"{value:.1f}"
    return f"{value:.3f}" if math.isfinite(value) and abs(value) < 1000 else figure(value)


def severity(event: Mapping[str, Any]) -> str:
    """ "error", "warning" or "" by the kind of an event."""
    kind = str(event["kind"])
    signs: Sequence[tuple[str, tuple[str, ...]]] = (("error", _ERROR_SIGNS), ("warning", _WARNING_SIGNS))
    return next((level for level, words in signs if any(word in kind for word in words)), "")


def _clock(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
