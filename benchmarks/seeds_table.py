"""CE, GEM, DFT, SED without mask and SED on the demo's task over several seeds, after SFT and after the same GRPO.

    python -m benchmarks.seeds_table [--seeds 5 --jobs 1]

One pipeline job per seed on a local stack, as `sedsft demo` runs it: an SFT stage per objective from the common base model,
a GRPO stage on each, and one evaluation of all of them. Settings are those of examples/demo.json but for the number of RL
iterations and the resources. A seed draws the SFT rows and the RL prompts, their order and all samples; the base model and
the problems of the evaluation are the same for all.

Writes seeds_table.json beside this file after each seed, goes on with the seeds that it does not hold yet, and then writes
docs/seeds_table.md and its picture.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from api import stack
from api.client import ENDED, Client
from api.settings import Settings
from benchmarks.bench_head import processor
from benchmarks.seeds_page import page, picture
from sedsft.tasks.demo import prepare, write_data
from sedsft.tasks.tiny_model import DEFAULT_RECIPE

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "demo.json"
OBJECTIVES: dict[str, dict[str, Any]] = {
    "ce": {"type": "ce"},
    "gem": {"type": "gem"},
    "dft": {"type": "dft"},
    "sed-no-mask": {"type": "sed", "mask": False},
    "sed": {"type": "sed"},
}
FIGURES = ("avg", "pass@8", "self_bleu", "token_entropy", "distinct_correct")
# Both fit on one core's worth of Ray's resources, so that two seeds fit on two cores.
TRAINER = {"workers": 1, "cpus_per_worker": 0.4, "zero_stage": 0}
ROLLOUT = {"workers": 1, "cpus_per_worker": 0.4, "max_model_len": 64, "max_num_seqs": 256}
SCORER = {"workers": 1, "cpus_per_worker": 0.2, "processes": 1}
POLL_S = 1.0


def job(folder: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Spec of the job of one seed; data and base model lie in `folder`."""
    demo = {stage["type"]: stage for stage in json.loads(DEMO.read_text(encoding="utf-8"))["stages"]}
    data, base = folder / f"data-{seed}", {"path": str(folder / "base")}
    sft = demo["sft"]["sft"] | {
        "data": {"path": str(data / "sft_narrow.jsonl")},
        "held_out": {"path": str(data / "held_out.jsonl")},
        "optimizer": demo["sft"]["sft"]["optimizer"] | {"warmup_steps": min(10, options.sft_steps // 2)},
        "steps": options.sft_steps,
        "seed": seed,
    }
    grpo = demo["rl"]["grpo"] | {
        "data": {"path": str(data / "rl_prompts.jsonl")},
        "iterations": options.rl_iterations,
        "readiness_prompts": 0,
        "seed": seed,
    }
    grpo["optimizer"] = grpo["optimizer"] | {"warmup_steps": min(5, options.rl_iterations)}
    limit = {} if options.problems is None else {"max_rows": options.problems}
    evaluation = demo["eval"]["eval"] | {
        "benchmarks": [
            limit | {"name": group, "path": str(folder / "data" / f"eval_{group}.jsonl")} for group in ("3", "4", "H")
        ],
        "seed": seed,
    }
    models = {f"{name}-{stage}": {"stage": f"{name}-{stage}"} for stage in ("sft", "rl") for name in OBJECTIVES}
    return {
        "type": "pipeline",
        "name": f"seed-{seed}",
        "stages": [
            *(
                {"type": "sft", "name": f"{name}-sft", "model": base, "sft": sft | {"objective": objective}, "trainer": TRAINER}
                for name, objective in OBJECTIVES.items()
            ),
            *(
                {"type": "rl", "name": f"{name}-rl", "model": {"stage": f"{name}-sft"}, "grpo": grpo}
                | {"trainer": TRAINER, "rollout": ROLLOUT, "scorer": SCORER}
                for name in OBJECTIVES
            ),
            {"type": "eval", "name": "eval", "models": {"base": base} | models, "eval": evaluation}
            | {"rollout": ROLLOUT, "scorer": SCORER},
        ],
    }


def run(seeds: Sequence[int], options: argparse.Namespace, finished: Callable[[int, dict[str, Any]], None]) -> list[str]:
    """Run the jobs of `seeds`, `options.jobs` at a time; what went wrong with those that failed."""
    with tempfile.TemporaryDirectory(prefix="sedsft-seeds-") as home:
        settings = Settings(home=Path(home), port=_free_port(), allowed_roots=(options.folder,))
        running = stack.up(settings, num_cpus=max(2, options.jobs))
        try:
            with Client.local(running.api_url, settings.key_path) as client:
                return _watch(client, list(seeds), options, finished)
        finally:
            stack.down(settings)


def _watch(
    client: Client, waiting: list[int], options: argparse.Namespace, finished: Callable[[int, dict[str, Any]], None]
) -> list[str]:
    failures: list[str] = []
    running: dict[int, tuple[str, str]] = {}
    started = time.monotonic()
    while waiting or running:
        while waiting and len(running) < options.jobs:
            seed = waiting.pop(0)
            running[seed] = client.submit(job(options.folder, seed, options))["id"], ""
        for seed, (job_id, shown) in list(running.items()):
            state = client.job(job_id)
            progress = state["progress"]
            if progress["stage"] != shown:
                running[seed] = job_id, progress["stage"]
                place = f"{progress['stage_index'] + 1}/{progress['num_stages']}"
                print(f"{time.monotonic() - started:6.0f} s  seed {seed}: {progress['stage']} ({place})", flush=True)
            if state["status"] not in ENDED:
                continue
            del running[seed]
            if state["status"] == "succeeded":
                finished(seed, {"stage_seconds": state["stage_seconds"], "models": _figures(client, job_id)})
            else:
                failures.append(f"seed {seed}: {state['status_reason']}")
            print(f"{time.monotonic() - started:6.0f} s  seed {seed}: {state['status']}", flush=True)
        time.sleep(POLL_S)
    return failures


def _figures(client: Client, job_id: str) -> dict[str, dict[str, dict[str, float]]]:
    """model -> benchmark, `mean` among them -> figure -> value"""
    models: dict[str, dict[str, dict[str, float]]] = {}
    for row in client.tables(job_id)["eval"]["rows"]:
        models.setdefault(row["model"], {})[row["benchmark"]] = {name: row[name] for name in FIGURES}
    return models


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard error of the mean, s / sqrt(n) with n - 1 in s; no error of a single value."""
    return fmean(values), stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def summary(seeds: Mapping[str, Any]) -> dict[str, Any]:
    """Over seeds: every figure of every model, and by how much each objective differs from CE on the same seed."""
    runs = [entry["models"] for entry in seeds.values()]

    def over_seeds(model: str, less: str | None = None) -> dict[str, Any]:
        cells = {}
        for name in FIGURES:
            values = [run[model]["mean"][name] - (0.0 if less is None else run[less]["mean"][name]) for run in runs]
            mean, error = mean_and_error(values)
            cells[name] = {"mean": mean, "standard_error": error, "above_zero": sum(value > 0 for value in values)}
        return cells

    pairs = [(name, stage) for stage in ("sft", "rl") for name in OBJECTIVES if name != "ce"]
    return {
        "models": {model: over_seeds(model) for model in runs[0]},
        "less_ce": {f"{name}-{stage}": over_seeds(f"{name}-{stage}", f"ce-{stage}") for name, stage in pairs},
    }


def main() -> int:
    """Read the arguments, run what is missing, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="how many, numbered from 1")
    parser.add_argument("--jobs", type=int, default=1, help="seeds that run at the same time; each keeps a core busy")
    parser.add_argument("--sft-steps", type=int, default=60)
    parser.add_argument("--rl-iterations", type=int, default=30)
    parser.add_argument("--problems", type=int, help="problems of each group in the evaluation (default: all 150)")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "seeds", help="base model and data; made if missing")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    options = parser.parse_args()
    options.folder = options.folder.resolve()
    # So that the stack is ended when this process is.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    template = job(Path(), 0, options)
    report: dict[str, Any] = {
        "machine": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "ray", "deepspeed")},
        "job": template,
        "seeds": {},
    }
    if options.out.exists():
        report["seeds"] = _earlier(options.out, template)
    missing = [seed for seed in range(1, options.seeds + 1) if str(seed) not in report["seeds"]]

    def finished(seed: int, entry: dict[str, Any]) -> None:
        report["seeds"][str(seed)] = entry
        _write(report, options)

    failures: list[str] = []
    if missing:
        print(f"base model and data in {options.folder}; the base is trained once, in about 80 s", flush=True)
        prepare(options.folder, ROOT / ".cache" / "demo" / "cache", DEFAULT_RECIPE, threads=2)
        for seed in missing:
            write_data(options.folder / f"data-{seed}", seed)
        try:
            failures = run(missing, options, finished)
        except KeyboardInterrupt:
            failures = ["interrupted; run it again to go on with the seeds that are missing"]
    else:
        _write(report, options)
    print("\n".join(failures) or f"{len(report['seeds'])} seeds in {options.out}")
    return 1 if failures else 0


def _write(report: dict[str, Any], options: argparse.Namespace) -> None:
    """The JSON, the page and the picture of the seeds that there are."""
    report["seeds"] = dict(sorted(report["seeds"].items(), key=lambda item: int(item[0])))
    report["summary"] = summary(report["seeds"])
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(options.out)
    (options.docs / "seeds_table.md").write_text(page(report, tuple(OBJECTIVES)), encoding="utf-8")
    (options.docs / "seeds_table.svg").write_text(picture(report["summary"], tuple(OBJECTIVES)), encoding="utf-8")


def _earlier(path: Path, template: Mapping[str, Any]) -> dict[str, Any]:
    """Seeds of an earlier run with the same settings."""
    earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if earlier["job"] != template:
        raise SystemExit(f"expected {path} to be of the same settings, it is not; remove it or give another --out")
    seeds: dict[str, Any] = earlier["seeds"]
    return seeds


if __name__ == "__main__":
    sys.exit(main())
