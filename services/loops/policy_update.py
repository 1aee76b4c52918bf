"""From scored groups to an updated policy: which samples count, their advantages, an optimizer step per mini-batch, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from sedsft.config import GRPOConfig
from sedsft.grpo import GroupAdvantages, group_advantages, loss_denominator, mini_batches
from sedsft.records import PolicyRow, RolloutGroup
from services.actor_group import ActorGroup
from services.loops.ranks import STEP_TIMEOUT_S, merge_sums
from services.scoring.fleet import score_figures


def advantages_of(groups: Sequence[RolloutGroup], config: GRPOConfig) -> GroupAdvantages:
    """Advantages by the configured estimator. Samples without a score take no part, nor, with `mask_truncated`, those that were
    cut: their reward speaks of the limit and not of the answer, and as part of a group's mean it would favour short answers."""
    rewards_PG = [[score.reward for score in group.scores] for group in groups]
    valid_PG = [
        [
            score.status == "scored" and not (config.mask_truncated and sample.truncated)
            for sample, score in zip(group.samples, group.scores, strict=True)
        ]
        for group in groups
    ]
    return group_advantages(rewards_PG, valid_PG, config.advantage)


def varies(group: RolloutGroup, config: GRPOConfig) -> bool:
    """Whether a group teaches anything relative to itself."""
    return bool(advantages_of([group], config).varied_P[0])


def kept_groups(groups: Sequence[RolloutGroup], config: GRPOConfig) -> list[RolloutGroup]:
    """The groups that are trained on: with dynamic sampling those that vary, else all."""
    return list(groups) if config.max_refills is None else [group for group in groups if varies(group, config)]


def policy_rows(groups: Sequence[RolloutGroup], advantages: GroupAdvantages, chosen: range) -> list[PolicyRow]:
    """Valid responses of the chosen groups."""
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


def trainer_log_probs(
    trainers: ActorGroup,
    pairs: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
    reference: bool = False,
    timeout_s: float = STEP_TIMEOUT_S,
) -> list[npt.NDArray[np.float32]]:
    """`PolicyWorker.log_probs` of (prompt ids, response ids) pairs that are spread over all ranks."""
    count = len(trainers)
    shards = [(list(pairs[rank::count]), reference) for rank in range(count)]
    parts = trainers.scatter("log_probs", shards, timeout_s=timeout_s)
    return [parts[i % count][i // count] for i in range(len(pairs))]


def update_policy(
    trainers: ActorGroup, config: GRPOConfig, groups: Sequence[RolloutGroup], first_step: int
) -> dict[str, float]:
    """One optimizer step per mini-batch of `groups`; figures are means over all tokens, and none where no sample counts.

    Without truncated importance sampling, the gap is that of the first mini-batch: from the second on, the policy is no longer
    the one that sampled, so it would not be the engines'.
    """
    if not groups:
        return {}
    advantages = advantages_of(groups, config)
    batches = [policy_rows(groups, advantages, chosen) for chosen in mini_batches(len(groups), config.mini_batch_prompts)]
    batches = _with_log_probs(trainers, config, [rows for rows in batches if rows])
    merged: list[dict[str, float]] = []
    denominators: list[int] = []
    for step, rows in enumerate(batches, start=first_step):
        denominators.append(loss_denominator(config.advantage, [len(row.response_ids_R) for row in rows], config.max_tokens))
        shards = [(rows[rank :: len(trainers)], denominators[-1], step) for rank in range(len(trainers))]
        merged.append(merge_sums(trainers.scatter("update", shards, timeout_s=STEP_TIMEOUT_S)))
    if not merged:
        return {}

    def mean(name: str, among: Sequence[dict[str, float]]) -> float:
        return sum(sums[name] for sums in among) / sum(sums["tokens"] for sums in among)

    figures = {
        "policy_loss": sum(sums["loss"] for sums in merged) / sum(denominators),
        "entropy": mean("entropy", merged),
        "clip_fraction": mean("clipped", merged),
        "logprob_gap": mean("logprob_gap", merged if config.tis_cap is not None else merged[:1]),
        "grad_norm": merged[-1]["grad_norm"],
        "learning_rate": merged[-1]["learning_rate"],
    }
    return figures | {name: mean(name, merged) for name in ("tis_weight", "tis_truncated", "kl") if name in merged[0]}


def _with_log_probs(trainers: ActorGroup, config: GRPOConfig, batches: Sequence[list[PolicyRow]]) -> list[list[PolicyRow]]:
    """The rows of each mini-batch with the log-probabilities that their loss needs beside the sampler's.

    The first mini-batch is trained with the very weights that p_old is of, so its own forward pass yields them.
    """
    filled = list(batches[:1]) if config.tis_cap is not None else list(batches)
    for rows in batches[len(filled) :]:
        old = trainer_log_probs(trainers, [(row.prompt_ids_T, row.response_ids_R) for row in rows])
        filled.append([replace(row, old_log_probs_R=values_R) for row, values_R in zip(rows, old, strict=True)])
    if not config.kl_weight:
        return filled
    rows = [row for batch in filled for row in batch]
    found = iter(trainer_log_probs(trainers, [(row.prompt_ids_T, row.response_ids_R) for row in rows], reference=True))
    return [[replace(row, reference_log_probs_R=next(found)) for row in batch] for batch in filled]


def rollout_figures(groups: Sequence[RolloutGroup], advantages: GroupAdvantages, config: GRPOConfig) -> dict[str, float]:
    """Reward and shape of all sampled responses; unscored samples count as errors and in nothing else but lengths."""
    samples = [sample for group in groups for sample in group.samples]
    scores = [score for group in groups for score in group.scores]
    scored = [score.reward for score in scores if score.status == "scored"]
    figures = {
        "reward": float(np.mean(scored)),
        "groups_with_variance": advantages.varied_share,
        "response_tokens": float(np.mean([len(sample.response_ids) for sample in samples])),
        "truncated": float(np.mean([sample.truncated for sample in samples])),
        "score_errors": float(len(scores) - len(scored)),
        **score_figures(scores),
    }
    if config.mask_truncated:
        figures["masked_truncated"] = float(sum(sample.truncated for sample in samples))
    return figures
