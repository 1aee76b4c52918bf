"""The model card of a checkpoint: README.md of the model folder, with the front matter that the hub reads.

It names models and files, never the folders they lie in: the card goes wherever the model goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sedsft.config import (
    AdvantageEstimator,
    CEObjective,
    DFTObjective,
    GEMObjective,
    GRPOConfig,
    Objective,
    SEDObjective,
    SFTConfig,
)
from services.checkpoints import CheckpointInfo, installed_versions
from services.jobspec import GateStage, JobSpec, ModelRef, RLStage, SFTStage, stages_of

_HUB_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][A-Za-z0-9._-]{0,94}[A-Za-z0-9_]|[A-Za-z0-9_]")
_ADVANTAGES: dict[AdvantageEstimator, tuple[str, str]] = {
    "grpo": ("GRPO", "A is the reward normalised within the group of a prompt"),
    "dr_grpo": ("Dr. GRPO", "A is the reward less its group's mean; losses are divided by responses times max_tokens"),
    "rloo": ("RLOO", "A is the reward less the mean of its group's others"),
    "reinforce_pp": ("REINFORCE++", "A is the reward normalised over the iteration"),
    "reinforce_pp_baseline": ("REINFORCE++ with baseline", "A is the reward less its group's mean, scaled over the iteration"),
}


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the stage's settings: `figures` of the newest step, `data` a data report's part on one source."""

    info: CheckpointInfo
    figures: Mapping[str, float]
    data: Mapping[str, Any] | None = None


def model_card(spec: JobSpec, stage: SFTStage | RLStage, facts: CardFacts) -> str:
    """README.md of the checkpoint that `facts.info` describes, published by `stage` of the job `spec`."""
    base = base_model(spec, stage.model)
    method = _method(stage)
    parts = [
        _front_matter(base, stage),
        f"# {base}, {method[0]}\n",
        f"`{base}` after {_training(stage, facts.info)}.\n",
        f"## Method\n\n{method[1]}\n",
        _settings(stage),
    ]
    if facts.info.tau is not None:
        parts.append(_tau(facts.info))
    if facts.data is not None:
        parts.append(_table("Training rows", _rows(facts.data)))
    if facts.figures:
        parts.append(_table(f"Figures of step {facts.info.step}", facts.figures))
    parts.append(_table("Versions", installed_versions()))
    parts.append(
        "## Provenance\n\nTrained with [SED-SFT](https://arxiv.org/abs/2602.07464) in the `sedsft` service. "
        f"sha256 of the resolved job spec: `{facts.info.spec_sha256}`.\n"
    )
    return "\n".join(parts)


def base_model(spec: JobSpec, ref: ModelRef) -> str:
    """Name of the model folder that a chain of stages began with; behind a gate, those of all candidates, if they differ."""
    while ref.path is None:
        stage = next(stage for stage in stages_of(spec) if stage.name == ref.stage)
        if isinstance(stage, GateStage):
            return " or ".join(dict.fromkeys(base_model(spec, candidate) for candidate in stage.candidates))
        assert isinstance(stage, SFTStage | RLStage), "expected a stage that trains: the job spec checks it"
        ref = stage.model
    return PurePath(ref.path).name


def _front_matter(base: str, stage: SFTStage | RLStage) -> str:
    tags = ["sedsft", f"sft-{stage.sft.objective.type}" if isinstance(stage, SFTStage) else "grpo"]
    named = {"base_model": base} if _HUB_NAME.fullmatch(base) else {}
    fields = {"library_name": "transformers", "pipeline_tag": "text-generation", **named, "tags": tags}
    # JSON values are YAML values.
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---", ""])


def _training(stage: SFTStage | RLStage, info: CheckpointInfo) -> str:
    lora = stage.grpo.lora if isinstance(stage, RLStage) else stage.sft.lora
    adapters = " of low-rank adapters, merged into its weights" if lora is not None else ""
    if isinstance(stage, RLStage):
        return f"{info.step} iterations of reinforcement learning{adapters} over {info.consumed_samples} samples"
    return f"{info.step} optimizer steps of supervised fine-tuning{adapters} over {info.consumed_samples} rows"


def _method(stage: SFTStage | RLStage) -> tuple[str, str]:
    """Name and description of the loss."""
    if isinstance(stage, RLStage):
        return _policy_loss(stage.grpo)
    return _objective(stage.sft.objective)


def _policy_loss(config: GRPOConfig) -> tuple[str, str]:
    weight, old = ("-", "π_sampler") if config.tis_cap is None else ("-w ", "π_old")
    loss = f"{weight}min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A), ρ = π / {old}"
    if config.tis_cap is not None:
        loss += ", w = min(π_old / π_sampler, tis_cap)"
    if config.dual_clip is not None:
        loss += ", at least dual_clip · A for A < 0"
    if config.kl_weight:
        loss += "; plus kl_weight (π_ref / π - log(π_ref / π) - 1), π_ref that of the starting model"
    name, advantage = _ADVANTAGES[config.advantage]
    return name, f"Loss per response token: {loss}. {advantage}."


def _objective(objective: Objective) -> tuple[str, str]:
    match objective:
        case CEObjective():
            return "cross-entropy", "Loss per response token: -log p."
        case SEDObjective(mask=True):
            where = "M = 1 where the top-k mass of the next-token distribution lies below τ, else 0."
            return "SED-SFT", f"Loss per response token: -log p + λ M (p - 1/2)², {where}"
        case SEDObjective():
            return "SED-SFT without mask", "Loss per response token: -log p + λ (p - 1/2)²."
        case DFTObjective():
            return "DFT", "Loss per response token: -sg(p) log p."
        case GEMObjective():
            return "GEM", "Loss per response token: -Σ_j q_j w_j (log p - log π_j), q = sg(softmax(z / β))."


def _settings(stage: SFTStage | RLStage) -> str:
    """Settings that make the method; paths stay out."""
    if isinstance(stage, RLStage):
        shown = stage.grpo.model_dump(mode="json", exclude={"data", "reward", "optimizer", "checkpoints", "ledger"})
        return _table("Settings", {**shown, **_optimizer(stage.grpo.optimizer.model_dump(mode="json"))})
    config: SFTConfig = stage.sft
    chosen = {"epochs", "steps", "batch_size", "max_length", "precision", "seed"}
    shown = {f"objective.{name}": value for name, value in config.objective.model_dump(mode="json").items()}
    shown |= config.model_dump(mode="json", include=chosen, exclude_none=True)
    shown |= _optimizer(config.optimizer.model_dump(mode="json"))
    if config.lora is not None:
        shown |= {f"lora.{name}": value for name, value in config.lora.model_dump(mode="json").items()}
    return _table("Settings", {"data": PurePath(config.data.path).name, **shown})


def _optimizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"optimizer.{name}": value for name, value in settings.items()}


def _rows(report: Mapping[str, Any]) -> dict[str, Any]:
    counts = {name: report[name] for name in ("kept", "skipped", "dropped", "cut", "duplicates")}
    return counts | {"tokens": report["tokens"]["total"], "trained tokens": report["trained"]["total"]}


def _tau(info: CheckpointInfo) -> str:
    calibration = {} if info.calibration is None else info.calibration
    single = {f"calibration.{name}": v for name, v in calibration.items() if not isinstance(v, dict | list | tuple)}
    return _table("τ and its calibration", {"tau": info.tau, **single})


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {_shown(value)} |" for name, value in values.items())
    return f"## {title}\n\n| | |\n|---|---|\n{rows}\n"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
