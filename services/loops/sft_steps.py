"""What one SFT step asks of the trainer ranks: calibration, training, evaluation, inspection; sums become figures here."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sedsft.config import SEDObjective, SFTConfig
from sedsft.data.batching import balanced_shards
from sedsft.exploration import MassSketch, calibrate_sketch
from sedsft.records import Example
from sedsft.tau import TauController, calibration_rows, calibration_top_k
from services.actor_group import ActorGroup
from services.loops.ranks import SETUP_TIMEOUT_S, STEP_TIMEOUT_S, merge_sums
from services.run import Run
from services.training.messages import InspectedRow

CE_REPORT_TOP_K = 2
"""Top-k mass shown in the report for objectives that have none of their own."""


@dataclass(frozen=True)
class StepOutcome:
    """A step as all ranks saw it. `fault` says what was not finite where the step was skipped; its figures are fewer then."""

    figures: dict[str, float]
    fault: str | None = None


def calibrate(
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


def train_step(
    trainers: ActorGroup, config: SFTConfig, batch: Sequence[Example], tau: TauController | None, step: int
) -> StepOutcome:
    """One optimizer step over all ranks; its figures, as means over the trained tokens of the whole batch.

    tau follows the step, unless it was skipped.
    """
    started = time.monotonic()
    # The first token of a row is never predicted, so it carries no loss even where it is the assistant's.
    denominator = int(sum(example.trained_T[1:].sum() for example in batch))
    split = balanced_shards([len(example.input_ids_T) for example in batch], len(trainers))
    shards = [([batch[index] for index in indices], denominator, tau.tau if tau else None, step) for indices in split]
    per_rank = trainers.scatter("train_step", shards, timeout_s=STEP_TIMEOUT_S)
    sums = merge_sums([own for own, _ in per_rank])
    seconds = time.monotonic() - started
    figures = {"tokens_per_s": sum(len(example.input_ids_T) for example in batch) / seconds}
    figures["learning_rate"] = sums["learning_rate"]
    if tau is not None:
        figures |= {"tau": tau.tau, "tau_drift": tau.drift}
    if not math.isfinite(sums["grad_norm"]):
        return StepOutcome(figures, "gradient" if math.isfinite(sums["loss"]) else "loss")
    figures |= {name: sums[name] / denominator for name in ("loss", "ce", "extra", "entropy", "target_prob")}
    if isinstance(config.objective, SEDObjective):
        figures["masked_share"] = 1.0 - sums["active"] / denominator
    if tau is not None:
        masses: list[MassSketch] = [own for _, own in per_rank if own is not None]
        # Counted for tau that does not move, too: its state says how many steps it has stood for.
        tau.observe(sum(masses, MassSketch.empty()))
    return StepOutcome(figures | {"grad_norm": sums["grad_norm"]})


def evaluate(trainers: ActorGroup, config: SFTConfig, held_out: Sequence[Example], tau: float | None) -> dict[str, float]:
    """Means over the response tokens of the held-out rows under the current weights."""
    shards = [(held_out[rank :: len(trainers)], tau) for rank in range(len(trainers))]
    sums = merge_sums(trainers.scatter("evaluate", shards, timeout_s=STEP_TIMEOUT_S))
    figures = {f"heldout_{name}": sums[name] / sums["tokens"] for name in ("ce", "entropy")}
    if isinstance(config.objective, SEDObjective):
        figures["heldout_masked_share"] = 1.0 - sums["active"] / sums["tokens"]
    return figures


def coloured_rows(
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
