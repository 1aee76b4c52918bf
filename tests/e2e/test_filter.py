"""Prompts that the base model neither always nor never solves, and an RL stage on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from api.client import Client
from tests.e2e.specs import REWARD, ROLLOUT, SCORER, ended, rl_stage, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_filtered_prompts_are_what_is_trained_on(client: Client) -> None:
    chosen = {"data": {"path": "data/rl_prompts.jsonl", "max_rows": 40}, "reward": REWARD, "sampling": {"max_tokens": 18}}
    stage = {
        "type": "filter",
        "name": "hard",
        "model": {"path": "base"},
        "filter": chosen,
        "rollout": ROLLOUT,
        "scorer": SCORER,
    }
    settings = {"data": {"path": "stage:hard"}, "iterations": 1, "max_refills": 1, "mini_batch_prompts": 8}
    spec = {"type": "pipeline", "name": "filter", "stages": [stage, rl_stage({"path": "base"}, **settings)]}
    job_id = client.submit(spec)["id"]
    job = wait_for(client, job_id, ended, 420)
    assert (job["status"], job["status_reason"]) == ("succeeded", None)

    [counts] = client.tables(job_id)["hard"]["rows"]
    assert counts["rows"] == 40 == sum(value for name, value in counts.items() if name != "rows")
    assert 0 < counts["kept"] < 40
    published = client.checkpoints(job_id)
    kept = Path(published[0]["path"]).parents[2] / "hard" / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == counts["kept"]
    assert all(0 < row["extra_info"]["right"] < row["extra_info"]["scored"] == 8 for row in rows)
    # So few are left of so weak a model that there may be nothing to learn, which is said and no failure.
    kinds = [event["kind"] for event in client.events(job_id)]
    assert ("no_update" in kinds) != ("tis_weight" in client.metrics(job_id, "rl")[0]["values"])
    assert "report_failed" not in kinds
    assert b"all wrong" in client.report(job_id)
