"""The SFT stage: calibrate tau on the starting model, train, publish a verified checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sedsft.config import DataConfig, SEDObjective, SFTConfig
from sedsft.data.batching import balanced_shards
from sedsft.data.chat import encode_sft, load_tokenizer
from sedsft.data.lengths import limit_examples
from sedsft.data.order import RowOrder
from sedsft.data.sources import read_sft_rows
from sedsft.exploration import MassSketch, calibrate_sketch
from sedsft.records import Example
from sedsft.tau import TauController, calibration_rows, calibration_top_k
from services.actor_group import ActorGroup
from services.checkpoints import CheckpointInfo
from services.errors import DataError
from services.jobspec import SFTStage
from services.loops.ranks import (
    SETUP_TIMEOUT_S,
    STEP_TIMEOUT_S,
    merge_sums,
    prune,
    publish,
    spec_sha256,
    start_ranks,
    trainer_actors,
)
from services.loops.resume import identity_of, resume_point
from services.placement import actor_groups
from services.run import Run, write_json
from services.training.messages import InspectedRow, SFTSetup
from services.training.sft_worker import SFTWorker

MAX_HELD_OUT_ROWS = 100
INSPECTED_ROWS = 6
CE_REPORT_TOP_K = 2
"""Top-k mass shown in the report for objectives that have none of their own."""


def run_sft(run: Run, stage: SFTStage, folder: Path) -> None:
    """Train `stage` and publish its checkpoints; the figures of every step go to `run`.

    A later attempt goes on behind the newest good checkpoint of those before it.

    Raises:
        JobError: bad rows or model, a dead rank, a loss that is not finite, checkpoints of which none is good.
    """
    config, model_path = stage.sft, run.model_path(stage.model)
    run.phase("data")
    tokenizer = load_tokenizer(model_path)
    training, held_out = _examples(run, config, tokenizer)
    order = RowOrder(len(training), config.batch_size, config.seed, epochs=config.epochs, steps=config.steps)
    identity = identity_of(stage, model_path, training, held_out)
    point = resume_point(run, stage, identity)
    with actor_groups([trainer_actors(stage.trainer, SFTWorker)], run.job_id) as [trainers]:
        run.phase("loading")
        zero = stage.trainer.zero_stage
        start_ranks(trainers, stage.trainer, lambda ranks: SFTSetup(ranks, str(model_path), config, zero, order.num_steps))
        if point is not None:
            checkpoint, info = point
            trainers.call("resume", checkpoint, timeout_s=SETUP_TIMEOUT_S)
            tau = TauController.from_state(_masked(config), info.tau_state) if info.tau_state is not None else None
        else:
            run.phase("calibrating")
            tau, calibration = _calibrate(run, trainers, config, held_out)
            info = CheckpointInfo(stage.name, 0, spec_sha256(run), 0, calibration=calibration, identity=identity)
        if info.calibration is not None:
            write_json(folder / "calibration.json", info.calibration)
        for step, indices in enumerate(order.batches(info.step), start=info.step + 1):
            run.phase("training", step, order.num_steps)
            figures = _train_step(trainers, config, [training[index] for index in indices], tau, step)
            if step == order.num_steps or _is_due(step, config.evaluate_every):
                figures |= _evaluate(trainers, config, held_out, _value(tau))
            run.metrics(step, figures)
            consumed = info.consumed_samples + len(indices)
            state = tau.state() if tau else None
            info = replace(info, step=step, consumed_samples=consumed, tau=_value(tau), tau_state=state)
            if step < order.num_steps and _is_due(step, config.checkpoints.every_steps):
                _save(run, trainers, config, folder, info, order.num_steps)
        write_json(folder / "tokens.json", _coloured(trainers, config, training[:INSPECTED_ROWS], _value(tau), tokenizer))
        _save(run, trainers, config, folder, info, order.num_steps)


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _save(run: Run, trainers: ActorGroup, config: SFTConfig, folder: Path, info: CheckpointInfo, num_steps: int) -> None:
    """Publish the state behind step `info.step`, and only then remove older checkpoints."""
    run.phase("saving", info.step, num_steps)
    publish(run, trainers, folder, info)
    prune(run, folder, config.checkpoints.keep)


def _examples(run: Run, config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows."""

    def encode(data: DataConfig) -> list[Example]:
        read = read_sft_rows(data)
        if read.skipped:
            message = f"{len(read.skipped)} rows of {data.path} cannot be used"
            run.event("rows_skipped", message, rows=[asdict(bad) for bad in read.skipped])
        if read.examples:
            encoded = limit_examples(read.examples, config.max_length, config.on_too_long, len(tokenizer))
        else:
            encoded = encode_sft(read.rows, tokenizer, config.max_length, config.on_too_long)
        if encoded.dropped:
            run.event("rows_dropped", f"{len(encoded.dropped)} rows of {data.path} are too long", lines=encoded.dropped)
        if encoded.cut:
            run.event("rows_cut", f"{len(encoded.cut)} rows of {data.path} are cut at {config.max_length}", lines=encoded.cut)
        return list(encoded.examples)

    examples = encode(config.data)
    if config.held_out is not None:
        return examples, encode(config.held_out)
    if len(examples) < 2:
        raise DataError(f"expected at least 2 rows in {config.data.path} to hold one out, got {len(examples)}")
    held_out = max(1, min(MAX_HELD_OUT_ROWS, len(examples) // 10))
    return examples[:-held_out], examples[-held_out:]


def _masked(config: SFTConfig) -> SEDObjective:
    """The objective of a run that has a tau."""
    assert isinstance(config.objective, SEDObjective), "expected tau with SED only"
    return config.objective


def _value(tau: TauController | None) -> float | None:
    return tau.tau if tau else None


def _calibrate(
    run: Run, trainers: ActorGroup, config: SFTConfig, held_out: Sequence[Example]
) -> tuple[TauController | None, dict[str, Any] | None]:
    """tau from held-out rows under the starting model, and what it came from; None where the objective needs none."""
    objective = config.objective
    if not (isinstance(objective, SEDObjective) and objective.mask):
        return None, None
    if objective.tau is not None:
        return TauController(objective, None), None
    rows, top_k = calibration_rows(objective, held_out), calibration_top_k(objective)
    shards = [(rows[rank :: len(trainers)], top_k) for rank in range(len(trainers))]
    sketches: list[MassSketch] = trainers.scatter("mass_sketch", shards, timeout_s=SETUP_TIMEOUT_S)
    masses = sum(sketches, MassSketch.empty())
    calibration = asdict(calibrate_sketch(masses, objective.mask_ratio, top_k=top_k))
    run.event("calibrated", f"tau = {calibration['tau']:.6f} from {calibration['num_tokens']} tokens", **calibration)
    return TauController(objective, masses), calibration


def _train_step(
    trainers: ActorGroup, config: SFTConfig, batch: Sequence[Example], tau: TauController | None, step: int
) -> dict[str, float]:
    """One optimizer step over all ranks; its figures, as means over the trained tokens of the whole batch."""
    started = time.monotonic()
    # The first token of a row is never predicted, so it carries no loss even where it is the assistant's.
    denominator = int(sum(example.trained_T[1:].sum() for example in batch))
    split = balanced_shards([len(example.input_ids_T) for example in batch], len(trainers))
    shards = [([batch[index] for index in indices], denominator, _value(tau), step) for indices in split]
    per_rank = trainers.scatter("train_step", shards, timeout_s=STEP_TIMEOUT_S)
    sums = merge_sums([own for own, _ in per_rank])
    figures = {name: sums[name] / denominator for name in ("loss", "ce", "extra", "entropy", "target_prob")}
    if isinstance(config.objective, SEDObjective):
        figures["masked_share"] = 1.0 - sums["active"] / denominator
    if tau is not None:
        figures |= {"tau": tau.tau, "tau_drift": tau.drift}
        masses: list[MassSketch] = [own for _, own in per_rank if own is not None]
        # Counted for tau that does not move, too: its state says how many steps it has stood for.
        tau.observe(sum(masses, MassSketch.empty()))
    figures["tokens_per_s"] = sum(len(example.input_ids_T) for example in batch) / (time.monotonic() - started)
    return figures | {"learning_rate": sums["learning_rate"], "grad_norm": sums["grad_norm"]}


def _evaluate(trainers: ActorGroup, config: SFTConfig, held_out: Sequence[Example], tau: float | None) -> dict[str, float]:
    """Means over the response tokens of the held-out rows under the current weights."""
    shards = [(held_out[rank :: len(trainers)], tau) for rank in range(len(trainers))]
    sums = merge_sums(trainers.scatter("evaluate", shards, timeout_s=STEP_TIMEOUT_S))
    figures = {f"heldout_{name}": sums[name] / sums["tokens"] for name in ("ce", "entropy")}
    if isinstance(config.objective, SEDObjective):
        figures["heldout_masked_share"] = 1.0 - sums["active"] / sums["tokens"]
    return figures


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
