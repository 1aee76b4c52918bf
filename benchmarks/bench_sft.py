"""Tokens per second and peak memory of SFT, this project's CE and SED beside TRL's SFTTrainer, alternating in one run.

    python benchmarks/bench_sft.py [--model FOLDER --data GSM8K.jsonl --rows 16 --steps 2 --rounds 2 --threads 2]

All variants see the same rows with the same chat template and loss mask, `--rows` per optimizer step, in passes of 4 padded
rows or of up to 1,024 packed tokens, with activations recomputed in the backward pass and bf16 arithmetic over fp32 weights.
That is how TRL runs as it ships. `kept` variants keep activations. A variant is a process of its own, and its first step is
not timed. Tokens are those of rows, never padding. Needs requirements/bench.txt and what examples/prepare_smollm2.py makes.
Writes bench_sft.json beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
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
from sedsft.data.chat import load_tokenizer
from sedsft.data.encoding import encode_sft
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


def ours(objective: str, options: argparse.Namespace, *, packed: bool, recompute: bool) -> Measured:
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


def trl(options: argparse.Namespace, *, packed: bool, recompute: bool) -> Measured:
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
    step_s = [end - start for start, end in itertools.pairwise(ends)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Measured(tokens_per_step * len(step_s) / sum(step_s), statistics.median(step_s), peak_mb(), base_mb, losses[-1])


VARIANTS: dict[str, Callable[[argparse.Namespace], Measured]] = {
    f"{name}, {'packed' if packed else 'padded'}{'' if recompute else ', kept'}": functools.partial(
        measure, packed=packed, recompute=recompute
    )
    for recompute in (True, False)
    for packed in (False, True)
    for name, measure in {
        "TRL, CE": trl,
        "ours, CE": functools.partial(ours, "ce"),
        "ours, SED": functools.partial(ours, "sed"),
    }.items()
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
    for option, default in (("rows", 16), ("steps", 2), ("rounds", 2), ("threads", 2), ("zero-stage", 2)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--kept", action="store_true", help="also with activations kept")
    options = parser.parse_args()
    names = [name for name in VARIANTS if options.kept or not name.endswith("kept")]
    taken: dict[str, list[Measured]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            taken[name].append(run(name, options))
            print(f"{name:25} {taken[name][-1].tokens_per_s:6.1f} tokens/s {taken[name][-1].peak_mb:6.0f} MB", flush=True)
    rows = []
    for name, measured in taken.items():
        peer = taken["TRL, CE" + name.partition("CE" if "CE" in name else "SED")[2]]
        speed, peak = max(m.tokens_per_s for m in measured), min(m.peak_mb for m in measured)
        row = {"variant": name, "tokens_per_s": speed, "peak_mb": peak, "base_mb": measured[0].base_mb}
        row["of_trl_speed"] = speed / max(m.tokens_per_s for m in peer)
        row["of_trl_peak"] = peak / min(m.peak_mb for m in peer)
        rows.append(row | {"rounds": [asdict(m) for m in measured]})
        print(f"{name:25} {speed:6.1f} tokens/s {row['of_trl_speed']:5.2f}x  {peak:6.0f} MB {row['of_trl_peak']:5.2f}x")
    machine = {"processor": processor(), "torch": torch.__version__, "rows": options.rows, "threads": options.threads}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
