"""What the loops compute between calls: rows, figures, sums, engine keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sedsft.config import RewardConfig
from sedsft.records import Score
from services.driver import reason_of
from services.errors import RewardFailure, TrainingDiverged
from services.jobspec import RolloutResources, ScorerResources
from services.loops.engines import EngineRequest, check_errors
from services.loops.ranks import merge_sums

RIGHT, LATE = Score(1.0, "scored", "3"), Score(float("nan"), "timeout")


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
