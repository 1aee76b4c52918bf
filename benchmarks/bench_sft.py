"""Tokens per second and peak memory of SFT, this project's CE and SED beside TRL's SFTTrainer, alternating in one run.

    python benchmarks/bench_sft.py --model MODEL_FOLDER --data GSM8K.jsonl [--rows 16 --steps 3 --rounds 2 --threads 2]

All variants see the same rows with the same chat template and loss mask, `--rows` per optimizer step, in passes of 4 padded
rows or of up to 1,024 packed tokens; a variant is a process of its own, and its first step is not timed. This project trains
a bf16 copy of fp32 weights. TRL runs as it ships: autocast to bf16 over fp32 weights with recomputed activations; and once
more with them kept, so that neither side profits from the other's defaults. Tokens are those of rows, never padding.
Needs requirements/bench.txt. Writes benchmarks/bench_sft.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_head import processor

from sedsft.config import CEObjective, DataConfig, SEDObjective, SFTConfig
from sedsft.data.chat import encode_sft, load_tokenizer
from sedsft.data.sources import read_sft_rows
from sedsft.records import Example

TAU = 0.9
MAX_LENGTH = 1024
MICRO_BATCH_ROWS = 4
PACK_TOKENS = 1024


@dataclass(frozen=True)
class Measured:
    """What one process reports."""

    tokens_per_s: float
    step_s: float
    peak_mb: float
    base_mb: float
    """Memory before the model is opened: interpreter and libraries."""
    loss: float


def read_examples(options: argparse.Namespace) -> Sequence[Example]:
    """The rows of all steps, the untimed one included."""
    data = DataConfig(path=str(options.data), format="question_answer", max_rows=options.rows * (options.steps + 1))
    read = read_sft_rows(data)
    return encode_sft(read.rows, load_tokenizer(str(options.model)), MAX_LENGTH, "error").examples


def ours(objective: str, packed: bool, recompute: bool, options: argparse.Namespace) -> Measured:
    """One trainer rank, driven as the SFT loop drives it."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from services.training.messages import SFTSetup  # noqa: PLC0415
    from services.training.ranks import RankSetup  # noqa: PLC0415
    from services.training.sft_worker import SFTWorker  # noqa: PLC0415

    examples = read_examples(options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = SFTConfig(
        objective=CEObjective() if objective == "ce" else SEDObjective(tau=TAU),
        data=DataConfig(path=str(options.data)),
        steps=options.steps + 1,
        batch_size=options.rows,
        max_length=MAX_LENGTH,
        gradient_checkpointing=recompute,
        **({"pack_tokens": PACK_TOKENS} if packed else {"micro_batch_size": MICRO_BATCH_ROWS}),
    )
    base_mb = peak_mb()
    worker = SFTWorker(0)
    ranks = RankSetup(0, 1, "127.0.0.1", port, threads=options.threads)
    worker.setup(SFTSetup(ranks, str(options.model), config, options.zero_stage, options.steps + 1))
    seconds, tokens, loss = [], 0, 0.0
    for step in range(1, options.steps + 2):
        rows = examples[(step - 1) * options.rows : step * options.rows]
        denominator = int(sum(row.trained_T[1:].sum() for row in rows))
        started = time.perf_counter()
        figures = worker.train_step(rows, denominator, TAU if objective == "sed" else None, step)
        if step > 1:
            seconds.append(time.perf_counter() - started)
            tokens += sum(len(row.input_ids_T) for row in rows)
            loss = figures[0]["ce"] / denominator
    return Measured(tokens / sum(seconds), statistics.median(seconds), peak_mb(), base_mb, loss)


def trl(packed: bool, recompute: bool, options: argparse.Namespace) -> Measured:
    """TRL's trainer on the same rows, already tokenised and masked."""
    import trl  # noqa: PLC0415
    from datasets import Dataset  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, TrainerCallback  # noqa: PLC0415

    examples = read_examples(options)
    rows = [{"input_ids": row.input_ids_T.tolist(), "completion_mask": row.trained_T.astype(int).tolist()} for row in examples]
    base_mb = peak_mb()
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    tokens_per_step = sum(len(row.input_ids_T) for row in examples) / (options.steps + 1)
    accumulation = options.rows // MICRO_BATCH_ROWS if not packed else max(1, round(tokens_per_step / PACK_TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            output_dir=folder,
            max_steps=options.steps + 1,
            per_device_train_batch_size=1 if packed else MICRO_BATCH_ROWS,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=recompute,
            packing=packed,
            max_length=PACK_TOKENS if packed else MAX_LENGTH,
            completion_only_loss=True,
            learning_rate=2e-5,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trl.SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(str(options.model), dtype=torch.float32),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer(str(options.model)),
            callbacks=[Clock()],
        )
        trainer.train()
    step_s = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tokens = trainer.state.num_input_tokens_seen
    print("TRL", step_s, losses, tokens, len(trainer.train_dataset))
    return Measured(tokens_per_step * len(step_s) / sum(step_s), statistics.median(step_s), peak_mb(), base_mb, losses[-1])


VARIANTS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    "TRL, CE, padded": lambda options: trl(False, True, options),
    "TRL, CE, padded, kept": lambda options: trl(False, False, options),
    "ours, CE, padded": lambda options: ours("ce", False, False, options),
    "ours, SED, padded": lambda options: ours("sed", False, False, options),
    "TRL, CE, packed": lambda options: trl(True, True, options),
    "TRL, CE, packed, kept": lambda options: trl(True, False, options),
    "ours, CE, packed": lambda options: ours("ce", True, False, options),
    "ours, SED, packed": lambda options: ours("sed", True, False, options),
    "ours, CE, padded, recomputed": lambda options: ours("ce", False, True, options),
    "ours, CE, packed, recomputed": lambda options: ours("ce", True, True, options),
}


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def child(name: str, options: argparse.Namespace, results: multiprocessing.Queue[Measured]) -> None:
    """One variant in a process of its own, whose peak memory is then the variant's."""
    torch.set_num_threads(options.threads)
    results.put(VARIANTS[name](options))


def run(name: str, options: argparse.Namespace) -> Measured:
    """`child` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(name, options, results))
    process.start()
    measured: Measured = results.get()
    process.join()
    return measured


def main() -> None:
    """Print the table and write the JSON beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".cache/smollm2/model"))
    parser.add_argument("--data", type=Path, default=Path(".cache/smollm2/data/gsm8k_train.jsonl"))
    for option, default in (("rows", 16), ("steps", 3), ("rounds", 2), ("threads", 2), ("zero-stage", 1)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    taken: dict[str, list[Measured]] = {name: [] for name in options.only}
    for _ in range(options.rounds):
        for name in options.only:
            taken[name].append(run(name, options))
            print(name, asdict(taken[name][-1]), flush=True)
    machine = {"processor": processor(), "torch": torch.__version__, "rows": options.rows, "threads": options.threads}
    print(json.dumps(machine))


if __name__ == "__main__":
    main()
