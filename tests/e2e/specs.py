"""Small jobs for the real stack, and how to wait for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from api.client import ENDED, Client

TRAINER = {"workers": 2, "cpus_per_worker": 0.4, "zero_stage": 2}
ROLLOUT = {"workers": 1, "cpus_per_worker": 0.4, "max_model_len": 64, "max_num_seqs": 64, "restarts": 0}
SCORER = {"cpus_per_worker": 0.2, "processes": 1}
REWARD = {"name": "countdown"}


def sft_stage(**changes: Any) -> dict[str, Any]:
    """Three SED steps on two ranks."""
    sft = {
        "objective": {"type": "sed"},
        "data": {"path": "data/sft_narrow.jsonl", "max_rows": 200},
        "held_out": {"path": "data/held_out.jsonl"},
        "optimizer": {"learning_rate": 1e-3},
        "steps": 3,
        "batch_size": 32,
        "max_length": 64,
    } | changes
    return {"type": "sft", "name": "sft", "model": {"path": "base"}, "sft": sft, "trainer": TRAINER}


def rl_stage(model: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Two iterations of 8 prompts."""
    grpo = {
        "data": {"path": "data/rl_prompts.jsonl"},
        "reward": REWARD,
        "iterations": 2,
        "prompts_per_iteration": 8,
        "group_size": 8,
        "mini_batch_prompts": 4,
        "micro_batch_size": 64,
        "max_tokens": 18,
        "optimizer": {"learning_rate": 4e-4, "schedule": "constant"},
        "readiness_prompts": 8,
    } | changes
    return {
        "type": "rl",
        "name": "rl",
        "model": model,
        "grpo": grpo,
        "trainer": TRAINER,
        "rollout": ROLLOUT,
        "scorer": SCORER,
    }


def eval_stage(models: dict[str, dict[str, str]]) -> dict[str, Any]:
    """One benchmark of 6 problems."""
    evaluation = {
        "benchmarks": [{"name": "easy", "path": "data/eval_3.jsonl", "max_rows": 6}],
        "samples": 8,
        "pass_k": [1, 8],
        "sampling": {"max_tokens": 18},
        "reward": REWARD,
    }
    return {"type": "eval", "name": "eval", "models": models, "eval": evaluation, "rollout": ROLLOUT, "scorer": SCORER}


def wait_for(client: Client, job_id: str, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> dict[str, Any]:
    """Poll a job until `condition` holds; fails with its reason when it ends first, and with its log when time runs out."""
    deadline = time.monotonic() + timeout_s
    while True:
        job = client.job(job_id)
        if condition(job):
            return job
        assert job["status"] not in ENDED, f"job ended: {job['status_reason']}\n{client.logs(job_id)['text'][-3000:]}"
        assert time.monotonic() < deadline, f"{job['phase']} after {timeout_s} s\n{client.logs(job_id)['text'][-3000:]}"
        time.sleep(0.2)


def ended(job: dict[str, Any]) -> bool:
    """Whether a job has come to its end."""
    return job["status"] in ENDED
