"""Pages of recorded rollouts, read from a job's Parquet files without loading more than a page needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from api.jobs.schemas import Page, RolloutGroup, RolloutSample
from services.rollout_record import read_table, recorded_files, recorded_stages

CURSOR = r"^[a-z0-9-]{1,63}:\d{1,9}:\d{1,9}$"
"""Stage, iteration and group of the last entry of a page."""
MAX_GROUPS = 200

_COLUMNS = ("group", "line", "prompt", "answer", "response", "response_ids", "truncated", "weight_version", "seed")
_SCORES = ("status", "reward", "extracted", "detail")


@dataclass(frozen=True)
class RolloutQuery:
    """Which groups are asked for; None: all. `after` is a cursor, `tokens` asks for ids and log-probabilities."""

    stage: str | None
    iteration: int | None
    prompt: str | None
    tokens: bool
    after: str | None
    limit: int


def rollout_page(run_folder: Path, query: RolloutQuery) -> Page[RolloutGroup]:
    """Groups by stage, iteration and place.

    Raises:
        RecordingInvalid: a damaged file on the way.
    """
    found = list(itertools.islice(_groups(run_folder, query), query.limit + 1))
    groups, more = found[: query.limit], len(found) > query.limit
    cursor = f"{groups[-1].stage}:{groups[-1].iteration}:{groups[-1].group}" if more else None
    return Page(data=groups, has_more=more, next_cursor=cursor)


def _groups(run_folder: Path, query: RolloutQuery) -> Iterator[RolloutGroup]:
    start = ("", 0, -1)
    if query.after is not None:
        name, *numbers = query.after.split(":")
        start = (name, int(numbers[0]), int(numbers[1]))
    for stage in recorded_stages(run_folder):
        if query.stage not in (None, stage):
            continue
        for iteration, path in recorded_files(run_folder, stage).items():
            if query.iteration in (None, iteration) and (stage, iteration) >= start[:2]:
                first = start[2] + 1 if (stage, iteration) == start[:2] else 0
                yield from _groups_of(path, stage, iteration, first, query)


def _groups_of(path: Path, stage: str, iteration: int, first: int, query: RolloutQuery) -> Iterator[RolloutGroup]:
    """Groups of one file from place `first` on."""
    if query.prompt is not None and not pc.any(_matches(read_table(path, ["prompt"]), query.prompt)).as_py():
        return
    table = read_table(path, [*_COLUMNS, *_SCORES, *(["log_probs"] if query.tokens else [])])
    chosen = pc.greater_equal(table["group"], first)
    if query.prompt is not None:
        chosen = pc.and_(chosen, _matches(table, query.prompt))
    table = table.filter(chosen)
    # Rows become Python objects batch by batch, since most pages end early in a file.
    rows = (row for batch in table.to_batches(max_chunksize=256) for row in batch.to_pylist())
    for group, samples in itertools.groupby(rows, key=lambda row: row["group"]):
        members = list(samples)
        yield RolloutGroup(
            stage=stage,
            iteration=iteration,
            group=group,
            line=members[0]["line"],
            prompt=members[0]["prompt"],
            answer=members[0]["answer"],
            samples=[_sample(row, tokens=query.tokens) for row in members],
        )


def _matches(table: Any, text: str) -> Any:
    return pc.match_substring(table["prompt"], text)


def _sample(row: dict[str, Any], *, tokens: bool) -> RolloutSample:
    scored = row["status"] == "scored"
    log_probs = [value if math.isfinite(value) else None for value in row["log_probs"]] if tokens else None
    return RolloutSample(
        response=row["response"],
        num_tokens=len(row["response_ids"]),
        truncated=row["truncated"],
        status=row["status"],
        reward=row["reward"] if scored else None,
        extracted=row["extracted"],
        detail=row["detail"],
        weight_version=row["weight_version"],
        seed=row["seed"],
        response_ids=row["response_ids"] if tokens else None,
        log_probs=log_probs,
    )
