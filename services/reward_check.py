"""What a reward needs before a job may sample for it: golds that can be matched, and addresses that the operator allows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from sedsft.config import Benchmark, CodeReward, DataConfig, RemoteReward, RewardConfig
from sedsft.data import BadRow, BadRowKind, DataFileError, DataRowsError
from sedsft.data.sources import PromptRows, read_benchmark, read_prompt_rows
from sedsft.records import Row, ScoringItem
from sedsft.rewards.golds import COUNTDOWN, GOLD_COMMAND
from sedsft.rewards.pool import PoolLimits, ScorerStartError, ScoringPool
from sedsft.rewards.registry import scorer_of
from services.jobspec import FilterStage, GateStage, RLStage, SFTStage, Stage

TOTAL_TIMEOUT_S = 60.0
CODE_TIMEOUT_S = 30.0
_PACKAGE_ROOT = Path(__file__).parents[1]
_LIMITS = PoolLimits(processes=1, timeout_s=3.0, memory_mb=1024)


def reward_of(stage: Stage) -> tuple[str, RewardConfig]:
    """The reward of a stage, and the name of the settings that hold it; one without components for a stage that has none."""
    if isinstance(stage, SFTStage):
        return "sft", RewardConfig()
    if isinstance(stage, RLStage):
        return "grpo", stage.grpo.reward
    if isinstance(stage, FilterStage):
        return "filter", stage.filter.reward
    if isinstance(stage, GateStage):
        return "gate", stage.gate.reward
    return "eval", stage.eval.reward


def code_problem(config: CodeReward) -> str | None:
    """What is wrong with the user's code: it does not load, it changed, or there is no sandbox for it here; else None."""
    command = [sys.executable, "-m", "sedsft.rewards.code", config.model_dump_json()]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=CODE_TIMEOUT_S, cwd=_PACKAGE_ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        return f"expected {config.path} to load within {CODE_TIMEOUT_S:.0f} s, it did not; leave long work to the function"
    return done.stderr.strip() or f"exit code {done.returncode}" if done.returncode else None


def remote_problems(stage: Stage, hosts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """JSON pointer into `stage` and message for every service that its reward names but is none of `hosts`.

    A host is `name` or, with a port in the URL, `name:port`.
    """
    field, reward = reward_of(stage)
    for index, component in enumerate(reward.components):
        if isinstance(component, RemoteReward) and (host := urlsplit(component.url).netloc) not in hosts:
            yield (
                f"/{field}/reward/components/{index}/url",
                f"expected a remote reward on one of the hosts that the operator allows ({', '.join(hosts) or 'none'}), got "
                f"{host!r}; choose another, or start the service with SEDSFT_REWARD_HOSTS={host}",
            )


def check_prompts(data: DataConfig, reward: RewardConfig | None) -> None:
    """Read rows for RL and, unless bad ones are to be skipped, refuse golds that are empty or that `reward` cannot match.

    Raises:
        DataRowsError: lists the rows with golds that are empty, unparsable or do not match themselves.
        DataFileError: as `read_prompt_rows` does; also when the golds could not be checked in time.
    """
    prompts = read_prompt_rows(data)
    if reward is not None and reward.answer is not None and data.on_bad_row == "error":
        empty = [row for row in prompts.skipped if row.kind == "empty_gold"]
        _refuse([*empty, *faulty_golds(prompts.rows, reward)], "mend or remove these rows, or set on_bad_row='skip'")


def read_matchable_prompts(data: DataConfig, reward: RewardConfig) -> PromptRows:
    """Rows for RL; where bad ones are to be skipped, those with golds that `reward` cannot match are among the skipped.

    Raises:
        DataFileError: as `read_prompt_rows` does; also when no row is left, or the golds could not be checked in time.
    """
    prompts = read_prompt_rows(data)
    if data.on_bad_row == "error" or not (bad := faulty_golds(prompts.rows, reward)):
        return prompts
    places = {(row.file, row.line) for row in bad}
    rows = tuple(row for row in prompts.rows if (row.file, row.line) not in places)
    if not rows:
        _refuse(bad, "mend these rows")
    return PromptRows(rows, tuple(sorted([*prompts.skipped, *bad], key=lambda row: (row.file, row.line))))


def check_benchmark(benchmark: Benchmark, reward: RewardConfig | None) -> None:
    """Read a benchmark and refuse golds that `reward` cannot match.

    Raises:
        DataRowsError: lists the rows with golds that are empty, unparsable or do not match themselves.
        DataFileError: as `read_benchmark` does; also when the golds could not be checked in time.
    """
    rows = read_benchmark(benchmark.path, benchmark.max_rows)
    if reward is not None:
        _refuse(faulty_golds(rows, reward), "mend or remove these rows")


def _refuse(bad: Sequence[BadRow], remedy: str) -> None:
    if bad:
        in_order = sorted(bad, key=lambda row: (row.file, row.line))
        raise DataRowsError("gold answers that right answers can match", in_order, f"{remedy}, or choose another reward")


def faulty_golds(rows: Sequence[Row], reward: RewardConfig) -> list[BadRow]:
    """The rows with golds that no right answer can match under `reward`; none where no component reads answers.

    Such rows would be wrong, or an error, in every sample. The golds are read in a process that can be killed, within a time
    for all.

    Raises:
        DataFileError: the golds could not be checked in time.
    """
    answer = reward.answer
    if answer is None or not rows:
        return []
    kinds = [COUNTDOWN if scorer_of(answer, row.data_source)[0] == "countdown" else "" for row in rows]
    items = [ScoringItem(row.answer or "", "", data_source=kind) for row, kind in zip(rows, kinds, strict=True)]
    try:
        with ScoringPool(GOLD_COMMAND, _LIMITS) as pool:
            scores = pool.score(items, TOTAL_TIMEOUT_S)
    except ScorerStartError as error:
        raise DataFileError(f"expected to check the golds, got: {error}") from error
    bad = []
    for row, kind, score in zip(rows, kinds, scores, strict=True):
        if score.status != "scored":
            reason = f"expected a gold that can be checked, got {score.status}: {score.detail}"
            bad.append(BadRow(row.line, reason, row.file, kind="unparsable_gold"))
        elif score.reward != 1.0:
            name, _, reason = (score.extracted or "").partition(": ")
            fault = "not_a_problem" if kind == COUNTDOWN else cast(BadRowKind, name)
            bad.append(BadRow(row.line, reason, row.file, kind=fault))
    return bad
