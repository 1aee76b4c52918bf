"""Tokens per second and peak memory of SFT, this project's CE and SED beside TRL's SFTTrainer, alternating in one run.

    python benchmarks/bench_sft.py [--model FOLDER --data GSM8K.jsonl --rows 16 --steps 2 --rounds 2 --threads 2]

All variants see the same rows with the same chat template and loss mask, `--rows` per optimizer step, in passes of 4 padded
rows or of up to 1,024 packed tokens, with activations recomputed in the backward pass and bf16 arithmetic over fp32 weights.
That is how TRL runs as it ships. `kept` variants keep activations. TRL and this project take turns, each in a process of its
own whose first step is not timed; this project's CE and SED take turns on the same rows in one. Tokens are those of rows, never
padding. Speeds are those of the fastest step; SED's step over CE's is the median over the pairs on the same rows. Needs
requirements/bench.txt and what examples/prepare_smollm2.py makes. Writes bench_sft.json beside it.
"""

from __future__ import annotations

import argparse
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
    """What a process reports of one objective."""

    tokens_per_s: tuple[float, ...]
    """Of each timed step."""
    peak_mb: float
    base_mb: float
    """Memory before the model is opened: interpreter and libraries."""
    loss: float
    """Cross-entropy of the last step."""


def read_examples(options: argparse.Namespace) -> Sequence[Example]:
    """The rows of all steps, the untimed one included."""
    data = DataConfig(path=str(options.data), format="question_answer", max_rows=options.rows * (options.steps + 1))
    read = read_sft_rows(data)
    return encode_sft(read.rows, load_tokenizer(str(options.model)), MAX_LENGTH, "error").examples


def ours(options: argparse.Namespace, *, packed: bool, recompute: bool) -> dict[str, Measured]:
    """One trainer rank, driven as the SFT loop drives it: CE and SED in turn, each on the rows of a step."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from services.training.messages import SFTSetup  # noqa: PLC0415
    from services.training.ranks import RankSetup  # noqa: PLC0415
    from services.training.sft_worker import SFTWorker  # noqa: PLC0415

    examples = read_examples(options)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    num_updates = 1 + 2 * options.steps
    size: dict[str, Any] = {"pack_tokens": PACK_TOKENS} if packed else {"micro_batch_size": MICRO_BATCH_ROWS}
    ce = SFTConfig(
        objective=CEObjective(),
        data=DataConfig(path=str(options.data)),
        steps=num_updates,
        batch_size=options.rows,
        max_length=MAX_LENGTH,
        gradient_checkpointing=recompute,
        **size,
    )
    configs = {"ours, CE": ce, "ours, SED": ce.model_copy(update={"objective": SEDObjective(tau=TAU)})}
    base_mb = peak_mb()
    worker = SFTWorker(0)
    ranks = RankSetup(0, 1, "127.0.0.1", port, threads=options.threads)
    worker.setup(SFTSetup(ranks, str(options.model), ce, options.zero_stage, num_updates))
    speeds: dict[str, list[float]] = {name: [] for name in configs}
    losses: dict[str, float] = {}
    plan = [("ours, CE", 0), *((name, step) for step in range(1, options.steps + 1) for name in configs)]
    for update, (name, step) in enumerate(plan, start=1):
        rows = examples[step * options.rows : (step + 1) * options.rows]
        denominator = int(sum(row.trained_T[1:].sum() for row in rows))
        # The objective is all that differs, so that one model and one process serve both.
        worker._config = configs[name]
        started = time.perf_counter()
        figures, _ = worker.train_step(rows, denominator, TAU if name == "ours, SED" else None, update)
        if step:
            speeds[name].append(sum(len(row.input_ids_T) for row in rows) / (time.perf_counter() - started))
            losses[name] = figures["ce"] / denominator
    return {name: Measured(tuple(speeds[name]), peak_mb(), base_mb, losses[name]) for name in configs}


def trl(options: argparse.Namespace, *, packed: bool, recompute: bool) -> dict[str, Measured]:
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
    speeds = tuple(tokens_per_step / seconds for seconds in step_s)
    return {"TRL, CE": Measured(speeds, peak_mb(), base_mb, losses[-1])}


PEERS: tuple[Callable[..., dict[str, Measured]], ...] = (trl, ours)


def peak_mb() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class Way:
    """How a process trains."""

    packed: bool
    recompute: bool

    def __str__(self) -> str:
        return f"{'packed' if self.packed else 'padded'}{'' if self.recompute else ', kept'}"


def child(peer: int, way: Way, options: argparse.Namespace, results: multiprocessing.Queue[dict[str, Measured]]) -> None:
    """One measurement in a process of its own, whose peak memory is then that of what it measures."""
    torch.set_num_threads(options.threads)
    results.put(PEERS[peer](options, **asdict(way)))


def run(peer: int, way: Way, options: argparse.Namespace) -> dict[str, Measured]:
    """`child` in a fresh process."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=child, args=(peer, way, options, results))
    process.start()
    measured: dict[str, Measured] = results.get()
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
    ways = [Way(packed, recompute) for recompute in ((True, False) if options.kept else (True,)) for packed in (False, True)]
    taken: dict[tuple[str, Way], list[Measured]] = {}
    for _ in range(options.rounds):
        for way, peer in itertools.product(ways, range(len(PEERS))):
            for name, measured in run(peer, way, options).items():
                taken.setdefault((name, way), []).append(measured)
                speeds = " ".join(f"{speed:.1f}" for speed in measured.tokens_per_s)
                print(f"{name:10} {way!s:12} {measured.peak_mb:6.0f} MB, tokens/s of each step: {speeds}", flush=True)
    rows = []
    for (name, way), rounds in taken.items():
        speed, peak = _best(rounds)
        peer_speed, peer_peak = _best(taken["TRL, CE", way])
        row = {"variant": f"{name}, {way}", "tokens_per_s": speed, "of_trl_speed": speed / peer_speed}
        row |= {"peak_mb": peak, "of_trl_peak": peak / peer_peak, "rounds": [asdict(measured) for measured in rounds]}
        rows.append(row)
        print(f"{row['variant']:22} {speed:6.1f} tokens/s {speed / peer_speed:5.2f}x  {peak:6.0f} MB {peak / peer_peak:5.2f}x")
    ratios = {str(way): _sed_over_ce(taken["ours, CE", way], taken["ours, SED", way]) for way in ways}
    print("time of a step, SED over CE:", ", ".join(f"{way} {ratio:.3f}" for way, ratio in ratios.items()))
    machine = {"processor": processor(), "torch": torch.__version__, "rows": options.rows, "threads": options.threads}
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"machine": machine, "rows": rows, "sed_step_over_ce": ratios}, indent=1) + "\n", encoding="utf-8"
    )


def _sed_over_ce(ce: Sequence[Measured], sed: Sequence[Measured]) -> float:
    """Median over steps of time of SED / time of CE, which took turns on the same rows."""
    pairs = zip((s for m in ce for s in m.tokens_per_s), (s for m in sed for s in m.tokens_per_s), strict=True)
    return statistics.median(ce_speed / sed_speed for ce_speed, sed_speed in pairs)


def _best(rounds: Sequence[Measured]) -> tuple[float, float]:
    """Tokens/s of the fastest step, and the smallest peak."""
    return max(speed for measured in rounds for speed in measured.tokens_per_s), min(measured.peak_mb for measured in rounds)


if __name__ == "__main__":
    main()
