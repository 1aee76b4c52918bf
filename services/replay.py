"""Trains an RL stage again from its recorded rollouts, without engines, and tells whether it ends with the same bits.

    python -m services.replay RUN_FOLDER [--stage NAME]

RUN_FOLDER is that of an attempt, `<runs>/<job>/attempt-<n>`. Compared are the sha256 of weights and of every rank's training
state with those of the newest checkpoint that the attempt published. Nothing in the folder is changed.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from services.checkpoints import FileRecord, Manifest, describe, is_state_file, verify, weights_sha256
from services.errors import JobError, RecordingInvalid
from services.jobspec import JOB_SPEC, JobSpec, ModelRef, RLStage, TrainerResources, stages_of
from services.loops.grpo import start_policy, train_on
from services.loops.ranks import SAVE_TIMEOUT_S, trainer_actors
from services.loops.recording import check_recorded
from services.placement import actor_groups
from services.rollout_record import read_rollouts, recorded_files
from services.rundir import read_lines
from services.training.policy_worker import PolicyWorker


@dataclass(frozen=True)
class Recorded:
    """An RL stage as a run left it."""

    stage: RLStage
    model_path: Path
    checkpoint: Path
    manifest: Manifest
    identity: dict[str, Any]
    rollouts: tuple[Path, ...]
    """Of all iterations up to the checkpoint's, in order."""


@dataclass(frozen=True)
class Outcome:
    """What the same training led to. `difference` names the first tensor that differs; None: all files are equal."""

    iterations: int
    sha256: dict[str, str]
    """Of the recorded weights, by file."""
    difference: str | None


def find_stage(run_folder: Path, name: str | None) -> Recorded:
    """The RL stage `name` of a run, or its only one, with the newest checkpoint it published.

    Raises:
        RecordingInvalid: the folder is not that of a run with such a stage, there is nothing to compare with, rollouts are
            missing, or the starting model has changed.
        CheckpointInvalid: the checkpoint is damaged.
    """
    spec_path = run_folder.parent / "spec.json"
    if not spec_path.exists():
        raise RecordingInvalid(f"expected the folder of an attempt, <runs>/<job>/attempt-<n>, got {run_folder}: no {spec_path}")
    spec: JobSpec = JOB_SPEC.validate_json(spec_path.read_text(encoding="utf-8"))
    stages = [stage for stage in stages_of(spec) if isinstance(stage, RLStage) and name in (None, stage.name)]
    if len(stages) != 1:
        found = ", ".join(stage.name for stage in stages_of(spec) if isinstance(stage, RLStage)) or "none"
        raise RecordingInvalid(f"expected one rl stage{f' called {name!r}' if name else ''}, the job has {found}; name it")
    [stage] = stages
    published = _published(run_folder)
    if stage.name not in published:
        raise RecordingInvalid(
            f"expected a checkpoint of stage {stage.name!r} to compare with, {run_folder} published none; use another attempt"
        )
    checkpoint, model_path = published[stage.name], _model_path(stage.model, published)
    manifest = verify(checkpoint)
    if (identity := manifest.info.identity) is None:
        raise RecordingInvalid(f"expected training state in {checkpoint}, it was saved without; replay a newer run")
    if (found := weights_sha256(model_path)) != identity["model_sha256"]:
        raise RecordingInvalid(
            f"expected the weights that training began with in {model_path}, sha256 over them "
            f"{identity['model_sha256'][:16]}..., got {found[:16]}...; restore them"
        )
    files = recorded_files(run_folder, stage.name)
    if missing := [str(number) for number in range(1, manifest.info.step + 1) if number not in files]:
        raise RecordingInvalid(
            f"expected recorded rollouts of iteration {', '.join(missing)}, there are none; restore the files"
        )
    rollouts = tuple(files[number] for number in range(1, manifest.info.step + 1))
    return Recorded(stage, model_path, checkpoint, manifest, identity, rollouts)


def _published(run_folder: Path) -> dict[str, Path]:
    """Newest checkpoint of each stage, and what gates have promoted, by the events of the run."""
    newest = {}
    for event, _ in read_lines(run_folder / "events.jsonl"):
        if event["kind"] in ("checkpoint", "promoted"):
            newest[event["data"]["stage"]] = Path(event["data"]["path"])
    return newest


def _model_path(ref: ModelRef, published: dict[str, Path]) -> Path:
    if ref.path is not None:
        return Path(ref.path)
    if ref.stage not in published:
        raise RecordingInvalid(f"expected the checkpoint of stage {ref.stage!r} that training began with, the run names none")
    return published[ref.stage]


def replay(recorded: Recorded, work: Path, tell: Callable[[str], None]) -> Outcome:
    """Train again up to the checkpoint's iteration, save into `work`, compare. Needs Ray with room for the stage's ranks.

    Raises:
        RecordingInvalid: rollouts are damaged or those of other settings.
        JobError: as the stage itself raises.
    """
    stage, last = recorded.stage, len(recorded.rollouts)
    with actor_groups([trainer_actors(stage.trainer, PolicyWorker)], "replay") as [trainers]:
        start_policy(trainers, stage, recorded.model_path)
        for iteration, path in enumerate(recorded.rollouts, start=1):
            rollouts = read_rollouts(path)
            check_recorded(rollouts, recorded.identity, path)
            train_on(trainers, stage.grpo, iteration, rollouts.groups)
            tell(f"iteration {iteration}/{last}")
        trainers.call("begin_save", work, timeout_s=SAVE_TIMEOUT_S)
        trainers.call("saved", True, timeout_s=SAVE_TIMEOUT_S)
    saved = [file for file in recorded.manifest.files if file.name.endswith(".safetensors")]
    hashes = {file.name: file.sha256 for file in saved if not is_state_file(file.name)}
    return Outcome(last, hashes, first_difference(recorded.checkpoint, work, saved))


def first_difference(expected: Path, got: Path, files: Sequence[FileRecord]) -> str | None:
    """The first tensor in which the files below `got` differ from the recorded ones, weights before training state."""
    for file in sorted(files, key=lambda file: (is_state_file(file.name), file.name)):
        if not (got / file.name).exists():
            return f"{file.name} is missing"
        if describe(got, file.name).sha256 != file.sha256:
            return f"{file.name}: {_differing_tensor(load_file(expected / file.name), load_file(got / file.name))}"
    return None


def _differing_tensor(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> str:
    if expected.keys() != got.keys():
        return f"{sorted(expected.keys() ^ got.keys())[0]} is in one of them alone"
    for name, tensor in expected.items():
        other = got[name]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{name} is {tuple(other.shape)} {other.dtype}, expected {tuple(tensor.shape)} {tensor.dtype}"
        # As bytes, so that NaN equals itself and 0 does not equal -0.
        if not torch.equal(tensor.flatten().view(torch.uint8), other.flatten().view(torch.uint8)):
            gap = (tensor.double() - other.double()).abs()
            return f"{name} differs in {int((gap > 0).sum())} of {gap.numel()} elements, by {float(gap.max()):.3g} at most"
    return "tensors are equal, the header differs"


@contextmanager
def _cluster(resources: TrainerResources) -> Iterator[None]:
    """A Ray of its own with room for the ranks."""
    num_cpus = max(1, math.ceil(resources.workers * resources.cpus_per_worker))
    with tempfile.TemporaryDirectory(prefix="sedsft-ray-", ignore_cleanup_errors=True) as folder:
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING, _temp_dir=folder)
        try:
            yield
        finally:
            ray.shutdown()


def _tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print whether the weights are equal, or the first tensor that differs; 0 when they are, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m services.replay", description="Train an RL stage again from its recording."
    )
    parser.add_argument("run_folder", type=Path, help="folder of an attempt")
    parser.add_argument("--stage", help="name of the stage, where the job has several of kind rl")
    given = parser.parse_args(arguments)
    try:
        recorded = find_stage(given.run_folder.resolve(), given.stage)
        with tempfile.TemporaryDirectory(prefix="replay-") as work, _cluster(recorded.stage.trainer):
            outcome = replay(recorded, Path(work), _tell)
    except (JobError, ValidationError) as error:
        sys.stderr.write(f"error {error}\n")
        return 1
    if outcome.difference is not None:
        _tell(f"differs from {recorded.checkpoint}: {outcome.difference}")
        return 1
    hashes = "".join(f"\n{digest}  {name}" for name, digest in outcome.sha256.items())
    _tell(f"equal after {outcome.iterations} iterations, weights and training state{hashes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
