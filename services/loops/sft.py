"""The SFT stage: calibrate tau on the starting model, train, publish a verified checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sedsft.config import DataConfig, SEDObjective, SFTConfig
from sedsft.data.chat import encode_sft, load_tokenizer
from sedsft.data.order import RowOrder
from sedsft.data.sources import read_sft_rows
from sedsft.exploration import Calibration, calibrate_tau
from sedsft.records import Example
from services.actor_group import ActorGroup
from services.checkpoints import CheckpointInfo
from services.errors import DataError
from services.jobspec import SFTStage
from services.loops.ranks import (
    SETUP_TIMEOUT_S,
    STEP_TIMEOUT_S,
    merge_sums,
    publish,
    spec_sha256,
    start_ranks,
    trainer_actors,
)
from services.placement import actor_groups
from services.run import Run, write_json
from services.training.messages import InspectedRow, SFTSetup
from services.training.sft_worker import SFTWorker

MAX_HELD_OUT_ROWS = 100
INSPECTED_ROWS = 6
CE_REPORT_TOP_K = 2
"""Top-k mass shown in the report for objectives that have none of their own."""


def run_sft(run: Run, stage: SFTStage, folder: Path) -> None:
    """Train `stage` and publish its checkpoint; the figures of every step go to `run`.

    Raises:
        JobError: bad rows or model, a dead rank, a loss that is not finite.
    """
    config, model_path = stage.sft, run.model_path(stage.model)
    run.phase("data")
    tokenizer = load_tokenizer(model_path)
    training, held_out = _examples(run, config, tokenizer)
    order = RowOrder(len(training), config.batch_size, config.seed, epochs=config.epochs, steps=config.steps)
    with actor_groups([trainer_actors(stage.trainer, SFTWorker)], run.job_id) as [trainers]:
        run.phase("loading")
        zero = stage.trainer.zero_stage
        start_ranks(trainers, stage.trainer, lambda ranks: SFTSetup(ranks, str(model_path), config, zero, order.num_steps))
        run.phase("calibrating")
        calibration = _calibrate(run, trainers, config, held_out, folder)
        tau = calibration.tau if calibration else _explicit_tau(config)
        consumed = 0
        for step, indices in enumerate(order.batches(), start=1):
            run.phase("training", step, order.num_steps)
            run.metrics(step, _train_step(trainers, config, [training[index] for index in indices], tau, step))
            consumed += len(indices)
        run.phase("saving", order.num_steps, order.num_steps)
        write_json(folder / "tokens.json", _coloured(trainers, config, training[:INSPECTED_ROWS], tau, tokenizer))
        info = CheckpointInfo(
            stage.name, order.num_steps, spec_sha256(run), consumed, tau, asdict(calibration) if calibration else None
        )
        publish(run, trainers, folder, info)


def _examples(run: Run, config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows."""

    def encode(data: DataConfig) -> list[Example]:
        encoded = encode_sft(read_sft_rows(data), tokenizer, config.max_length, config.on_too_long)
        if encoded.dropped:
            run.event("rows_dropped", f"{len(encoded.dropped)} rows of {data.path} are too long", lines=encoded.dropped)
        return list(encoded.examples)

    examples = encode(config.data)
    if config.held_out is not None:
        return examples, encode(config.held_out)
    if len(examples) < 2:
        raise DataError(f"expected at least 2 rows in {config.data.path} to hold one out, got {len(examples)}")
    held_out = max(1, min(MAX_HELD_OUT_ROWS, len(examples) // 10))
    return examples[:-held_out], examples[-held_out:]


def _calibrate(
    run: Run, trainers: ActorGroup, config: SFTConfig, held_out: Sequence[Example], folder: Path
) -> Calibration | None:
    """tau from the response tokens of held-out rows under the starting model; None where the objective needs none."""
    objective = config.objective
    if not (isinstance(objective, SEDObjective) and objective.mask and objective.tau is None):
        return None
    shards = [(held_out[rank :: len(trainers)], objective.top_k) for rank in range(len(trainers))]
    masses_N = np.concatenate(trainers.scatter("token_masses", shards, timeout_s=SETUP_TIMEOUT_S))
    calibration = calibrate_tau(masses_N, objective.mask_ratio, top_k=objective.top_k)
    run.event("calibrated", f"tau = {calibration.tau:.6f} from {calibration.num_tokens} tokens", **asdict(calibration))
    write_json(folder / "calibration.json", asdict(calibration))
    return calibration


def _explicit_tau(config: SFTConfig) -> float | None:
    return config.objective.tau if isinstance(config.objective, SEDObjective) else None


def _train_step(
    trainers: ActorGroup, config: SFTConfig, batch: Sequence[Example], tau: float | None, step: int
) -> dict[str, float]:
    """One optimizer step over all ranks; its figures, as means over the trained tokens of the whole batch."""
    started = time.monotonic()
    # The first token of a row is never predicted, so it carries no loss even where it is the assistant's.
    denominator = int(sum(example.trained_T[1:].sum() for example in batch))
    shards = [(batch[rank :: len(trainers)], denominator, tau, step) for rank in range(len(trainers))]
    sums = merge_sums(trainers.scatter("train_step", shards, timeout_s=STEP_TIMEOUT_S))
    figures = {name: sums[name] / denominator for name in ("loss", "ce", "extra", "entropy", "target_prob")}
    if isinstance(config.objective, SEDObjective):
        figures["masked_share"] = 1.0 - sums["active"] / denominator
    figures["tokens_per_s"] = sum(len(example.input_ids_T) for example in batch) / (time.monotonic() - started)
    return figures | {"learning_rate": sums["learning_rate"], "grad_norm": sums["grad_norm"]}


def _coloured(
    trainers: ActorGroup,
    config: SFTConfig,
    examples: Sequence[Example],
    tau: float | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """A few rows token by token for the report, with where the diversity term applies."""
    top_k = config.objective.top_k if isinstance(config.objective, SEDObjective) else CE_REPORT_TOP_K
    # Every rank takes part, since the forward pass is collective; with equal rows, rank 0 speaks for all.
    rows: list[InspectedRow] = trainers.call("inspect", examples, tau, top_k, timeout_s=STEP_TIMEOUT_S)[0]
    return {"tau": tau, "top_k": top_k, "rows": [_coloured_row(row, tokenizer) for row in rows]}


def _coloured_row(row: InspectedRow, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    columns = zip(row.input_ids, row.trained, row.probability, row.top_k_mass, row.active, strict=True)
    tokens = [
        {"text": tokenizer.decode([token]), "trained": trained, "p": p, "mass": mass, "active": active}
        for token, trained, p, mass, active in columns
    ]
    return {"line": row.line, "tokens": tokens}
