from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from sedsft.config import AnswerReward, Benchmark, DataConfig, FormatReward, RewardConfig
from sedsft.data import DataFileError, DataRowsError
from sedsft.data.sources import read_prompt_rows
from sedsft.records import Row, ScoringItem
from sedsft.rewards.pool import PoolLimits
from services import reward_check
from services.jobspec import RLStage
from services.reward_check import check_benchmark, check_prompts, faulty_golds, read_matchable_prompts, remote_problems

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def rows(*golds: str, source: str = "") -> list[Row]:
    return [
        Row(({"role": "user", "content": "?"},), gold, line, data_source=source) for line, gold in enumerate(golds, start=1)
    ]


def test_faults_are_listed_by_line() -> None:
    golds = rows("5", "{}", r"\begin{pmatrix}2\-1\end{pmatrix}", "{Tuesday}", "</think>5")
    found = faulty_golds(golds, RewardConfig())
    assert [(bad.line, bad.kind) for bad in found] == [(2, "empty_gold"), (3, "unparsable_gold"), (5, "no_self_match")]
    assert faulty_golds(rows("5", "x+1"), RewardConfig(name="math_qwen")) == []
    assert faulty_golds([], RewardConfig()) == []


def test_a_job_is_refused_with_all_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    golds = ("5", "", r"\\frac{1}{2", "7", "{}")
    path.write_text("".join(f'{{"question": "?", "answer": "{gold}"}}\n' for gold in golds), encoding="utf-8")
    data = DataConfig(path=str(path))
    with pytest.raises(DataRowsError, match=r"got 3 bad rows.*skip(.|\n)*line 2(.|\n)*line 3(.|\n)*line 5"):
        check_prompts(data, RewardConfig())
    check_prompts(data.model_copy(update={"on_bad_row": "skip"}), RewardConfig())
    check_prompts(data.model_copy(update={"max_rows": 1}), RewardConfig())
    check_prompts(data, RewardConfig(components=(FormatReward(),)))
    path.write_text('{"problem": "?", "answer": "5"}\n{"problem": "?", "answer": "{}"}\n', encoding="utf-8")
    with pytest.raises(DataRowsError, match="line 2: expected a gold answer"):
        check_benchmark(Benchmark(name="b", path=str(path)), RewardConfig())


def test_each_row_is_read_by_its_scorer() -> None:
    reward = RewardConfig(components=(AnswerReward(by_data_source=True),))
    mixed = [*rows("1 2 3>6", "7", source="countdown"), *rows("7", source="math_dapo"), *rows("1 2 3>6", source="unknown")]
    assert [(bad.line, bad.kind) for bad in faulty_golds(mixed, reward)] == [(2, "not_a_problem")]
    assert faulty_golds(rows("{}"), RewardConfig(components=(FormatReward(),))) == []


@pytest.mark.parametrize("limits", [PoolLimits(1, 0.3, 512), PoolLimits(1, 30.0, 512)])
def test_a_check_that_hangs_refuses_and_returns(monkeypatch: pytest.MonkeyPatch, limits: PoolLimits) -> None:
    monkeypatch.setattr(reward_check, "GOLD_COMMAND", (sys.executable, "-m", "tests.sedsft.rewards.fault_child"))
    monkeypatch.setattr(reward_check, "_LIMITS", limits)
    monkeypatch.setattr(reward_check, "TOTAL_TIMEOUT_S", 1.0)
    monkeypatch.setattr(reward_check, "ScoringItem", lambda gold, response, data_source: ScoringItem("x", gold))
    started = time.monotonic()
    [bad, *_] = faulty_golds(rows("sleep", "sleep"), RewardConfig())
    assert time.monotonic() - started < 5
    assert "timeout" in bad.reason


def test_a_check_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_check, "GOLD_COMMAND", (sys.executable, "-c", "raise SystemExit(1)"))
    with pytest.raises(DataFileError, match="expected to check the golds"):
        faulty_golds(rows("5"), RewardConfig())


def test_rows_that_cannot_be_matched_are_skipped_where_bad_rows_are(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"question": "?", "answer": "{gold}"}}\n' for gold in ("5", "{}", "7", "")), encoding="utf-8")
    data = DataConfig(path=str(path), on_bad_row="skip")
    prompts = read_matchable_prompts(data, RewardConfig())
    assert [row.answer for row in prompts.rows] == ["5", "7"]
    assert [(row.line, row.kind) for row in prompts.skipped] == [(2, "empty_gold"), (4, "empty_gold")]
    assert len(read_matchable_prompts(data.model_copy(update={"on_bad_row": "error"}), RewardConfig()).rows) == 3
    path.write_text('{"question": "?", "answer": "{}"}\n', encoding="utf-8")
    with pytest.raises(DataRowsError, match="got 1 bad row"):
        read_matchable_prompts(data, RewardConfig())


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_the_published_golds() -> None:
    published = read_prompt_rows(DataConfig(path=str(SHARED / "train" / "sed_rl_math_2069.parquet")))
    assert [bad.line for bad in published.skipped] == [1603]
    assert {row.data_source for row in published.rows} == {"math_dapo"}
    assert [bad.line for bad in faulty_golds(published.rows, RewardConfig())] == [1993, 2051]


def test_remote_rewards_need_the_operator() -> None:
    def problems(url: str, *hosts: str) -> list[tuple[str, str]]:
        reward = {"components": [{"type": "format"}, {"type": "remote", "url": url}]}
        grpo = {"data": {"path": "x"}, "iterations": 1, "reward": reward}
        return list(remote_problems(RLStage.model_validate({"type": "rl", "model": {"path": "m"}, "grpo": grpo}), hosts))

    [(pointer, said)] = problems("http://169.254.169.254/latest", "judge:8000")
    assert pointer == "/grpo/reward/components/1/url"
    assert "allows (judge:8000), got '169.254.169.254'; choose another, or start the service with SEDSFT_REWARD_HOSTS" in said
    assert problems("http://judge:8000/score", "judge:8000") == []
    assert problems("http://judge/score", "judge:8000") != []
