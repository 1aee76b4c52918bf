"""Resume proof: SFT runs killed with SIGKILL, again and again, end with the bits of the run that nobody touched.

    python -m benchmarks.resume_table [--only ROW ...]

Every run: a tiny Llama with dropout, two ranks, packing, SED with running tau, 8 rows in batches of 3 (so 3, 3 and 2), 3
epochs of 3 steps, a checkpoint behind every step. Combinations of ZeRO stage and precision are killed at random steps, in
the middle of a step or of a save, 20 times in all; one run is killed in every one of its 9 steps. An attempt is a process
of its own, forked from one that has done the imports, and goes on from what the attempts before it left. Killed are, in
turn, the driver, one of the ranks, and all of them. Then the sha256 of the weights, of both ranks' optimizer states and
the state of tau are compared.

Prints a table and writes resume_table.json beside this file. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import ray

from services.checkpoints import verify
from services.jobspec import JOB_SPEC, SFTStage
from services.loops.sft import run_sft
from services.run import Run
from services.rundir import read_lines, read_result
from tests.services.loops.test_sft import make_spec

STEPS, EPOCH = 9, 3
VICTIMS = ("driver and ranks", "driver", "rank")
ATTEMPT_TIMEOUT_S = 240.0
FORKS = multiprocessing.get_context("forkserver")
COMPARED = ("model.safetensors", "trainer/rank-0.safetensors", "trainer/rank-1.safetensors")


@dataclass(frozen=True)
class Combination:
    """One row of the table; `kills` are the steps to be killed in, ascending, and whether while they are saved."""

    zero_stage: int
    precision: str
    kind: str
    kills: tuple[tuple[int, bool], ...]


@dataclass
class Outcome:
    """What happened to a combination's killed run."""

    killed: list[dict[str, Any]] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    sha256: str = ""
    seconds: float = 0.0


def attempt_main(job: Path, number: int, address: str) -> None:
    """One attempt of the stage in `job`/spec.json: what a driver does, without the report."""
    log = os.open(job / f"log-{number}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    stage = JOB_SPEC.validate_json((job / "spec.json").read_text(encoding="utf-8"))
    assert isinstance(stage, SFTStage)
    ray.init(address=address, log_to_driver=False)
    run = Run(job / f"attempt-{number}", stage)
    with run.stage(0, stage.name) as folder:
        run_sft(run, stage, folder)
    run.finish("succeeded", None)
    ray.shutdown()


class Attempt:
    """A running attempt and what its folder says."""

    def __init__(self, job: Path, number: int, address: str) -> None:
        self.folder = job / f"attempt-{number}"
        self.checkpoints = self.folder / "stages" / "sft" / "checkpoints"
        self.process = FORKS.Process(target=attempt_main, args=(job, number, address))
        self.process.start()

    def step(self) -> int:
        """Last step whose figures were recorded."""
        path = self.folder / "metrics.jsonl"
        return max((record["step"] for record, _ in read_lines(path)), default=0) if path.exists() else 0

    def saved(self) -> int:
        """Newest published step; 0 for none."""
        return max((int(path.name[5:]) for path in self.checkpoints.glob("step-?")), default=0)

    def is_saving(self, step: int) -> bool:
        """Files of step `step` or a later one are being written."""
        return any(int(path.name[5:].partition(".")[0]) >= step for path in self.checkpoints.glob("step-*.tmp-[0-9]*"))

    def is_in(self, step: int) -> bool:
        """Step `step` or a later one goes on: it follows on what was resumed or saved, and the ranks are ready."""
        path = self.folder / "events.jsonl"
        events = [event for event, _ in read_lines(path)] if path.exists() else []
        resumed = [event["data"]["step"] for event in events if event["kind"] == "resumed"]
        # Written once the ranks have loaded and tau is there.
        ready = (self.checkpoints.parent / "calibration.json").exists()
        return ready and max([*resumed, self.saved()]) >= step - 1

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Poll until `condition` holds or the process ended."""
        deadline = time.monotonic() + ATTEMPT_TIMEOUT_S
        while self.process.is_alive() and not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"expected an attempt to come on within {ATTEMPT_TIMEOUT_S:.0f} s, {self.folder} did not")
            time.sleep(0.002)


def ranks_of_cluster() -> list[psutil.Process]:
    """Processes of the training ranks, below the Ray that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "SFTWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(attempt: Attempt, victim: str, chance: random.Random) -> int:
    """SIGKILL to the victim; how many processes got it. Returns when the attempt's process and all ranks are gone."""
    ranks = ranks_of_cluster()
    assert attempt.process.pid is not None
    victims = [attempt.process.pid] if victim.startswith("driver") else []
    if victim == "rank" and ranks:
        victims.append(chance.choice(ranks).pid)
    elif victim != "driver":
        victims += [rank.pid for rank in ranks]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    attempt.process.join(ATTEMPT_TIMEOUT_S)
    psutil.wait_procs(ranks, timeout=ATTEMPT_TIMEOUT_S)
    return len(victims)


def run_killed(job: Path, combination: Combination, address: str, chance: random.Random) -> list[dict[str, Any]]:
    """Attempt after attempt, each killed once, then one to the end. What was true at each kill."""
    killed: list[dict[str, Any]] = []
    for number, (step, while_saving) in enumerate(combination.kills, start=1):
        attempt = Attempt(job, number, address)
        victim = VICTIMS[number % len(VICTIMS)]
        attempt.wait_for(partial(attempt.is_saving, step) if while_saving else partial(attempt.is_in, step))
        time.sleep(chance.random() * (0.05 if while_saving else 0.1))
        ended_by_itself = not attempt.process.is_alive()
        processes = kill(attempt, victim, chance)
        torn = sorted(path.name for path in attempt.checkpoints.glob("step-*.tmp-*"))
        killed.append(
            {
                "wanted_step": step,
                "while_saving": while_saving,
                "victim": victim,
                "processes_killed": processes,
                "ended_by_itself": ended_by_itself,
                "last_step_trained": attempt.step(),
                "newest_checkpoint": attempt.saved(),
                "torn_folders": torn,
            }
        )
    finish(job, len(combination.kills) + 1, address)
    return killed


def finish(job: Path, number: int, address: str) -> None:
    """An attempt that nobody kills."""
    attempt = Attempt(job, number, address)
    attempt.wait_for(lambda: False)
    if attempt.process.exitcode or read_result(attempt.folder) is None:
        log = (job / f"log-{number}.txt").read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"expected attempt {number} in {job} to succeed, it did not; its log ends with\n{log[-3000:]}")


def end_of(job: Path) -> Path:
    """The verified last checkpoint of a job."""
    folder = max(job.glob(f"attempt-*/stages/sft/checkpoints/step-{STEPS}"), key=lambda path: path.stat().st_mtime)
    assert verify(folder).info.step == STEPS
    return folder


def differences(plain: Path, killed: Path) -> list[str]:
    """Names of what is not equal in two last checkpoints."""
    differing = [name for name in COMPARED if sha256(plain / name) != sha256(killed / name)]
    ours, theirs = verify(plain).info, verify(killed).info
    if ours.tau_state is None or ours.tau_state != theirs.tau_state:
        differing.append("tau_state")
    return differing + ["consumed_samples"] * (ours.consumed_samples != theirs.consumed_samples)


def sha256(path: Path) -> str:
    """Hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_job(folder: Path, root: Path, combination: Combination) -> Path:
    """Spec of a run."""
    settings: dict[str, Any] = {
        "objective": {"type": "sed", "tau_mode": "running"},
        "epochs": STEPS // EPOCH,
        "batch_size": 3,
        "pack_tokens": 32,
        "max_length": 16,
        "precision": combination.precision,
        "checkpoints": {"every_steps": 1, "keep": STEPS},
    }
    spec = make_spec(root, **settings)
    trainer = spec.trainer.model_copy(update={"workers": 2, "zero_stage": combination.zero_stage})
    folder.mkdir()
    (folder / "spec.json").write_text(spec.model_copy(update={"trainer": trainer}).model_dump_json(), encoding="utf-8")
    return folder


def prove(root: Path, combination: Combination, plain: Path, address: str, seed: int) -> Outcome:
    """Kill and compare."""
    started = time.monotonic()
    name = f"{combination.kind.replace(' ', '-')}-{combination.zero_stage}-{combination.precision}"
    job = make_job(root / name, root, combination)
    outcome = Outcome(killed=run_killed(job, combination, address, random.Random(seed)))
    outcome.differing = differences(end_of(plain), end_of(job))
    outcome.sha256 = sha256(end_of(job) / "model.safetensors")
    outcome.seconds = time.monotonic() - started
    return outcome


def combinations() -> list[Combination]:
    """20 random kills spread over all ZeRO stages and precisions, then a kill in every step."""
    chance, rows = random.Random(0), []
    kinds = [(zero_stage, precision) for zero_stage in range(4) for precision in ("fp32", "bf16")]
    for number, (zero_stage, precision) in enumerate(kinds):
        steps = sorted(chance.choices(range(1, STEPS + 1), k=3 if number % 2 else 2))
        kills = tuple((step, chance.random() < 0.4) for step in steps)
        rows.append(Combination(zero_stage, precision, "random steps", kills))
    rows.append(Combination(2, "bf16", "every step", tuple((step, False) for step in range(1, STEPS + 1))))
    return rows


def prove_all(rows: Sequence[Combination], write: Callable[[list[dict[str, Any]]], None]) -> bool:
    """Run the table on one Ray cluster; `write` is given all lines so far after each. True when all are equal."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="rt", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        ray.init(num_cpus=4, include_dashboard=False, _temp_dir=temporary, log_to_driver=False)
        address = ray.get_runtime_context().gcs_address
        root, plain = Path(temporary) / "jobs", {}
        root.mkdir()
        for number, row in enumerate(rows):
            key = (row.zero_stage, row.precision)
            if key not in plain:
                plain[key] = make_job(root / f"plain-{row.zero_stage}-{row.precision}", root, row)
                finish(plain[key], 1, address)
            outcome = prove(root, row, plain[key], address, number)
            record = {"zero_stage": row.zero_stage, "precision": row.precision, "kind": row.kind, **asdict(outcome)}
            lines.append(record | {"equal": not outcome.differing})
            print(line_of(record), flush=True)
            write(lines)
        ray.shutdown()
    return all(line["equal"] for line in lines)


def line_of(record: dict[str, Any]) -> str:
    """A row of the printed table."""
    killed = [kill for kill in record["killed"] if not kill["ended_by_itself"]]
    at = " ".join(f"{kill['last_step_trained']}{'s' if kill['torn_folders'] else ''}" for kill in killed)
    verdict = "equal" if not record["differing"] else "DIFFERS: " + ", ".join(record["differing"])
    head = f"ZeRO {record['zero_stage']}  {record['precision']}  {record['kind']:12}  {len(killed):2} kills"
    return f"{head}  after steps {at:24}  {verdict}  {record['sha256'][:12]}  {record['seconds']:.0f} s"


def main() -> int:
    """Read the arguments, run the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the rows to run (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    arguments = parser.parse_args()
    # Before Ray starts: the cluster and all attempts inherit it.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    FORKS.set_forkserver_preload([run_sft.__module__])
    rows = combinations()
    rows = rows if arguments.only is None else [rows[number] for number in arguments.only]
    machine = {"processor": platform.machine(), "cores": os.cpu_count()}
    versions = {name: version(name) for name in ("torch", "ray", "deepspeed")}

    def write(lines: list[dict[str, Any]]) -> None:
        report = {"machine": machine, "versions": versions, "steps": STEPS, "steps_per_epoch": EPOCH, "rows": lines}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    return 0 if prove_all(rows, write) else 1


if __name__ == "__main__":
    sys.exit(main())
