"""The evaluation stage: the same problems, seeds and scorers for every model, accuracy and diversity over the same samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedsft.config import Benchmark, EvalConfig, FilterConfig, SamplingConfig
from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.data.sources import read_benchmark
from sedsft.evaluation.metrics import mean_row, summarise
from sedsft.gate_config import GateConfig
from sedsft.records import Prompt, RolloutGroup
from services.actor_group import ActorGroup, ActorSpec
from services.jobspec import REFERENCE_CPUS, EvalStage
from services.loops.engines import EngineRequest, Engines
from services.placement import actor_groups
from services.rollout.transport import FileTransport
from services.rollout.weight_sync import Pair, Probe, WeightSync
from services.run import Run, write_json
from services.training.reference_worker import ReferenceWorker

REFERENCE_TIMEOUT_S = 1800.0
PROBE_PROMPTS = 8
SHOWN_PROBLEMS = 3
MEAN = "mean"


def run_evaluation(run: Run, stage: EvalStage, folder: Path, engines: Engines) -> None:
    """Evaluate every model of `stage` and write table.json and samples.json.

    Raises:
        JobError: bad rows or model, a dead worker, too many unscored samples, an engine that is not the model in the files.
    """
    config = stage.eval
    rows: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    steps = len(stage.models) * len(config.benchmarks)
    paths = {model: run.model_path(ref) for model, ref in stage.models.items()}

    def request(path: Path) -> EngineRequest:
        return EngineRequest(path, config.precision, stage.rollout, stage.scorer, config.reward)

    # Before the reference is reserved, so that engines of another shape make room first.
    engines.start(request(next(iter(paths.values()))))
    with actor_groups([ActorSpec("reference", ReferenceWorker, 1, REFERENCE_CPUS)], run.job_id) as [reference]:
        for model_index, (model, path) in enumerate(paths.items()):
            benchmarks = [(benchmark, _problems(config, benchmark, path)) for benchmark in config.benchmarks]
            run.phase("loading", model_index * len(benchmarks), steps)
            probe = benchmarks[0][1][:PROBE_PROMPTS]
            engines.start(request(path))
            load_model(run, config, folder, engines, reference, path, probe)
            for index, (benchmark, prompts) in enumerate(benchmarks, start=model_index * len(benchmarks) + 1):
                run.phase("eval", index, steps)
                groups = engines.sample(prompts, config.samples, config.sampling, config.seed)
                groups = engines.score(groups, config.reward.max_error_share)
                figures = summarise(groups, config.pass_k)
                rows.append({"model": model, "benchmark": benchmark.name, **figures})
                run.metrics(index, {name: value for name, value in figures.items() if isinstance(value, int | float)})
                shown += [_shown(model, benchmark.name, group) for group in groups[:SHOWN_PROBLEMS]]
            rows.append(mean_row(rows[-len(benchmarks) :]) | {"model": model, "benchmark": MEAN})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    write_json(folder / "table.json", {"columns": columns, "rows": rows})
    write_json(folder / "samples.json", shown)


def _problems(config: EvalConfig, benchmark: Benchmark, model_path: Path) -> list[Prompt]:
    rows = read_benchmark(benchmark.path, benchmark.max_rows, config.system_prompt)
    # No limit here: a problem that does not fit is an error of the fleet, since leaving it out would change the benchmark.
    return list(encode_prompts(rows, load_tokenizer(model_path), max_prompt_tokens=2**31).prompts)


def load_model(
    run: Run,
    config: EvalConfig | FilterConfig | GateConfig,
    folder: Path,
    engines: Engines,
    reference: ActorGroup,
    path: Path,
    probe: Sequence[Prompt],
) -> None:
    """Bring the model of `path` into the engines and check them against transformers on the same files."""

    def write(target: Path) -> None:
        for file in path.iterdir():
            if file.suffix in (".safetensors", ".json"):
                (target / file.name).symlink_to(file)

    def log_probs(pairs: list[Pair]) -> list[npt.NDArray[np.float32]]:
        scored: list[npt.NDArray[np.float32]] = reference.call_one(
            0, "log_probs", str(path), config.precision, config.sampling.temperature, pairs, timeout_s=REFERENCE_TIMEOUT_S
        )
        return scored

    # The whole distribution: a nucleus would renormalise the sampler's log-probabilities.
    whole = SamplingConfig(temperature=config.sampling.temperature, max_tokens=config.sampling.max_tokens)
    checked = Probe(probe, whole, config.seed)
    files = FileTransport(write, folder / "weights")
    sync = WeightSync(engines.ready(), files, log_probs, checked, config.max_logprob_gap)
    report = sync.push(engines.next_version())
    run.event("loaded", f"{path.parent.name}/{path.name} verified, mean gap {report.mean_gap:.4f}", probe_gap=report.mean_gap)


def _shown(model: str, benchmark: str, group: RolloutGroup) -> dict[str, Any]:
    responses = [
        {"text": sample.text, "reward": score.reward if score.status == "scored" else None, "status": score.status}
        for sample, score in zip(group.samples, group.scores, strict=True)
    ]
    prompt = group.prompt
    return {"model": model, "benchmark": benchmark, "problem": prompt.text, "answer": prompt.answer, "responses": responses}
