"""Every mode with real trainers, real engines and real scorers: who held which weights, and that the two sides overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from services import replay
from services.jobspec import JOB_SPEC, PipelineJob
from services.loops.engines import Engines
from services.loops.grpo import run_grpo
from services.report import build_report
from services.rollout_record import read_rollouts, recorded_files
from services.run import Run
from services.rundir import read_lines
from tests.services.local_ray import local_ray
from tests.services.tiny_llama import save_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ITERATIONS = 4
MODES = {
    "sync": {"mode": "sync"},
    "ahead": {"mode": "one_step_off"},
    "async": {"mode": "async", "max_staleness": 2},
    "refills": {"mode": "one_step_off"},
}


def stage(name: str, overlap: dict[str, Any], folder: Path) -> dict[str, Any]:
    grpo = {
        "data": {"path": str(folder / "prompts.jsonl")},
        "reward": {"components": [{"type": "length", "full_tokens": 4, "zero_tokens": 24}]},
        "iterations": ITERATIONS,
        "overlap": overlap,
        "prompts_per_iteration": 8,
        "group_size": 4,
        "mini_batch_prompts": 4,
        "max_tokens": 24,
        "max_prompt_tokens": 16,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
        "readiness_prompts": 0,
        "max_refills": 1 if name == "refills" else None,
    }
    return {
        "type": "rl",
        "name": name,
        "model": {"path": str(folder / "model")},
        "grpo": grpo,
        "trainer": {"cpus_per_worker": 0.5},
        "rollout": {"cpus_per_worker": 0.5, "max_model_len": 64, "max_num_seqs": 16, "restarts": 0},
        "scorer": {"cpus_per_worker": 0.2, "processes": 1},
    }


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a job that ran the modes one after the other on the same engines."""
    folder = tmp_path_factory.mktemp("overlap")
    save_tiny_llama(folder / "model")
    rows = [{"prompt": f"w{i} w{i + 1}", "answer": str(i)} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [stage(name, overlap, folder) for name, overlap in MODES.items()]
    spec = JOB_SPEC.validate_python({"type": "pipeline", "stages": stages})
    assert isinstance(spec, PipelineJob)
    (folder / "job").mkdir()
    (folder / "job" / "spec.json").write_text(spec.model_dump_json())
    with local_ray():
        run = Run(folder / "job" / "attempt-1", spec)
        with Engines(run) as engines:
            for index, one in enumerate(spec.stages):
                with run.stage(index, one.name) as stage_folder:
                    run_grpo(run, one, stage_folder, engines)  # type: ignore[arg-type]
        for name in ("ahead", "async"):
            (folder / f"replayed-{name}").mkdir()
            outcome = replay.replay(replay.find_stage(run.folder, name), folder / f"replayed-{name}", lambda _: None)
            run.event("replayed", name, stage=name, iterations=outcome.iterations, difference=outcome.difference)
        run.finish("succeeded", None)
    return run.folder


def figures_of(attempt: Path, name: str) -> list[dict[str, float]]:
    return [line["values"] for line, _ in read_lines(attempt / "metrics.jsonl") if line["stage"] == name]


@pytest.mark.parametrize("name", list(MODES))
def test_versions_counts_and_figures(attempt: Path, name: str) -> None:
    figures, files = figures_of(attempt, name), recorded_files(attempt, name)
    assert list(files) == list(range(1, ITERATIONS + 1))
    groups = {i: read_rollouts(path).groups for i, path in files.items()}
    first = min(sample.weight_version for group in groups[1] for sample in group.samples)
    oldest = {"sync": 0, "ahead": 1, "async": 2, "refills": 1}[name]
    for iteration, values in enumerate(figures, start=1):
        ages = [first + iteration - 1 - s.weight_version for group in groups[iteration] for s in group.samples]
        assert 0 <= min(ages) <= max(ages) <= oldest
        if oldest == 1:
            assert set(ages) == {min(1, iteration - 1)}
        assert values["staleness_max"] == max(ages)
        assert values["staleness_mean"] == pytest.approx(sum(ages) / len(ages))
        counted = values["groups_accepted"] + values["groups_dropped"] + values["groups_running"]
        assert values["groups_submitted"] == counted
        for lane in ("engines", "trainers"):
            assert values[f"{lane}_busy_s"] + values[f"{lane}_idle_s"] == pytest.approx(values["iteration_s"])
        assert 0.5 < values["tis_weight"] < 1.5
    lines = [line for line, _ in read_lines(attempt / "stages" / name / "timeline.jsonl")]
    assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1))
    assert {"rollout", "train", "sync"} <= {span[1] for line in lines for span in line["spans"]}


def test_replays_without_engines_end_with_the_same_bits(attempt: Path) -> None:
    replays = [event["data"] for event, _ in read_lines(attempt / "events.jsonl") if event["kind"] == "replayed"]
    assert replays == [{"stage": name, "iterations": ITERATIONS, "difference": None} for name in ("ahead", "async")]


def together_s(attempt: Path, name: str) -> float:
    """Seconds in which engines sampled while trainers trained."""
    seconds = 0.0
    for line, _ in read_lines(attempt / "stages" / name / "timeline.jsonl"):
        spans = [(span[1], span[2], span[3]) for span in line["spans"]]
        for what, start_s, end_s in spans:
            if what == "rollout":
                seconds += sum(max(0.0, min(end_s, e) - max(start_s, s)) for w, s, e in spans if w == "train")
    return seconds


def test_sampling_goes_on_beside_training_in_all_modes_but_sync(attempt: Path) -> None:
    assert together_s(attempt, "sync") == 0
    for name in ("ahead", "async", "refills"):
        assert together_s(attempt, name) > 0, name


def test_the_report_draws_every_mode(attempt: Path) -> None:
    spec = json.loads((attempt.parent / "spec.json").read_text())
    html = build_report(attempt, spec).read_text()
    for name in MODES:
        assert f"Idle share: {name}" in html
        assert f"Samples by staleness: {name}" in html
    assert html.count('<figure class="wide">') == len(MODES)
