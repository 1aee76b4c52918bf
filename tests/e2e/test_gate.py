"""A gate between two checkpoints and the base model, an RL stage from the winner with its ledger; a gate that nobody passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from api.client import Client
from tests.e2e.specs import REWARD, ROLLOUT, SCORER, ended, rl_stage, sft_stage, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def gate_stage(candidates: list[dict[str, str]], **changes: Any) -> dict[str, Any]:
    """A probe of 12 prompts, 4 samples each."""
    gate = {
        "data": {"path": "data/rl_prompts.jsonl"},
        "reward": REWARD,
        "prompts": 12,
        "group_size": 4,
        "sampling": {"max_tokens": 18},
    } | changes
    return {
        "type": "gate",
        "name": "choose",
        "candidates": candidates,
        "gate": gate,
        "rollout": ROLLOUT,
        "scorer": SCORER,
    }


def test_the_winner_goes_on_to_rl_which_keeps_a_ledger(client: Client) -> None:
    sft = [sft_stage(objective={"type": kind}, steps=2) | {"name": kind} for kind in ("ce", "sed")]
    gate = gate_stage([{"path": "base"}, {"stage": "ce"}, {"stage": "sed"}], min_entropy=0.01, rank_by="entropy")
    ledger = {"prompts": 4, "samples": 4, "pass_k": 4, "every_iterations": 2}
    rl = rl_stage({"stage": "choose"}, iterations=3, ledger=ledger)
    spec = {"type": "pipeline", "name": "gate", "stages": [*sft, gate, rl]}
    job_id = client.submit(spec)["id"]
    job = wait_for(client, job_id, ended, 480)
    assert (job["status"], job["status_reason"]) == ("succeeded", None)

    rows = client.tables(job_id)["choose"]["rows"]
    assert [row["candidate"].rpartition("/")[2] for row in rows] == ["base", "ce", "sed"]
    assert all(row["passed"] and row["prompts"] == 12 and row["group_size"] == 4 for row in rows)
    [winner] = [row for row in rows if row["promoted"]]
    assert winner["token_entropy"] == max(row["token_entropy"] for row in rows)
    events = list(client.events(job_id))
    [promoted] = [event["data"] for event in events if event["kind"] == "promoted"]
    assert promoted["candidate"] == winner["candidate"]

    stage = Path(client.checkpoints(job_id)[-1]["path"]).parents[1]
    entries = [json.loads(line) for line in (stage / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["iteration"] for entry in entries] == [0, 2, 3]
    assert [len(entry["weight_versions"]) for entry in entries] == [1, 1, 1]
    assert all(entry["samples"] == entry["scored"] == 16 for entry in entries)
    # Only what was drawn for training is recorded and trained on.
    assert len(list(client.rollouts(job_id))) == 3 * 8
    report = client.report(job_id)
    assert "report_failed" not in [event["kind"] for event in events]
    assert b"promoted</h3>" in report
    assert b"<figcaption>Probes of rl" in report


def test_a_gate_that_nobody_passes_stops_the_job_with_advice(client: Client) -> None:
    job_id = client.submit(gate_stage([{"path": "base"}], min_pass_at_g=1.0, max_self_bleu=0.0))["id"]
    job = wait_for(client, job_id, ended, 240)
    assert job["status"] == "failed"
    assert job["status_reason"]["code"] == "gate_failed"
    for words in ("expected pass@G of at least 1", "expected self_bleu of at most 0", "easier prompts", "fewer epochs"):
        assert words in job["status_reason"]["message"]
    assert b"no candidate is ready" in client.report(job_id)
