"""The difficulty filter: a model answers each prompt several times; prompts within the band become the data of later stages.

stages/<stage>/rows.jsonl     kept prompts in verl's columns, in the order of the data, complete before the counts are
stages/<stage>/filter.json    counts, and how many prompts had how many right answers
stages/<stage>/table.json     the same counts for the report
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sedsft.config import FilterConfig
from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.grpo import share_in_band
from sedsft.records import Prompt, RolloutGroup, Row
from services.actor_group import ActorSpec
from services.errors import DataError
from services.jobspec import REFERENCE_CPUS, FilterStage
from services.loops.engines import EngineRequest, Engines
from services.loops.evaluate import PROBE_PROMPTS, load_model
from services.placement import actor_groups
from services.reward_check import read_matchable_prompts
from services.run import FILTERED_ROWS, Run, write_json
from services.rundir import attempts_of
from services.training.reference_worker import ReferenceWorker

COUNTS = "filter.json"
_CHUNK_PROMPTS = 256
"""Prompts that are sampled and scored together: what is in memory, and how often progress is told."""


def run_filter(run: Run, stage: FilterStage, folder: Path, engines: Engines) -> None:
    """Sample `stage.filter.samples` responses per prompt and write the prompts within the band; see the module's files.

    What an earlier attempt of the job has completed is taken over, so that later stages go on with the same rows.

    Raises:
        JobError: bad rows or model, a dead worker, too many unscored samples, an engine that is not the model in the files,
            no prompt within the band.
    """
    if _taken_over(run, stage.name, folder):
        return
    config, model_path = stage.filter, run.model_path(stage.model)
    run.phase("data")
    rows, prompts, counts = _prompts(run, config, model_path)
    run.phase("loading")
    engines.start(EngineRequest(model_path, config.precision, stage.rollout, stage.scorer, config.reward))
    with actor_groups([ActorSpec("reference", ReferenceWorker, 1, REFERENCE_CPUS)], run.job_id) as [reference]:
        load_model(run, config, folder, engines, reference, model_path, prompts[:PROBE_PROMPTS])
    chunks = range(0, len(prompts), _CHUNK_PROMPTS)
    histogram: Counter[int] = Counter()
    with (folder / FILTERED_ROWS).open("w", encoding="utf-8") as file:
        for step, start in enumerate(chunks, start=1):
            run.phase("filter", step, len(chunks))
            drawn = prompts[start : start + _CHUNK_PROMPTS]
            groups = engines.sample(drawn, config.samples, config.sampling, config.seed + start)
            groups = engines.score(groups, config.reward.max_error_share)
            for group in groups:
                fate, figures = judged(group, config)
                counts[fate] += 1
                histogram[figures["right"]] += 1
                if fate == "kept":
                    file.write(json.dumps(artifact_row(rows[group.prompt.line], figures), ensure_ascii=False) + "\n")
            run.metrics(step, {name: float(value) for name, value in counts.items()})
        file.flush()
        os.fsync(file.fileno())
    if not counts["kept"]:
        raise DataError(
            f"expected prompts whose share of right answers lies in [{config.low}, {config.high}], got none: {dict(counts)}; "
            "widen the band, raise samples or max_tokens, or choose other data"
        )
    _write_counts(folder, counts, {str(right): histogram[right] for right in range(config.samples + 1)})
    run.event("filtered", f"{counts['kept']} of {len(prompts)} prompts kept", **counts)


def judged(group: RolloutGroup, config: FilterConfig) -> tuple[str, dict[str, int]]:
    """Fate of a prompt, one of kept, all_right, all_wrong, outside and unscored, and its right and scored samples."""
    valid = [score.status == "scored" for score in group.scores]
    right = [score.right and is_valid for score, is_valid in zip(group.scores, valid, strict=True)]
    share, inside = share_in_band(right, valid, config.low, config.high)
    figures = {"right": sum(right), "scored": sum(valid)}
    if inside or share is None:
        return "unscored" if share is None else "kept", figures
    return {1.0: "all_right", 0.0: "all_wrong"}.get(share, "outside"), figures


def artifact_row(row: Row, figures: Mapping[str, int]) -> dict[str, Any]:
    """A kept prompt in verl's columns, with how it was answered and where it stood."""
    return {
        "data_source": row.data_source,
        "prompt": list(row.messages),
        "reward_model": {"style": "rule", "ground_truth": row.answer},
        "extra_info": {"file": row.file, "line": row.line, **figures},
    }


def _prompts(run: Run, config: FilterConfig, model_path: Path) -> tuple[Sequence[Row], Sequence[Prompt], Counter[str]]:
    """Rows, prompts whose `line` is the index of their row, and counts of what cannot be used."""
    read = read_matchable_prompts(run.data(config.data), config.reward)
    numbered = [replace(row, line=index) for index, row in enumerate(read.rows)]
    encoded = encode_prompts(numbered, load_tokenizer(model_path), config.max_prompt_tokens)
    counts = Counter({"kept": 0, "all_right": 0, "all_wrong": 0, "outside": 0, "unscored": 0})
    counts.update({"too_long": len(encoded.dropped), "skipped": len(read.skipped)})
    return read.rows, encoded.prompts, counts


def _write_counts(folder: Path, counts: Mapping[str, int], histogram: Mapping[str, int]) -> None:
    row = {"rows": sum(counts.values()), **counts}
    write_json(folder / "table.json", {"columns": list(row), "rows": [row]})
    write_json(folder / COUNTS, {**row, "right_answers": histogram})


def _taken_over(run: Run, stage: str, folder: Path) -> bool:
    """Copy what the newest earlier attempt that completed the stage has left."""
    for attempt in reversed(attempts_of(run.folder)[:-1]):
        left = attempt / "stages" / stage
        if (left / COUNTS).exists():
            for name in (FILTERED_ROWS, "table.json", COUNTS):
                shutil.copyfile(left / name, folder / name)
            run.event("filter_taken_over", f"rows of {left} taken over", path=str(left))
            return True
    return False
