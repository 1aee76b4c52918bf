"""`sedsft demo`: the main job end to end on this machine, on a base model and a task made here, then everything stopped."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from api import stack as local_stack
from api.client import Client, Json
from api.settings import Settings
from api.watch import watch_job

FOLDER = Path(".cache/demo")
SPEC = Path("examples/demo.json")
SHOWN = {
    "avg": "Avg@8",
    "pass@8": "pass@8",
    "self_bleu": "Self-BLEU",
    "token_entropy": "entropy",
    "distinct_correct": "correct paths",
}
DEPLOYED_STAGE = "sed-rl"
POLL_S = 0.5


class DemoFailed(Exception):
    """The demonstration did not come to its end."""


def run_demo(out: Console) -> None:
    """Prepare, start, submit, watch, show, deploy, ask, stop.

    Raises:
        DemoFailed: not started from the project's folder, or a step failed; what was started is stopped first.
    """
    if not SPEC.exists():
        raise DemoFailed(f"expected {SPEC} below the current folder; run the demo from the project's root")
    _prepare(out)
    home = FOLDER / "home"
    # Every demonstration starts afresh; the base model lies outside and stays.
    shutil.rmtree(home, ignore_errors=True)
    settings = Settings(home=home, port=_free_port(), allowed_roots=(Path.cwd(),))
    out.rule("stack")
    stack = local_stack.up(settings)
    try:
        out.print(f"API {stack.api_url}/docs   dashboard {stack.dashboard_url}   token in {settings.home / 'ray_token'}")
        with Client.local(stack.api_url, settings.key_path) as client:
            _train(client, out)
    finally:
        local_stack.down(settings)
        out.print("stopped everything that was started")


def _prepare(out: Console) -> None:
    """Base model and data; the base is trained once and kept."""
    out.rule("base model and data")
    command = [sys.executable, "examples/prepare_demo.py", str(FOLDER)]
    with (
        Progress(
            TextColumn("pre-training the base"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=out
        ) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
    ):
        task = bar.add_task("", total=None)
        assert process.stdout is not None
        for line in process.stdout:
            done, _, rest = line.removeprefix("base model: step ").partition("/")
            if done.isdigit():
                bar.update(task, completed=int(done), total=int(rest.partition(",")[0]))
    if process.returncode:
        raise DemoFailed(f"expected {' '.join(command)} to succeed, it ended with {process.returncode}; its output is above")


def _train(client: Client, out: Console) -> None:
    out.rule("CE-SFT and SED-SFT from the same base, GRPO on each, evaluation")
    job = watch_job(client, client.submit(json.loads(SPEC.read_text(encoding="utf-8")))["id"], out)
    report = FOLDER / "report.html"
    report.write_bytes(client.report(job["id"]))
    if job["status"] != "succeeded":
        raise DemoFailed(f"expected the job to succeed, it {job['status']}; report in {report}")
    for stage, seconds in job["stage_seconds"].items():
        out.print(f"stage {stage}: {seconds:.0f} s")
    out.print(_table(client.tables(job["id"])["eval"]["rows"]))
    out.print("One run of one seed: differences between CE and SED after RL are within noise; docs/objectives.md says more.")
    out.print(f"report with curves, samples and coloured tokens: {report}")
    _ask(client, job, out)


def _table(rows: list[Json]) -> Table:
    """The mean over the three groups of problems, a row per model; Avg@8 of each group beside it."""
    groups = list(dict.fromkeys(row["benchmark"] for row in rows if row["benchmark"] != "mean"))
    table = Table("model", *SHOWN.values(), *(f"Avg@8 {group}" for group in groups))
    for row in rows:
        if row["benchmark"] == "mean":
            own = {other["benchmark"]: other["avg"] for other in rows if other["model"] == row["model"]}
            table.add_row(row["model"], *(f"{row[name]:.3f}" for name in SHOWN), *(f"{own[group]:.3f}" for group in groups))
    return table


def _ask(client: Client, job: Json, out: Console) -> None:
    """Serve the SED checkpoint and ask it one held-out problem over OpenAI's route."""
    out.rule("deployment")
    checkpoint = {"job_id": job["id"], "stage": DEPLOYED_STAGE}
    deployment = client.deploy({"name": "countdown", "checkpoint": checkpoint, "resources": {"cpus": 0.5}})
    with out.status("deploying the SED checkpoint"):
        while deployment["status"] == "deploying":
            time.sleep(POLL_S)
            deployment = client.deployment(deployment["id"])
    if deployment["status"] != "ready":
        raise DemoFailed(f"expected the deployment to be ready, it is {deployment['status']}: {deployment['status_reason']}")
    problem = json.loads((FOLDER / "data" / "eval_4.jsonl").read_text(encoding="utf-8").splitlines()[0])["problem"]
    body = {"model": "countdown", "messages": [{"role": "user", "content": problem}], "max_tokens": 18}
    answer = httpx.post(f"{deployment['url']}/chat/completions", json=body, timeout=60.0, trust_env=False)
    answer.raise_for_status()
    out.print(f"POST {deployment['url']}/chat/completions")
    out.print(f"problem {problem!r}   answer {answer.json()['choices'][0]['message']['content'].strip()!r}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
