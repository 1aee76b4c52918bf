"""Samples per second of an RL stage in the modes sync, one_step_off and async, taking turns in one run on the same engines.

    python benchmarks/bench_overlap.py [--folder .cache/demo --rounds 3 --iterations 20]

The demonstration's 0.19M model and task, with real trainers (DeepSpeed), engines (vLLM) and scorers. The trainer and the one
engine are pinned to a core each, so that neither gains from the other's idle time but through the overlap. The sizes are chosen
so that sampling and training take about equally long, which is where overlap has most to give. Rates are over all iterations
of a stage, so the modes that sample ahead pay for the first and the last, in which one side has nothing to do. Makes base
model and data in --folder where they are missing. Writes bench_overlap.json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean, median
from typing import Any

import psutil
import ray
import torch
from bench_head import processor

from sedsft.tasks.demo import prepare
from services.jobspec import JOB_SPEC, PipelineJob, RLStage
from services.loops.engines import Engines
from services.loops.grpo import run_grpo
from services.report import build_report
from services.run import Run
from services.rundir import read_lines

MODES: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync"},
    "one-step-off": {"mode": "one_step_off"},
    "async": {"mode": "async", "max_staleness": 2},
}
CORES = {"ray::PolicyWorker": 0, "ray::RolloutWorker": 1, "VLLM::EngineCore": 1}
PIN_EVERY_S = 0.2
SECONDS = ("seconds_rollout", "seconds_score", "seconds_train", "seconds_sync")


def stage(name: str, overlap: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """An RL stage on the demonstration's prompts."""
    grpo = {
        "data": {"path": str(options.folder / "data" / "rl_prompts.jsonl")},
        "reward": {"name": "countdown"},
        "iterations": options.iterations,
        "overlap": overlap,
        "prompts_per_iteration": options.prompts,
        "group_size": options.group_size,
        "mini_batch_prompts": options.prompts // options.updates,
        "micro_batch_size": options.micro_batch,
        "max_tokens": options.max_tokens,
        "max_prompt_tokens": 32,
        "optimizer": {"learning_rate": 1e-5, "schedule": "constant"},
        "readiness_prompts": 0,
    }
    return {
        "type": "rl",
        "name": name,
        "model": {"path": str(options.folder / "base")},
        "grpo": grpo,
        "trainer": {"workers": 1, "cpus_per_worker": 0.5},
        "rollout": {"workers": 1, "cpus_per_worker": 0.5, "max_model_len": 64, "max_num_seqs": options.max_num_seqs},
        "scorer": {"workers": 1, "cpus_per_worker": 0.2, "processes": 1},
    }


@contextmanager
def pinned() -> Iterator[None]:
    """Keep trainers on one core and engines on the other, whenever they come."""
    ended = threading.Event()

    def pin() -> None:
        done: set[tuple[int, int]] = set()
        while not ended.wait(PIN_EVERY_S):
            for process in psutil.Process().children(recursive=True):
                # Processes and threads end while they are looked at.
                with suppress(psutil.Error, OSError):
                    core = next((core for name, core in CORES.items() if "".join(process.cmdline()[:1]).startswith(name)), None)
                    threads = [] if core is None else process.threads()
                    for thread in threads:
                        if (process.pid, thread.id) not in done:
                            os.sched_setaffinity(thread.id, {core})  # type: ignore[set-item]
                            done.add((process.pid, thread.id))

    thread = threading.Thread(target=pin, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run_all(options: argparse.Namespace, folder: Path) -> Path:
    """All rounds of all modes as stages of one job; returns the attempt's folder."""
    names = [(f"{mode}-{number}", overlap) for number in range(options.rounds) for mode, overlap in MODES.items()]
    stages = [stage("warm-up", MODES["sync"], options), *(stage(name, overlap, options) for name, overlap in names)]
    stages[0]["grpo"]["iterations"] = 2
    spec = JOB_SPEC.validate_python({"type": "pipeline", "stages": stages})
    assert isinstance(spec, PipelineJob)
    (folder / "job").mkdir()
    (folder / "job" / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    run = Run(folder / "job" / "attempt-1", spec)
    with pinned(), Engines(run) as engines:
        for index, one in enumerate(spec.stages):
            assert isinstance(one, RLStage)
            with run.stage(index, one.name) as stage_folder:
                run_grpo(run, one, stage_folder, engines)
            if index:
                measured = figures_of(run.folder, one.name)
                print(f"{one.name:16} {rate(measured, options):8.1f} samples/s  {phases(measured)}", flush=True)
    run.finish("succeeded", None)
    build_report(run.folder, json.loads(spec.model_dump_json()))
    return run.folder


def figures_of(attempt: Path, name: str) -> list[dict[str, float]]:
    """Figures of all iterations of a stage."""
    return [line["values"] for line, _ in read_lines(attempt / "metrics.jsonl") if line["stage"] == name]


def rate(figures: Sequence[dict[str, float]], options: argparse.Namespace) -> float:
    """Samples per second."""
    return len(figures) * options.prompts * options.group_size / sum(values["iteration_s"] for values in figures)


def phases(figures: Sequence[dict[str, float]]) -> str:
    """Mean seconds of an iteration's phases, and idle shares."""
    parts = [f"{name.removeprefix('seconds_')} {fmean(values.get(name, 0.0) for values in figures):.2f} s" for name in SECONDS]
    return "  ".join([*parts, *(f"{lane} idle {idle_share(figures, lane):.2f}" for lane in ("engines", "trainers"))])


def idle_share(figures: Sequence[dict[str, float]], lane: str) -> float:
    """Share of the time in which a lane had nothing to do."""
    return sum(values[f"{lane}_idle_s"] for values in figures) / sum(values["iteration_s"] for values in figures)


def row(mode: str, attempt: Path, options: argparse.Namespace, sync: Sequence[float]) -> dict[str, Any]:
    """A mode's figures over all rounds."""
    rounds = [figures_of(attempt, f"{mode}-{number}") for number in range(options.rounds)]
    rates = [rate(figures, options) for figures in rounds]
    every = [values for figures in rounds for values in figures]
    return {
        "mode": mode,
        "samples_per_s": [round(value, 1) for value in rates],
        "median_samples_per_s": round(median(rates), 1),
        "of_sync": round(median(one / other for one, other in zip(rates, sync, strict=True)), 3),
        "engines_idle_share": round(idle_share(every, "engines"), 3),
        "trainers_idle_share": round(idle_share(every, "trainers"), 3),
        "staleness_mean": round(fmean(values["staleness_mean"] for values in every), 3),
        **{name: round(fmean(values.get(name, 0.0) for values in every), 4) for name in ("iteration_s", *SECONDS)},
    }


def main() -> None:
    """Print the table and write the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/demo"))
    parser.add_argument("--report", type=Path, help="where to put the report with the timelines")
    sizes = {"rounds": 3, "iterations": 20, "prompts": 32, "group-size": 8, "max-tokens": 18, "updates": 1, "micro-batch": 64}
    for option, default in (*sizes.items(), ("max-num-seqs", 64)):
        parser.add_argument(f"--{option}", type=int, default=default)
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    if not (options.folder / "base").exists():
        prepare(options.folder, threads=os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="bo", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/ray")
        attempt = run_all(options, Path(folder))
        ray.shutdown()
        sync = [rate(figures_of(attempt, f"sync-{number}"), options) for number in range(options.rounds)]
        rows = [row(mode, attempt, options, sync) for mode in MODES]
        if options.report:
            options.report.write_bytes((attempt / "report.html").read_bytes())
    for each in rows:
        print(f"{each['mode']:14} {each['median_samples_per_s']:8.1f} samples/s  {each['of_sync']:.2f}x sync")
    settings = {name: getattr(options, name.replace("-", "_")) for name in (*sizes, "max-num-seqs")}
    machine = {"processor": processor(), "torch": torch.__version__, "cores": "one each for trainer and engine"}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
