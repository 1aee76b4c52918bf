"""Progress bars of a job in a terminal, until it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from api.client import ENDED, Client, Json

KEY_METRICS = ("loss", "reward", "entropy", "masked_share", "tokens_per_s")
POLL_S = 0.5


def watch_job(client: Client, job_id: str, out: Console) -> Json:
    """Progress bars, one per stage, until the job has ended; the job."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[figures]}"), console=out) as bars:
        waiting = bars.add_task("waiting", total=None, figures="")
        tasks: dict[str, TaskID] = {}
        while True:
            job = client.job(job_id)
            progress, stage = job["progress"], job["progress"]["stage"]
            bars.update(waiting, description=job["phase"], visible=not stage)
            if stage and stage not in tasks:
                _complete(bars, tasks.values())
                tasks[stage] = bars.add_task(stage, total=None, figures="")
            if stage:
                label = f"{stage} ({progress['stage_index'] + 1}/{progress['num_stages']}) {job['phase']}"
                total, figures = progress["steps"] or None, _figures(client, job_id, stage)
                bars.update(tasks[stage], description=label, completed=progress["step"], total=total, figures=figures)
            if job["status"] in ENDED:
                break
            time.sleep(POLL_S)
        bars.update(waiting, visible=False)
        if job["status"] == "succeeded":
            _complete(bars, tasks.values())
    print_outcome(job, out)
    return job


def _complete(bars: Progress, tasks: Iterable[TaskID]) -> None:
    """Fill the bars of stages that have ended: their last steps may lie between two looks."""
    for task in bars.tasks:
        if task.id in tasks:
            total = task.total or 1
            bars.update(task.id, total=total, completed=total)
            bars.stop_task(task.id)


def _figures(client: Client, job_id: str, stage: str) -> str:
    points = client.metrics(job_id, stage, max_points=1)
    values = points[-1]["values"] if points else {}
    return "  ".join(f"{name} {values[name]:.3g}" for name in KEY_METRICS if values.get(name) is not None)


def print_outcome(job: Json, out: Console) -> None:
    """Status and reason."""
    colour = {"succeeded": "green", "failed": "red"}.get(job["status"], "yellow")
    reason = job["status_reason"]
    out.print(f"[{colour}]{job['status']}[/{colour}] {job['id']}")
    if reason:
        out.print(f"{reason['code']}: {escape(reason['message'])}")
