"""An RL stage with every addition to the plain loss at once, on real ranks: its figures, its rows, and its replay."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.rollout_record import read_rollouts, recorded_files
from services.rundir import read_lines
from tests.services.loops.test_grpo_kill import finish, make_rl_spec, new_job, replayed
from tests.services.tiny_llama import random_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {
    "iterations": 3,
    "advantage": "reinforce_pp_baseline",
    "max_refills": 1,
    "kl_weight": 0.05,
    "pack_tokens": 21,
    "optimizer": {"learning_rate": 3e-4, "schedule": "constant"},
    "checkpoints": {},
}


def test_dynamic_sampling_with_divergence_and_packing_replays(tmp_path: Path) -> None:
    job = new_job(tmp_path / "job", make_rl_spec(tmp_path, **SETTINGS))
    # Without dropout, whose noise would drown what is looked at.
    random_llama(0).save_pretrained(tmp_path / "model")
    finish(job, 1)
    run = job / "attempt-1"
    figures = [line["values"] for line, _ in read_lines(run / "metrics.jsonl")]
    assert len(figures) == 3
    # The first iteration begins at the reference.
    assert figures[0]["kl"] < figures[2]["kl"], figures
    for values in figures:
        assert values["tis_weight"] == pytest.approx(1, abs=0.05), figures
        assert 0 < values["logprob_gap"] < 0.05, figures
        assert values["tis_truncated"] == 0
    missing = {
        event["data"]["iteration"]: event["data"]
        for event, _ in read_lines(run / "events.jsonl")
        if event["kind"] == "groups_missing"
    }
    for iteration, path in recorded_files(run, "rl").items():
        groups = read_rollouts(path).groups
        varied = [len({score.reward for score in group.scores}) > 1 for group in groups]
        # Four at first, and as many more as teach nothing, of prompts that the iteration does not have.
        assert 4 <= len(groups) <= 4 + varied[:4].count(False)
        assert not {group.prompt.line for group in groups[:4]} & {group.prompt.line for group in groups[4:]}
        assert (iteration in missing) == (sum(varied) < 4)
        if iteration in missing:
            assert (missing[iteration]["kept"], missing[iteration]["drawn"]) == (sum(varied), len(groups))
    outcome = replayed(run)
    assert outcome.returncode == 0, outcome.stderr
    assert "equal after 3 iterations" in outcome.stdout
