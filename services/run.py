"""One attempt of a job as its loops see it: where things go, how far it is, and the one sink of every figure."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.util.metrics import Gauge

from sedsft.config import DataConfig
from services.checkpoints import MANIFEST, verify
from services.jobspec import STAGE_DATA, JobSpec, ModelRef, stages_of
from services.rundir import RESTARTED, CheckpointRecord, Failure, Progress, Result, RunWriter, StatusReason

log = logging.getLogger("sedsft.run")

HEARTBEAT_S = 2.0
LOG_EVERY_S = 5.0
FILTERED_ROWS = "rows.jsonl"
"""What a filter stage leaves for later ones."""
RECOVERIES = {RESTARTED: "stages", "engine_restarted": "engines", "scorer_restarted": "scorers"}
"""Events of recovery, and what is counted as `recoveries_<...>` in the figures of every later step of the attempt."""


class Run:
    """Paths, progress, figures and checkpoints of one attempt. Figures go to metrics.jsonl, to Ray's metrics and to the log."""

    def __init__(self, folder: Path, spec: JobSpec) -> None:
        self.folder = folder
        self.spec = spec
        self.job_id = folder.parent.name
        self.attempt = folder.name.rpartition("-")[2]
        self.checkpoints: list[CheckpointRecord] = []
        self.stage_seconds: dict[str, float] = {}
        self.engines_now: Callable[[], dict[str, int] | None] = lambda: None
        """Asked with every heartbeat for what `Progress.engines` says."""
        self._recoveries: Counter[str] = Counter()
        if self.attempt.isdigit() and int(self.attempt) > 1:
            self._recoveries["drivers"] = int(self.attempt) - 1
        self._writer = RunWriter(folder)
        self._verified: set[Path] = set()
        self._promoted: dict[str, Path] = {}
        self._progress = Progress(num_stages=len(stages_of(spec)))
        self._gauges: dict[str, Gauge] = {}
        self._logged_at = 0.0
        self._closing = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heartbeat.start()

    def _beat(self) -> None:
        while True:
            try:
                self._writer.status(replace(self._progress, engines=self.engines_now()))
            except OSError as error:
                # A full disk now may have room again before the heartbeat is missed.
                log.warning("status not written: %s", error)
            if self._closing.wait(HEARTBEAT_S):
                return

    @contextmanager
    def stage(self, index: int, name: str) -> Iterator[Path]:
        """Time a stage and give its folder."""
        started = time.monotonic()
        self._progress = replace(self._progress, stage=name, stage_index=index, phase="starting", step=0, steps=0, completed=0)
        self.event("stage_started", f"stage {name} started", stage=name)
        folder = self.folder / "stages" / name
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        self.stage_seconds[name] = time.monotonic() - started
        self.event("stage_ended", f"stage {name} ended after {self.stage_seconds[name]:.1f} s", stage=name)

    def phase(self, phase: str, step: int = 0, steps: int = 0) -> None:
        """Say what the stage does now; shown by the API within a heartbeat."""
        self._progress = replace(self._progress, phase=phase, step=step, steps=steps)
        self._gauge("progress", step / steps if steps else 0.0)

    def event(self, kind: str, message: str, /, **data: Any) -> None:
        """Record something worth knowing later: a stage, tau, a dropped row, a sync, an error."""
        log.info("%s: %s", kind, message)
        if kind in RECOVERIES:
            self._recoveries[RECOVERIES[kind]] += 1
        self._writer.event(kind, message, **data)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Record the figures of one step of the current stage, with how often the attempt has recovered from what."""
        self._progress = replace(self._progress, completed=step)
        values = values | {f"recoveries_{what}": float(count) for what, count in self._recoveries.items()}
        self._writer.metrics(self._progress.stage, step, values)
        for name, value in values.items():
            self._gauge(name, value)
        now = time.monotonic()
        if now - self._logged_at >= LOG_EVERY_S or step == self._progress.steps:
            self._logged_at = now
            figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            log.info("%s %d/%d  %s", self._progress.stage, step, self._progress.steps, figures)

    @property
    def stage_name(self) -> str:
        """The stage under way, or the last one."""
        return self._progress.stage

    def failure(self, cause: str) -> Failure:
        """What a failure of now is called."""
        return Failure(cause, self._progress.stage_index, self._progress.completed)

    def _gauge(self, name: str, value: float) -> None:
        if name not in self._gauges:
            gauge = Gauge("sedsft_" + re.sub(r"\W", "_", name), f"{name} of the current step", ("job", "attempt", "stage"))
            gauge.set_default_tags({"job": self.job_id, "attempt": self.attempt})
            self._gauges[name] = gauge
        self._gauges[name].set(value, tags={"stage": self._progress.stage})

    def model_path(self, ref: ModelRef) -> Path:
        """Folder of a stage's starting model. A checkpoint is verified before its first use.

        Raises:
            CheckpointInvalid: files that do not match the manifest.
        """
        if ref.path is not None:
            path = Path(ref.path)
        elif ref.stage in self._promoted:
            path = self._promoted[ref.stage]
        else:
            path = Path(next(c.path for c in reversed(self.checkpoints) if c.stage == ref.stage))
        if path not in self._verified and (path / MANIFEST).exists():
            verify(path)
            self._verified.add(path)
        return path

    def data(self, config: DataConfig) -> DataConfig:
        """The same data with the file that an earlier filter stage has left where it is named by that stage."""
        if not config.path.startswith(STAGE_DATA):
            return config
        path = self.folder / "stages" / config.path.removeprefix(STAGE_DATA) / FILTERED_ROWS
        return config.model_copy(update={"path": str(path)})

    def published(self, record: CheckpointRecord) -> None:
        """Note a verified checkpoint; its event lets the API list it while the job goes on, and if the job dies."""
        self.checkpoints.append(record)
        self.event("checkpoint", f"published {record.path}", **asdict(record))

    def removed(self, path: Path) -> None:
        """Note that a checkpoint published before is no longer there."""
        self.checkpoints = [record for record in self.checkpoints if record.path != str(path)]
        self.event("checkpoint_removed", f"removed {path}", path=str(path))

    def promoted(self, stage: str, name: str, path: Path) -> None:
        """Note which candidate later stages get that start from the gate `stage`."""
        self._promoted[stage] = path
        self.event("promoted", f"{stage} promotes {name}, {path}", stage=stage, candidate=name, path=str(path))

    def finish(self, status: Any, reason: StatusReason | None) -> None:
        """Write the terminal record and close."""
        self._progress = replace(self._progress, phase="ended")
        self._closing.set()
        self._heartbeat.join()
        self._writer.result(Result(status, reason, tuple(self.checkpoints), dict(self.stage_seconds)))
        self._writer.close()


def write_json(path: Path, value: Any) -> None:
    """Write a stage's table, samples or calibration for the report and the API."""
    path.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
