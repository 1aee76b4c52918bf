"""Samples per second of an RL iteration: this project's stage beside TRL's GRPOTrainer with its own generation, in turns.

    python benchmarks/bench_grpo.py [--rounds 2 --steps 2 --threads 2]

SmolLM2-135M on GSM8K problems, 8 prompts x 8 samples x 64 tokens an iteration, and the demonstration's 0.19M model on its own
task, 64 x 8 x 18. Ours is the stage as a job runs it: Ray actors with DeepSpeed, vLLM and scorers, the rollouts recorded, each
weight sync verified by its probe. TRL runs as it ships, generating with transformers. Both make one optimizer step an
iteration in passes of 8 responses (tiny: 64) and get the same reward, which falls with a response's length. They take turns,
each in a process of its own whose first iteration is not timed; speeds are those of the fastest iteration. Needs
requirements/bench.txt and what examples/prepare_smollm2.py makes. Writes bench_grpo.json beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_head import processor


@dataclass(frozen=True)
class Case:
    """A model with its prompts and the size of an iteration."""

    name: str
    model: Path
    data: Path
    column: str
    prompts: int
    group_size: int
    max_tokens: int
    micro_batch: int
    max_prompt_tokens: int

    @property
    def samples(self) -> int:
        """Responses of an iteration."""
        return self.prompts * self.group_size

    def questions(self, count: int) -> list[str]:
        """The first prompts of the data."""
        with self.data.open(encoding="utf-8") as lines:
            return [json.loads(line)[self.column] for line in itertools.islice(lines, count)]


@dataclass(frozen=True)
class Measured:
    """What a process reports."""

    samples_per_s: tuple[float, ...]
    """Of each timed iteration."""
    response_tokens: float
    """Mean length, over all iterations."""
    phases_s: dict[str, float]
    """Mean seconds of each phase of a timed iteration, where they are known."""


def reward_of(tokens: int, case: Case) -> float:
    """1 up to half of the limit, then linearly down to 0 behind it."""
    full, zero = case.max_tokens // 2, case.max_tokens + 1
    return min(1.0, max(0.0, (zero - tokens) / (zero - full)))


def ours(case: Case, options: argparse.Namespace) -> Measured:
    """One trainer rank and one engine that take turns with all threads."""
    import ray  # noqa: PLC0415

    from services.jobspec import JOB_SPEC, RLJob  # noqa: PLC0415
    from services.loops.engines import Engines  # noqa: PLC0415
    from services.loops.grpo import run_grpo  # noqa: PLC0415
    from services.run import Run  # noqa: PLC0415
    from services.rundir import read_lines  # noqa: PLC0415

    iterations = options.steps + 1
    with tempfile.TemporaryDirectory(prefix="bg", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        rows = [{"question": question, "answer": "0"} for question in case.questions(case.prompts * iterations)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "job").mkdir()
        spec = JOB_SPEC.validate_python(stage_of(case, folder / "rows.jsonl", options))
        assert isinstance(spec, RLJob)
        (folder / "job" / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
        os.environ["RAY_AUTH_MODE"] = "disabled"
        ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, _temp_dir=f"{folder}/ray")
        run = Run(folder / "job" / "attempt-1", spec)
        with Engines(run) as engines, run.stage(0, spec.name) as stage_folder:
            run_grpo(run, spec, stage_folder, engines)
        run.finish("succeeded", None)
        ray.shutdown()
        figures = [line["values"] for line, _ in read_lines(run.folder / "metrics.jsonl")]
    timed = figures[1:]
    names = [name for name in timed[0] if name.startswith("seconds_")]
    phases = {name.removeprefix("seconds_"): sum(values.get(name, 0.0) for values in timed) / len(timed) for name in names}
    lengths = sum(values["response_tokens"] for values in figures) / len(figures)
    return Measured(tuple(values["samples_per_s"] for values in timed), lengths, phases)


def stage_of(case: Case, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The stage as a user would post it."""
    length = {"type": "length", "weight": 1.0, "full_tokens": case.max_tokens // 2, "zero_tokens": case.max_tokens + 1}
    grpo = {
        "data": {"path": str(data)},
        "reward": {"components": [length]},
        "iterations": options.steps + 1,
        "overlap": {"mode": options.overlap},
        "prompts_per_iteration": case.prompts,
        "group_size": case.group_size,
        "mini_batch_prompts": case.prompts,
        "micro_batch_size": case.micro_batch,
        "max_tokens": case.max_tokens,
        "max_prompt_tokens": case.max_prompt_tokens,
        "readiness_prompts": 0,
        "max_logprob_gap": 0.1,
    }
    cpus = float(options.threads)
    longest = case.max_prompt_tokens + case.max_tokens
    return {
        "type": "rl",
        "name": "bench",
        "model": {"path": str(case.model.resolve())},
        "grpo": grpo,
        "trainer": {"workers": 1, "cpus_per_worker": cpus},
        "rollout": {"workers": 1, "cpus_per_worker": cpus, "max_model_len": longest, "max_num_seqs": 256},
        "scorer": {"workers": 1, "cpus_per_worker": 0.5, "processes": 1},
    }


def trl(case: Case, options: argparse.Namespace) -> Measured:
    """TRL's trainer on the same prompts."""
    import trl  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from transformers import AutoTokenizer, TrainerCallback  # noqa: PLC0415

    moments, lengths = list[float](), list[int]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    def reward(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        lengths.extend(len(ids) for ids in completion_ids)
        return [reward_of(len(ids), case) for ids in completion_ids]

    rows = [{"prompt": [{"role": "user", "content": q}]} for q in case.questions(case.prompts * (options.steps + 1))]
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.GRPOConfig(
            output_dir=folder,
            max_steps=options.steps + 1,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=case.samples // case.micro_batch,
            num_generations=case.group_size,
            max_completion_length=case.max_tokens,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trl.GRPOTrainer(
            model=str(case.model),
            reward_funcs=reward,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(case.model, padding_side="left"),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [end - start for start, end in itertools.pairwise(moments)]
    return Measured(tuple(case.samples / one for one in seconds), sum(lengths) / len(lengths), {})


PEERS: dict[str, Callable[[Case, argparse.Namespace], Measured]] = {"TRL": trl, "ours": ours}


def child(peer: str, case: Case, options: argparse.Namespace, results: multiprocessing.Queue[Measured]) -> None:
    """One measurement in a process of its own."""
    torch.set_num_threads(options.threads)
    results.put(PEERS[peer](case, options))


def run(peer: str, case: Case, options: argparse.Namespace) -> Measured:
    """`child` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(peer, case, options, results))
    process.start()
    while process.is_alive() and results.empty():
        process.join(0.5)
    if results.empty():
        raise SystemExit(f"expected {peer} to measure {case.name}, its process ended with {process.exitcode}")
    measured: Measured = results.get()
    process.join()
    return measured


def main() -> None:
    """Print the table and write the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, default=Path(".cache/smollm2"))
    parser.add_argument("--demo", type=Path, default=Path(".cache/demo"))
    for option, default in (("rounds", 2), ("steps", 2), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--overlap", choices=("sync", "one_step_off", "async"), default="sync")
    parser.add_argument("--only", choices=("SmolLM2-135M", "tiny"))
    options = parser.parse_args()
    smollm2 = Case(
        "SmolLM2-135M", options.smollm2 / "model", options.smollm2 / "data" / "gsm8k.jsonl", "problem", 8, 8, 64, 8, 512
    )
    tiny = Case("tiny", options.demo / "base", options.demo / "data" / "rl_prompts.jsonl", "question", 64, 8, 18, 64, 32)
    cases = [case for case in (smollm2, tiny) if options.only in (None, case.name)]
    taken: dict[tuple[str, str], list[Measured]] = {}
    for _, case, peer in itertools.product(range(options.rounds), cases, PEERS):
        measured = run(peer, case, options)
        taken.setdefault((case.name, peer), []).append(measured)
        speeds = " ".join(f"{speed:.2f}" for speed in measured.samples_per_s)
        spent = "  ".join(f"{name} {seconds:.2f} s" for name, seconds in measured.phases_s.items())
        print(f"{case.name:13} {peer:5} {measured.response_tokens:5.1f} tokens, samples/s: {speeds}  {spent}", flush=True)
    rows = []
    for (name, peer), rounds in taken.items():
        speed, other = _best(rounds), _best(taken[name, "TRL"])
        rows.append({"model": name, "variant": peer, "samples_per_s": speed, "of_trl": speed / other})
        rows[-1]["rounds"] = [asdict(measured) for measured in rounds]
        print(f"{name:13} {peer:5} {speed:9.2f} samples/s {speed / other:6.2f}x")
    machine = {"processor": processor(), "torch": torch.__version__, "threads": options.threads, "overlap": options.overlap}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


def _best(rounds: Sequence[Measured]) -> float:
    """Samples/s of the fastest iteration."""
    return max(speed for measured in rounds for speed in measured.samples_per_s)


if __name__ == "__main__":
    main()
