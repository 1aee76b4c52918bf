"""One POST trains SFT, then RL, evaluates, and the checkpoint answers over OpenAI's route: every part real."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from api.client import ApiProblem, Client
from services import checkpoints
from tests.e2e.specs import ended, eval_stage, rl_stage, sft_stage, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


def test_a_pipeline_from_post_to_answer(client: Client, workspace: Path) -> None:
    models = {"base": {"path": "base"}, "sft": {"stage": "sft"}, "rl": {"stage": "rl"}}
    spec = {"type": "pipeline", "name": "e2e", "stages": [sft_stage(), rl_stage({"stage": "sft"}), eval_stage(models)]}
    plan = client.dry_run(spec)["plan"]
    assert plan["peak"]["cpus"] == pytest.approx(1.4)

    job_id = client.submit(spec)["id"]
    job = wait_for(client, job_id, ended, 420)
    assert (job["status"], job["status_reason"]) == ("succeeded", None)
    assert list(job["stage_seconds"]) == ["sft", "rl", "eval"]

    sft = client.metrics(job_id, "sft")
    assert [point["step"] for point in sft] == [1, 2, 3]
    for values in (point["values"] for point in sft):
        assert values["loss"] == pytest.approx(values["ce"] + values["extra"], abs=1e-6)
        assert 0 < values["extra"] <= 0.25
        assert 0 < values["masked_share"] < 1
    # tau is the 30% quantile of the held-out tokens, so about the share r = 0.7 of training tokens is masked at first.
    assert sft[0]["values"]["masked_share"] == pytest.approx(0.7, abs=0.1)

    rl = client.metrics(job_id, "rl")
    assert [point["step"] for point in rl] == [1, 2]
    for values in (point["values"] for point in rl):
        assert values["probe_gap_mean"] < 0.05
        assert values["logprob_gap"] < 0.05
        assert values["score_errors"] == 0
        assert 0 <= values["reward"] <= 1
    assert rl[1]["values"]["weight_version"] == rl[0]["values"]["weight_version"] + 1

    rows = client.tables(job_id)["eval"]["rows"]
    assert [(row["model"], row["benchmark"]) for row in rows] == [
        (model, benchmark) for model in models for benchmark in ("easy", "mean")
    ]
    assert all(row["samples"] == row["scored"] == 48 for row in rows)
    assert all(row["avg"] <= row["pass@8"] for row in rows)

    published = client.checkpoints(job_id)
    assert [(checkpoint["stage"], checkpoint["step"]) for checkpoint in published] == [("sft", 3), ("rl", 2)]
    for checkpoint in published:
        folder = Path(checkpoint["path"])
        manifest = checkpoints.verify(folder)
        assert manifest.info.stage == checkpoint["stage"]
        AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder).chat_template
    assert checkpoints.verify(Path(published[0]["path"])).info.tau is not None

    assert b"<figcaption>Masked share" in client.report(job_id)
    events = list(client.events(job_id))
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    _rollouts_are_recorded(client, job_id, Path(published[1]["path"]))
    _deploys_and_answers(client, job_id, workspace)


def _rollouts_are_recorded(client: Client, job_id: str, checkpoint: Path) -> None:
    """Two iterations of 8 prompts x 8 samples, and training on them again gives the same bits."""
    groups = list(client.rollouts(job_id, tokens=True))
    assert [(group["iteration"], group["group"]) for group in groups] == [(i, g) for i in (1, 2) for g in range(8)]
    samples = [sample for group in groups for sample in group["samples"]]
    assert len(samples) == 128
    assert all(len(s["response_ids"]) == len(s["log_probs"]) == s["num_tokens"] and s["status"] == "scored" for s in samples)
    assert len({sample["seed"] for sample in samples}) == 128
    run_folder = checkpoint.parents[3]
    command = [sys.executable, "-m", "services.replay", str(run_folder)]
    replayed = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert "equal after 2 iterations" in replayed.stdout, replayed.stdout + replayed.stderr


def _deploys_and_answers(client: Client, job_id: str, workspace: Path) -> None:
    spec = {"name": "tiny", "checkpoint": {"job_id": job_id, "stage": "rl"}, "resources": {"cpus": 0.5}}
    deployment = client.deploy(spec)
    while deployment["status"] == "deploying":
        deployment = client.deployment(deployment["id"])
    assert deployment["status"] == "ready", deployment["status_reason"]
    problem = json.loads((workspace / "data" / "eval_3.jsonl").read_text(encoding="utf-8").splitlines()[0])["problem"]
    body = {"model": "tiny", "messages": [{"role": "user", "content": problem}], "max_tokens": 18, "n": 4}
    answer = httpx.post(f"{deployment['url']}/chat/completions", json=body, timeout=60, trust_env=False).json()
    # `<bos>` + three numbers + `>` + target + `:`.
    assert answer["usage"]["prompt_tokens"] == 7
    assert len(answer["choices"]) == 4
    assert all("=" in choice["message"]["content"] for choice in answer["choices"])
    client.undeploy(deployment["id"])


def test_a_probe_that_fails_stops_the_job_by_name(client: Client) -> None:
    job_id = client.submit(rl_stage({"path": "base"}, max_logprob_gap=1e-9))["id"]
    job = wait_for(client, job_id, ended, 180)
    assert job["status"] == "failed"
    assert job["status_reason"]["code"] == "weight_sync_mismatch"
    assert "expected sampler and trainer log-probabilities" in job["status_reason"]["message"]


def test_a_row_that_would_be_cut_fails_the_job_with_its_line(client: Client) -> None:
    job_id = client.submit(sft_stage(max_length=20))["id"]
    job = wait_for(client, job_id, ended, 120)
    assert job["status_reason"]["code"] == "data_invalid"
    assert "line " in job["status_reason"]["message"]
    assert "max_length=20" in job["status_reason"]["message"]


def test_what_is_known_wrong_at_submit_is_refused_at_submit(client: Client, workspace: Path) -> None:
    bad = workspace / "bad.jsonl"
    bad.write_text(
        '{"prompt": "1 2 3>6", "completion": "1 + 2 = 3 , 3 + 3 = 6"}\n{"prompt": "1 2 3>6", "completion": ""}\n{oops\n'
    )
    refused = {
        "line 2": sft_stage(data={"path": "bad.jsonl"}),
        "line 3": sft_stage(data={"path": "bad.jsonl"}),
        "nowhere.jsonl": sft_stage(data={"path": "data/nowhere.jsonl"}),
        "Extra inputs": sft_stage(surprise=1),
        "/etc/passwd": sft_stage(data={"path": "/etc/passwd"}),
        "64": sft_stage() | {"trainer": {"workers": 64}},
    }
    before = len(client.jobs(limit=100))
    for words, spec in refused.items():
        with pytest.raises(ApiProblem, match=words):
            client.submit(spec)
    assert len(client.jobs(limit=100)) == before
