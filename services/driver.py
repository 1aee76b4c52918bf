"""Entrypoint of a job: walk its stages in order and leave a terminal record, whatever happens.

    python -m services.driver <attempt folder>

The folder's parent holds spec.json. A SIGTERM cancels: workers are ended, the record says `cancelled`. A stage that lost a
process is entered again, as far as the job's `recovery` goes.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import IO, TextIO

import ray

from sedsft.data import DataFileError, TokenizerError
from services.errors import DataError, JobError, ModelError, PhaseTimeout
from services.failure_policy import GiveUp, cause_of, decide
from services.jobspec import JOB_SPEC, EvalStage, FilterStage, GateStage, JobSpec, RLStage, SFTStage, Stage, stages_of
from services.loops.engines import Engines
from services.loops.evaluate import run_evaluation
from services.loops.filter import run_filter
from services.loops.gate import run_gate
from services.loops.grpo import run_grpo
from services.loops.sft import run_sft
from services.report import build_report
from services.run import Run
from services.rundir import RESTARTED, Control, Failure, StatusReason, failures_before, read_control, superseded

log = logging.getLogger("sedsft.driver")

WATCH_S = 1.0
SUPERSEDED_EXIT = 75


class Cancelled(BaseException):
    """SIGTERM arrived. Not an Exception, so that no handler on the way takes it for a failure."""


class _Tee:
    """Text stream that also writes to the attempt's log, so that logs outlive the Ray cluster."""

    def __init__(self, stream: TextIO, file: IO[str]) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        self._file.write(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._file.flush()
        self._stream.flush()

    def isatty(self) -> bool:
        return False

    def fileno(self) -> int:
        return self._stream.fileno()


def walk(run: Run) -> None:
    """SFT -> readiness -> difficulty filter -> RL -> evaluation, or whichever stages the job names."""
    with Engines(run) as engines:
        threading.Thread(target=_watch, args=(run, engines), name="watch", daemon=True).start()

        def clear(failure: Failure) -> None:
            # What is late may be an engine; after a death those that live are used again.
            if failure.cause == PhaseTimeout.code:
                engines.release()

        for index, stage in enumerate(stages_of(run.spec)):
            with run.stage(index, stage.name) as folder:
                insist(run, partial(_run_stage, run, stage, folder, engines), clear)


def _run_stage(run: Run, stage: Stage, folder: Path, engines: Engines) -> None:
    match stage:
        case SFTStage():
            engines.release()
            run_sft(run, stage, folder)
        case RLStage():
            run_grpo(run, stage, folder, engines)
        case FilterStage():
            run_filter(run, stage, folder, engines)
        case GateStage():
            run_gate(run, stage, folder, engines)
        case EvalStage():
            run_evaluation(run, stage, folder, engines)


def insist(run: Run, work: Callable[[], None], clear: Callable[[Failure], None]) -> None:
    """Do the work of a stage, and again after failures that pass, as the job's `recovery` allows; `clear` comes in between.

    A stage that is entered again goes on behind its newest good checkpoint and reads back what it has recorded.

    Raises:
        Exception: the last failure of `work`; an error of the job says why it was not tried again.
    """
    while True:
        try:
            work()
            return
        except Exception as error:  # the policy lets all but a few kinds of errors go on up
            failure = run.failure(cause_of(error))
            verdict = decide(failure, failures_before(run.folder), run.spec.recovery)
            if isinstance(verdict, GiveUp):
                if verdict.why and isinstance(error, JobError):
                    raise type(error)(f"{error.message}. Not tried again: {verdict.why}") from error
                raise
            log.warning("%s", "".join(traceback.format_exception(error)))
            message = (
                f"after step {failure.step} of {run.stage_name}, in {verdict.wait_s:g} s again from its checkpoint: {error}"
            )
        run.event(RESTARTED, message, failure=asdict(failure), wait_s=verdict.wait_s)
        clear(failure)
        time.sleep(verdict.wait_s)


def _watch(run: Run, engines: Engines) -> None:
    """Once a second: end this process when another one goes on with the job; pass on what the service wants of the stage."""
    done: Control | None = None
    while True:
        if superseded(run.folder):
            # A checkpoint or a row of this driver would come between those of the other.
            log.error("a later attempt of %s exists; this driver ends", run.job_id)
            os._exit(SUPERSEDED_EXIT)
        control = read_control(run.folder)
        asked = control is not None and control.stage == run.stage_name
        if control is not None and asked and engines.resize(control.rollout_workers) and control != done:
            done = control
            run.event("resize", f"{control.rollout_workers} rollout workers are wanted", **asdict(control))
        time.sleep(WATCH_S)


def main(folder: Path) -> int:
    """Run the job of `folder`; 0 when it succeeded, 1 when it failed, 2 when it was cancelled."""
    log_file = (folder / "driver.log").open("a", encoding="utf-8", buffering=1)
    sys.stdout, sys.stderr = _Tee(sys.stdout, log_file), _Tee(sys.stderr, log_file)
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    spec: JobSpec = JOB_SPEC.validate_json((folder.parent / "spec.json").read_text(encoding="utf-8"))
    ray.init(address="auto", namespace=folder.parent.name, log_to_driver=True, logging_level=logging.WARNING)
    run = Run(folder, spec)
    signal.signal(signal.SIGTERM, _cancel)
    try:
        walk(run)
        outcome: tuple[str, StatusReason | None, int] = ("succeeded", None, 0)
    except Cancelled:
        outcome = ("cancelled", StatusReason("cancelled", "stopped on request; checkpoints published before stay"), 2)
    except Exception as error:  # noqa: BLE001 - the process border: whatever it was becomes the job's reason
        traceback.print_exc()
        outcome = ("failed", reason_of(error), 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return _end(run, *outcome)


def reason_of(error: Exception) -> StatusReason:
    """Cause code and message of a failure."""
    match error:
        case JobError():
            return StatusReason(error.code, error.message)
        case DataFileError():
            return StatusReason(DataError.code, str(error))
        case TokenizerError():
            return StatusReason(ModelError.code, str(error))
        case _:
            return StatusReason(JobError.code, f"{type(error).__name__}: {error}; the job's log has the traceback")


def _end(run: Run, status: str, reason: StatusReason | None, exit_code: int) -> int:
    if reason is not None:
        run.event(status, reason.message, code=reason.code)
    try:
        build_report(run.folder, json.loads((run.folder.parent / "spec.json").read_text(encoding="utf-8")))
    except Exception:  # noqa: BLE001 - a report that cannot be drawn must not cost the job its terminal record
        run.event("report_failed", traceback.format_exc(limit=3))
    run.finish(status, reason)
    ray.shutdown()
    return exit_code


def _cancel(signum: int, frame: FrameType | None) -> None:
    raise Cancelled


if __name__ == "__main__":
    code = main(Path(sys.argv[1]).resolve())
    sys.stdout.flush()
    # Native threads of torch or Ray may not end; the record is written, nothing else is to be done.
    os._exit(code)
