"""What the loops compute between calls: rows, figures, sums, engine keys."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sedsft.config import RewardConfig
from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services.driver import reason_of
from services.errors import RewardFailure, TrainingDiverged
from services.jobspec import RolloutResources, ScorerResources
from services.loops.engines import EngineRequest, check_errors
from services.loops.grpo import advantages_of, policy_rows, rollout_figures
from services.loops.ranks import merge_sums

PROMPT = Prompt((1, 2), "12", "3", 1)


def sample(*ids: int, truncated: bool = False) -> Sample:
    return Sample(ids, (-0.5,) * len(ids), "", truncated, 7)


def group(*scored: tuple[Sample, Score]) -> RolloutGroup:
    return RolloutGroup(PROMPT, tuple(s for s, _ in scored), tuple(score for _, score in scored))


RIGHT, WRONG, LATE = Score(1.0, "scored", "3"), Score(0.0, "scored", "4"), Score(float("nan"), "timeout")
GROUPS = [
    group((sample(5), RIGHT), (sample(5, 6), WRONG), (sample(5, 6, 7), LATE)),
    group((sample(8), RIGHT), (sample(9), RIGHT), (sample(9, 9, truncated=True), RIGHT)),
]


def test_an_unscored_sample_never_reaches_the_update() -> None:
    advantages = advantages_of(GROUPS)
    rows = policy_rows(GROUPS, advantages, range(2))
    assert [row.response_ids_R.tolist() for row in rows] == [[5], [5, 6], [8], [9], [9, 9]]
    # (1 - 1/2) / (sqrt(1/2) + 1e-6), over the two scored samples; the second group does not vary.
    assert rows[0].advantage == pytest.approx(0.7071058, abs=1e-6)
    assert [row.advantage for row in rows[1:]] == pytest.approx([-0.7071058, 0, 0, 0], abs=1e-6)
    assert all(np.isfinite(row.advantage) for row in rows)


def test_rollout_figures_count_errors_apart_from_rewards() -> None:
    figures = rollout_figures(GROUPS, advantages_of(GROUPS))
    assert figures == {
        "reward": 4 / 5,
        "groups_with_variance": 0.5,
        "response_tokens": 10 / 6,
        "truncated": 1 / 6,
        "score_errors": 1.0,
    }


def test_sums_add_up_over_ranks_and_shared_figures_do_not() -> None:
    ranks = [{"loss": 1.5, "tokens": 3.0, "grad_norm": 2.0}, {"loss": 0.5, "tokens": 1.0, "grad_norm": 2.0}]
    assert merge_sums(ranks) == {"loss": 2.0, "tokens": 4.0, "grad_norm": 2.0}


@pytest.mark.parametrize(
    ("scores", "limit", "stops"),
    [([RIGHT] * 19 + [LATE], 0.05, False), ([RIGHT] * 18 + [LATE] * 2, 0.05, True), ([LATE] * 3, 1.0, True)],
)
def test_too_many_errors_stop_the_job(scores: list[Score], limit: float, stops: bool) -> None:
    if not stops:
        check_errors(scores, limit)
        return
    with pytest.raises(RewardFailure, match=r"'timeout': \d"):
        check_errors(scores, limit)


def test_engines_are_shared_only_by_models_that_decode_alike(tmp_path: Path) -> None:
    def request(name: str, tokenizer: str = "{}", **config: object) -> tuple[object, ...]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"hidden_size": 64} | config))
        (folder / "tokenizer.json").write_text(tokenizer)
        return EngineRequest(folder, "bf16", RolloutResources(), ScorerResources(), RewardConfig()).key()

    base = request("base", dtype="float32")
    assert request("trained", dtype="bfloat16") == base
    assert request("wider", hidden_size=128) != base
    assert request("other-words", tokenizer='{"a": 1}') != base


def test_every_failure_has_a_reason() -> None:
    assert reason_of(TrainingDiverged("expected a finite loss")).code == "diverged"
    reason = reason_of(ZeroDivisionError("division by zero"))
    assert (reason.code, reason.message.partition(";")[0]) == ("internal", "ZeroDivisionError: division by zero")
