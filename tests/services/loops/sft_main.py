"""One attempt of an SFT stage in a process of its own, so that a test can kill it: sft_main <job folder> <attempt>.

Its ranks die as `dying_workers` says, and the stage starts again as the driver would have it.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import ray

from services.driver import insist
from services.jobspec import JOB_SPEC, SFTStage
from services.loops import sft
from services.run import Run
from tests.services.loops.dying_workers import DyingSFTWorker

if __name__ == "__main__":
    job, number = Path(sys.argv[1]), int(sys.argv[2])
    stage = JOB_SPEC.validate_json((job / "spec.json").read_text())
    assert isinstance(stage, SFTStage)
    sft.SFTWorker = DyingSFTWorker  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="sk", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=temporary, log_to_driver=False)
        run = Run(job / f"attempt-{number}", stage)
        with run.stage(0, stage.name) as folder:
            insist(run, partial(sft.run_sft, run, stage, folder), lambda failure: None)
        run.finish("succeeded", None)
        ray.shutdown()
