"""The RL stage: readiness figures, then rounds of sample, score, update and verified weight sync."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sedsft.config import GRPOConfig, SamplingConfig
from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.data.order import RowOrder
from sedsft.data.sources import read_prompt_rows
from sedsft.evaluation.metrics import readiness
from sedsft.grpo import GroupAdvantages, group_advantages
from sedsft.records import PolicyRow, Prompt, RolloutGroup
from services.actor_group import ActorGroup
from services.checkpoints import CheckpointInfo
from services.jobspec import RLStage
from services.loops.engines import EngineRequest, Engines
from services.loops.ranks import STEP_TIMEOUT_S, merge_sums, publish, spec_sha256, start_ranks, trainer_actors
from services.model_card import CardFacts, model_card
from services.placement import actor_groups
from services.rollout.weight_sync import Pair, Probe, SyncReport, WeightSync
from services.run import Run, write_json
from services.training.messages import PolicySetup
from services.training.policy_worker import PolicyWorker


def run_grpo(run: Run, stage: RLStage, folder: Path, engines: Engines) -> None:
    """Train `stage` and publish its checkpoint; the figures of every iteration go to `run`.

    Raises:
        JobError: bad rows or model, a dead worker, too many unscored samples, a sampler that disagrees with the trainer.
    """
    config, model_path = stage.grpo, run.model_path(stage.model)
    run.phase("data")
    prompts = _prompts(run, config, model_path)
    order = RowOrder(len(prompts), config.prompts_per_iteration, config.seed, steps=config.iterations)
    updates = config.prompts_per_iteration // config.mini_batch_prompts
    run.phase("loading")
    # Before the trainers are reserved, so that engines of another shape make room first; both then load side by side.
    engines.start(EngineRequest(model_path, config.precision, stage.rollout, stage.scorer, config.reward))
    with actor_groups([trainer_actors(stage.trainer, PolicyWorker)], run.job_id) as [trainers]:
        zero, steps = stage.trainer.zero_stage, config.iterations * updates
        start_ranks(trainers, stage.trainer, lambda ranks: PolicySetup(ranks, str(model_path), config, zero, steps))
        sync = _weight_sync(config, folder, engines, trainers, prompts)
        report = _synced(run, sync.push(engines.next_version()))
        run.phase("readiness")
        _readiness(run, config, engines, prompts, folder)
        for iteration, indices in enumerate(order.batches(), start=1):
            clock = Clock()
            run.phase("rollout", iteration, config.iterations)
            with clock("rollout"):
                drawn = [prompts[index] for index in indices]
                groups = engines.sample(drawn, config.group_size, sampling(config), config.seed + iteration)
            run.phase("reward", iteration, config.iterations)
            with clock("score"):
                groups = engines.score(groups, config.reward.max_error_share)
            run.phase("train_step", iteration, config.iterations)
            with clock("train"):
                advantages = advantages_of(groups)
                figures = _update(trainers, config, groups, advantages, first_step=(iteration - 1) * updates + 1)
            run.phase("weight_sync", iteration, config.iterations)
            with clock("sync"):
                report = _synced(run, sync.push(engines.next_version()))
            figures |= rollout_figures(groups, advantages) | _sync_figures(report)
            run.metrics(iteration, figures | clock.figures())
        run.phase("saving", config.iterations, config.iterations)
        samples = config.iterations * config.prompts_per_iteration * config.group_size
        info = CheckpointInfo(stage.name, config.iterations, spec_sha256(run), samples, weight_version=report.version)
        publish(run, trainers, folder, info, model_card(run.spec, stage, CardFacts(info, figures)))


class Clock:
    """Seconds per phase of one iteration."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[phase] = time.monotonic() - started

    def figures(self) -> dict[str, float]:
        """`seconds_<phase>` for each phase."""
        return {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}


def sampling(config: GRPOConfig) -> SamplingConfig:
    """How rollouts are drawn: the whole distribution, since the loss is over it."""
    return SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)


def _prompts(run: Run, config: GRPOConfig, model_path: Path) -> list[Prompt]:
    rows = read_prompt_rows(config.data)
    if rows.skipped:
        run.event("rows_skipped", f"{len(rows.skipped)} rows cannot be used", rows=[asdict(bad) for bad in rows.skipped])
    encoded = encode_prompts(rows.rows, load_tokenizer(model_path), config.max_prompt_tokens)
    if encoded.dropped:
        run.event("rows_dropped", f"{len(encoded.dropped)} prompts are too long", lines=list(encoded.dropped))
    return list(encoded.prompts)


def _weight_sync(
    config: GRPOConfig, folder: Path, engines: Engines, trainers: ActorGroup, prompts: Sequence[Prompt]
) -> WeightSync:
    """Tie trainers and engines together."""

    def export(target: Path) -> None:
        trainers.call("export_weights", target, timeout_s=STEP_TIMEOUT_S)

    def log_probs(pairs: list[Pair]) -> list[npt.NDArray[np.float32]]:
        count = len(trainers)
        parts = trainers.scatter("log_probs", [(pairs[rank::count],) for rank in range(count)], timeout_s=STEP_TIMEOUT_S)
        return [parts[i % count][i // count] for i in range(len(pairs))]

    probe = Probe(prompts[: config.probe_prompts], sampling(config), config.seed)
    return WeightSync(engines.ready(), export, log_probs, folder / "weights", probe, config.max_logprob_gap)


def _synced(run: Run, report: SyncReport) -> SyncReport:
    if report.refitted:
        engines = [f"rollout-{engine}" for engine in report.refitted]
        run.event("refitted", f"weights {report.version} had to be loaded twice into {', '.join(engines)}", engines=engines)
    return report


def _sync_figures(report: SyncReport) -> dict[str, float]:
    return {"probe_gap_mean": report.mean_gap, "probe_gap_max": report.max_gap, "weight_version": report.version}


def _readiness(run: Run, config: GRPOConfig, engines: Engines, prompts: Sequence[Prompt], folder: Path) -> None:
    """What the checkpoint leaves for RL to explore, on the first prompts, before any update."""
    if not config.readiness_prompts:
        return
    groups = engines.sample(prompts[: config.readiness_prompts], config.group_size, sampling(config), config.seed)
    figures: dict[str, Any] = readiness(engines.score(groups, config.reward.max_error_share))
    write_json(folder / "readiness.json", figures)
    run.event("readiness", f"readiness over {len(groups)} prompts: {figures}", **figures)


def advantages_of(groups: Sequence[RolloutGroup]) -> GroupAdvantages:
    """Group-normalised advantages; samples without a score take no part."""
    rewards_PG = [[score.reward for score in group.scores] for group in groups]
    valid_PG = [[score.status == "scored" for score in group.scores] for group in groups]
    return group_advantages(rewards_PG, valid_PG)


def policy_rows(groups: Sequence[RolloutGroup], advantages: GroupAdvantages, chosen: range) -> list[PolicyRow]:
    """Scored responses of the chosen groups."""
    return [
        PolicyRow(
            np.asarray(groups[p].prompt.prompt_ids, dtype=np.int32),
            np.asarray(sample.response_ids, dtype=np.int32),
            np.asarray(sample.log_probs, dtype=np.float32),
            float(advantages.advantages_PG[p, g]),
        )
        for p in chosen
        for g, sample in enumerate(groups[p].samples)
        if not advantages.excluded_PG[p, g]
    ]


def _update(
    trainers: ActorGroup, config: GRPOConfig, groups: Sequence[RolloutGroup], advantages: GroupAdvantages, first_step: int
) -> dict[str, float]:
    """One optimizer step per mini-batch; figures are means over all tokens, the gap only over the first mini-batch's.

    From the second mini-batch on, the policy is no longer the one that sampled, so the gap would not be the engines'.
    """
    merged: list[dict[str, float]] = []
    for start in range(0, len(groups), config.mini_batch_prompts):
        rows = policy_rows(groups, advantages, range(start, start + config.mini_batch_prompts))
        denominator = sum(len(row.response_ids_R) for row in rows)
        if not denominator:
            continue
        shards = [(rows[rank :: len(trainers)], denominator, first_step + len(merged)) for rank in range(len(trainers))]
        merged.append(merge_sums(trainers.scatter("update", shards, timeout_s=STEP_TIMEOUT_S)))
    tokens = sum(sums["tokens"] for sums in merged)
    return {
        "policy_loss": sum(sums["loss"] for sums in merged) / tokens,
        "entropy": sum(sums["entropy"] for sums in merged) / tokens,
        "clip_fraction": sum(sums["clipped"] for sums in merged) / tokens,
        "logprob_gap": merged[0]["logprob_gap"] / merged[0]["tokens"],
        "grad_norm": merged[-1]["grad_norm"],
        "learning_rate": merged[-1]["learning_rate"],
    }


def rollout_figures(groups: Sequence[RolloutGroup], advantages: GroupAdvantages) -> dict[str, float]:
    """Reward and shape of the sampled responses; unscored samples count as errors and in nothing else but lengths."""
    samples = [sample for group in groups for sample in group.samples]
    scores = [score for group in groups for score in group.scores]
    scored = [score.reward for score in scores if score.status == "scored"]
    return {
        "reward": float(np.mean(scored)),
        "groups_with_variance": advantages.varied_share,
        "response_tokens": float(np.mean([len(sample.response_ids) for sample in samples])),
        "truncated": float(np.mean([sample.truncated for sample in samples])),
        "score_errors": float(len(scores) - len(scored)),
    }
