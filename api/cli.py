"""`sedsft`: the local stack and the REST API from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from api import stack as local_stack
from api.client import ApiProblem, Client, ServiceUnreachable
from api.demo import DemoFailed, run_demo
from api.settings import Settings
from api.watch import POLL_S, print_outcome, watch_job
from services import checkpoints
from services.errors import CheckpointInvalid

app = typer.Typer(help="SED-SFT and GRPO as jobs on Ray.", no_args_is_help=True, pretty_exceptions_enable=False)
# Where no terminal says how wide it is (a log, a pipe), tables keep all their columns.
out = Console(width=None if sys.stdout.isatty() else 140)
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the API's answer.")]
JobId = Annotated[str, typer.Argument(help="Id of a job.")]


def main() -> None:
    """Run a command; errors as one message, exit code 1."""
    try:
        app()
    except (ApiProblem, ServiceUnreachable, local_stack.StackError, DemoFailed, CheckpointInvalid, FileExistsError) as error:
        err.print(f"[red]error[/red] {escape(str(error))}", soft_wrap=True)
        sys.exit(1)
    except ValidationError as error:
        err.print(f"[red]error[/red] settings (SEDSFT_*): {escape(str(error))}", soft_wrap=True)
        sys.exit(1)


def _client() -> Client:
    """The stack on the home if there is one, else the service of the settings."""
    settings = Settings()
    stack = local_stack.read_stack(settings)
    return Client.local(stack.api_url if stack else settings.url, settings.key_path)


def _print_json(value: Any) -> None:
    out.print_json(json.dumps(value))


# ------------------------------------------------------------------------------------------------------ stack


@app.command()
def up(
    num_cpus: Annotated[int | None, typer.Option(min=1, help="CPU cores that Ray may give to jobs; default: all.")] = None,
    num_gpus: Annotated[int | None, typer.Option(min=0, help="GPUs that Ray may give to jobs; default: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """Start Ray and the service, and wait until they answer. Models and data may lie below the current folder."""
    settings = Settings()
    stack = local_stack.up(settings, num_cpus, num_gpus)
    if as_json:
        _print_json({"api_url": stack.api_url, "dashboard_url": stack.dashboard_url, "key_path": str(settings.key_path)})
        return
    out.print(f"API        {stack.api_url}/docs   key in {settings.key_path}")
    out.print(f"dashboard  {stack.dashboard_url}   token in {settings.home / 'ray_token'}")
    out.print(f"models and data below {', '.join(map(str, settings.allowed_roots))}")


@app.command()
def down() -> None:
    """End the service, Ray, and every process they started. Running jobs are lost."""
    killed = local_stack.down(Settings())
    out.print("down" + (f"; {killed} processes had to be killed" if killed else ""))


@app.command()
def demo() -> None:
    """The whole path on a base model and a task made here: SFT, RL, evaluation, deployment. Then everything is stopped."""
    run_demo(out)


# ------------------------------------------------------------------------------------------------------- jobs


@app.command()
def submit(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Job spec as JSON.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Show progress until the job ends; exit 1 unless it succeeds.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, start nothing, print spec and resources.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job."""
    try:
        spec = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        err.print(f"[red]error[/red] expected JSON in {escape(str(file))}, got: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    with _client() as client:
        if dry_run:
            _print_json(client.dry_run(spec))
            return
        job = client.submit(spec)
        if as_json and not watch:
            _print_json(job)
            return
        out.print(f"job {job['id']}  {job['dashboard_url']}")
        if watch:
            job = watch_job(client, job["id"], out)
            if as_json:
                _print_json(job)
            if job["status"] != "succeeded":
                raise typer.Exit(1)


@app.command()
def jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the newest jobs."""
    with _client() as client:
        rows = client.jobs(limit, status)
    if as_json:
        _print_json(rows)
        return
    table = Table("id", "name", "type", "status", "stage", "step", "created")
    for job in rows:
        progress = job["progress"]
        step = f"{progress['step']}/{progress['steps']}" if progress["steps"] else str(progress["step"] or "")
        table.add_row(job["id"], job["name"], job["type"], job["status"], progress["stage"], step, job["created_at"][:19])
    out.print(table)


@app.command()
def show(job_id: JobId, as_json: AsJson = False) -> None:
    """Show a job with its checkpoints and newest events."""
    with _client() as client:
        job, published, events = client.job(job_id), client.checkpoints(job_id), list(client.events(job_id))
    if as_json:
        _print_json(job | {"checkpoints": published, "events": events})
        return
    print_outcome(job, out)
    out.print(
        f"name {job['name']}   type {job['type']}   phase {job['phase']}   attempt {job['attempt']}   {job['dashboard_url']}"
    )
    for stage, seconds in job["stage_seconds"].items():
        out.print(f"stage {stage}: {seconds:.1f} s")
    for checkpoint in published:
        out.print(f"checkpoint {checkpoint['stage']} step {checkpoint['step']}: {checkpoint['path']}", soft_wrap=True)
    for event in events[-10:]:
        out.print(f"{event['time'][:19]} {event['kind']}: {escape(event['message'])}", soft_wrap=True)


@app.command()
def logs(
    job_id: JobId, follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False
) -> None:
    """Print what the driver and its workers printed."""
    offset = 0
    with _client() as client:
        while True:
            part = client.logs(job_id, offset)
            sys.stdout.write(part["text"])
            sys.stdout.flush()
            at_end, offset = part["next_offset"] == offset, part["next_offset"]
            if part["ended"] or (at_end and not follow):
                return
            if at_end:
                time.sleep(POLL_S)


@app.command()
def cancel(job_id: JobId) -> None:
    """Ask a job to end. Checkpoints published before stay."""
    with _client() as client:
        out.print(client.cancel(job_id)["status"])


@app.command()
def resize(
    job_id: JobId,
    rollout_workers: Annotated[int, typer.Option(min=1, help="Rollout engines from now on.")],
    as_json: AsJson = False,
) -> None:
    """Change the number of rollout engines of a job whose rl stage is under way."""
    with _client() as client:
        job = client.resize(job_id, rollout_workers)
    if as_json:
        _print_json(job)
        return
    engines = job["rollout"]
    now = f"; {engines['alive']} live, {engines['ready']} serve now" if engines else ""
    out.print(f"{rollout_workers} rollout workers wanted{now}")


@app.command()
def report(
    job_id: JobId, output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("report.html")
) -> None:
    """Save a job's report."""
    with _client() as client:
        output.write_bytes(client.report(job_id))
    out.print(str(output), soft_wrap=True)


@app.command()
def explore(
    model: Annotated[str, typer.Option(help="Model folder.")],
    data: Annotated[str, typer.Option(help="SFT rows, as in a job's data.path.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("explore.html"),
    rows: Annotated[int, typer.Option(min=1, help="Rows to read, measure and show.")] = 20,
    top_k: Annotated[int, typer.Option(min=1, max=8, help="k of the coloured top-k mass.")] = 2,
    mask_ratio: Annotated[float, typer.Option(help="r, the share of tokens without the diversity term.")] = 0.7,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens after which a row is cut.")] = 2048,
) -> None:
    """Draw what SED would see: response tokens by top-k mass, and how k and r set tau. Runs here, not as a job."""
    options = {
        "--model": model,
        "--data": data,
        "--out": output,
        "--rows": rows,
        "--top-k": top_k,
        "--mask-ratio": mask_ratio,
        "--max-length": max_length,
    }
    # A process of its own, since the command line stays free of torch.
    command = [sys.executable, "-m", "services.explore", *(str(word) for option in options.items() for word in option)]
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)


@app.command()
def check_data(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Job spec as JSON.")],
    output: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("data_report"),
) -> None:
    """Report on the rows of a job's SFT stages, overlap with its benchmarks included. Runs here, starts no job."""
    command = [sys.executable, "-m", "services.data_report", str(file), "--out", str(output)]
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)


@app.command()
def replay(
    run_folder: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder of a run: <runs>/<job>/attempt-<n>.")
    ],
    stage: Annotated[str | None, typer.Option(help="Stage of kind rl; needed when the job has several.")] = None,
) -> None:
    """Train an RL stage again from its recorded rollouts and compare the weights' sha256. Runs here, needs no service."""
    command = [sys.executable, "-m", "services.replay", str(run_folder), *(["--stage", stage] if stage else [])]
    if code := subprocess.run(command, check=False).returncode:
        raise typer.Exit(code)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a checkpoint, step-<n>.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make; it must not exist.")],
) -> None:
    """Copy the model of a checkpoint, verified and without training state, as a Hugging Face folder."""
    names = checkpoints.export(checkpoint, folder)
    out.print(f"{folder}: {len(names)} files", soft_wrap=True)


# ------------------------------------------------------------------------------------------------ deployments


@app.command()
def deploy(
    job_id: Annotated[str | None, typer.Argument(help="Job that published the checkpoint.")] = None,
    stage: Annotated[str | None, typer.Option(help="Stage of the job; needed when several published checkpoints.")] = None,
    path: Annotated[str | None, typer.Option(help="Folder of a checkpoint, instead of a job.")] = None,
    name: Annotated[str, typer.Option(help="Name of the model in requests.")] = "model",
    cpus: Annotated[float, typer.Option(help="CPU cores.")] = 0.5,
    gpus: Annotated[int, typer.Option(help="GPUs.")] = 0,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it answers; exit 1 if it fails.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve a checkpoint over OpenAI's routes."""
    checkpoint = {key: value for key, value in (("job_id", job_id), ("stage", stage), ("path", path)) if value is not None}
    spec = {"name": name, "checkpoint": checkpoint, "resources": {"cpus": cpus, "gpus": gpus}}
    with _client() as client:
        deployment = client.deploy(spec)
        while wait and deployment["status"] == "deploying":
            time.sleep(POLL_S)
            deployment = client.deployment(deployment["id"])
    if as_json:
        _print_json(deployment)
    else:
        out.print(f"{deployment['id']} {deployment['status']} {deployment['url']}", soft_wrap=True)
        if deployment["status_reason"]:
            out.print(escape(deployment["status_reason"]["message"]))
    if wait and deployment["status"] != "ready":
        raise typer.Exit(1)


@app.command()
def deployments(as_json: AsJson = False) -> None:
    """List the newest deployments."""
    with _client() as client:
        rows = client.deployments()
    if as_json:
        _print_json(rows)
        return
    table = Table("id", "name", "status", "url")
    for row in rows:
        table.add_row(row["id"], row["name"], row["status"], row["url"])
    out.print(table)


@app.command()
def undeploy(deployment_id: Annotated[str, typer.Argument(help="Id of a deployment.")]) -> None:
    """Stop serving a checkpoint."""
    with _client() as client:
        out.print(client.undeploy(deployment_id)["desired_state"])


if __name__ == "__main__":
    main()
