"""Figures of a set of rollout groups, as rows of tables (plain JSON values; None where a figure has no samples to rest on).

Scoring errors never count as wrong: a sample whose status is not "scored" leaves accuracy, pass@k and answer counts and
appears in the count of its status. Text, length and entropy figures do not depend on the score and use every sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import get_args

from sedsft.evaluation.diversity import distinct_answers, self_bleu, self_bleu_signature
from sedsft.evaluation.passk import avg_at_n, pass_at_k
from sedsft.records import RolloutGroup, Sample, Score, ScoreStatus

Figure = float | int | str | None


def summarise(groups: Sequence[RolloutGroup], pass_k: Sequence[int]) -> dict[str, Figure]:
    """One row of an evaluation table.

    `avg` is Avg@n: the mean over prompts of the share of right samples. `pass@k` is the mean of the unbiased
    estimate over prompts with at least k scored samples; `pass@k_left_out` counts the other prompts and is there only when
    some are. `distinct_answers` and `distinct_correct` are means over prompts of the number of different answers read from
    scored samples, and from right ones. `self_bleu` (0..100) is the mean over prompts. `token_entropy` see there.
    `truncated` and `no_answer` are shares of all and of scored samples; `response_tokens` is the mean length.

    Raises:
        ValueError: a group whose scores do not match its samples, or a log-probability that is not finite.
    """
    _check(groups)
    scored = [_scored(group) for group in groups]
    rights = [(len(scores), sum(score.right for score in scores)) for scores in scored]
    samples = [sample for group in groups for sample in group.samples]
    all_scored = [score for scores in scored for score in scores]
    row: dict[str, Figure] = {
        "prompts": len(groups),
        "samples": len(samples),
        "avg": _mean(avg_at_n(n, c) for n, c in rights if n),
    }
    for k in pass_k:
        row[f"pass@{k}"] = _mean(pass_at_k(n, c, k) for n, c in rights if n >= k)
        if left_out := sum(n < k for n, _ in rights):
            row[f"pass@{k}_left_out"] = left_out
    row |= {
        "self_bleu": _mean_self_bleu(groups),
        "self_bleu_signature": self_bleu_signature(max((len(group.samples) for group in groups), default=0)),
        "distinct_answers": _mean(distinct_answers(s.extracted for s in scores) for scores in scored if scores),
        "distinct_correct": _mean(distinct_answers(s.extracted for s in scores if s.right) for scores in scored if scores),
        "token_entropy": token_entropy(samples),
        "response_tokens": _mean(len(sample.response_ids) for sample in samples),
        "truncated": _mean(sample.truncated for sample in samples),
        "no_answer": _mean(score.extracted is None for score in all_scored),
    }
    return row | status_counts(groups)


def readiness(groups: Sequence[RolloutGroup]) -> dict[str, Figure]:
    """What RL has to start from: how often the model is right at all, and whether its samples differ.

    `pass@1` and `pass@G` (any scored sample of the group right) say what can be learnt; `groups_with_variance`, the share of
    groups whose rewards are not all equal, is the share of prompts with a learning signal in GRPO's group-normalised
    advantage. Groups without a scored sample are left out of these. `self_bleu` and `token_entropy` are as in `summarise`.

    Raises:
        ValueError: as `summarise`.
    """
    _check(groups)
    scored = [scores for group in groups if (scores := _scored(group))]
    figures: dict[str, Figure] = {
        "prompts": len(groups),
        "group_size": max((len(group.samples) for group in groups), default=0),
        "pass@1": _mean(avg_at_n(len(scores), sum(s.right for s in scores)) for scores in scored),
        "pass@G": _mean(any(s.right for s in scores) for scores in scored),
        "groups_with_variance": _mean(len({s.reward for s in scores}) > 1 for scores in scored),
        "distinct_answers": _mean(distinct_answers(s.extracted for s in scores) for scores in scored),
        "self_bleu": _mean_self_bleu(groups),
        "token_entropy": token_entropy([sample for group in groups for sample in group.samples]),
    }
    return figures | status_counts(groups)


def token_entropy(samples: Sequence[Sample]) -> float | None:
    """Mean entropy of the sampling distribution per token, in nats, estimated as the mean of -log p over sampled tokens.

        E_{y ~ p}[-log p(y)] = H(p)

    Unbiased for the distribution that was sampled from when the log-probabilities are that distribution's. It is the model's
    own entropy only at temperature 1 and top_p 1.
    """
    log_probs = [log_prob for sample in samples for log_prob in sample.log_probs]
    if not log_probs:
        return None
    total = math.fsum(log_probs)
    if not math.isfinite(total):
        raise ValueError(f"expected finite log-probabilities of sampled tokens, their sum is {total}; check the sampler")
    return -total / len(log_probs)


def status_counts(groups: Sequence[RolloutGroup]) -> dict[str, Figure]:
    """Number of samples by score status, zeros included."""
    statuses = [score.status for group in groups for score in group.scores]
    return {status: statuses.count(status) for status in get_args(ScoreStatus)}


def mean_row(rows: Sequence[Mapping[str, Figure]]) -> dict[str, Figure]:
    """Unweighted mean over benchmarks: averages of averages, sums of counts (prompts, samples, statuses, left out).

    A figure that some row lacks is None: a mean over fewer benchmarks would not compare with another model's.
    """
    counts = {"prompts", "samples", *get_args(ScoreStatus)}
    mean: dict[str, Figure] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        numbers = [value for value in values if isinstance(value, int | float)]
        if name in counts or name.endswith("_left_out"):
            mean[name] = sum(numbers)
        elif len(numbers) == len(values):
            mean[name] = fmean(numbers)
        elif all(isinstance(value, str) for value in values):
            mean[name] = values[0] if len(set(values)) == 1 else None
        else:
            mean[name] = None
    return mean


def _check(groups: Sequence[RolloutGroup]) -> None:
    for group in groups:
        if len(group.scores) != len(group.samples):
            raise ValueError(
                f"expected one score per sample, got {len(group.scores)} scores for {len(group.samples)} samples of the prompt "
                f"in line {group.prompt.line}; score the group first"
            )


def _mean_self_bleu(groups: Sequence[RolloutGroup]) -> float | None:
    bleus = [self_bleu([sample.text for sample in group.samples]) for group in groups]
    return _mean(bleu for bleu in bleus if bleu is not None)


def _scored(group: RolloutGroup) -> list[Score]:
    return [score for score in group.scores if score.status == "scored"]


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return fmean(numbers) if numbers else None
