"""Going on where an earlier attempt of the job, or another run of the same stage, left off."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sedsft.data.store import ExampleStore
from sedsft.records import Prompt
from services import checkpoints
from services.checkpoints import (
    MANIFEST,
    CheckpointInfo,
    Manifest,
    check_identity,
    newest_good,
    tokenizer_sha256,
    verify,
    weights_sha256,
)
from services.errors import CheckpointInvalid
from services.jobspec import RLStage, SFTStage
from services.loops.ranks import spec_sha256
from services.run import Run
from services.rundir import attempts_of


def identity_of(stage: SFTStage, model_path: Path, training: ExampleStore, held_out: ExampleStore) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it: settings, rows and tokenizer.

    The settings include ranks, ZeRO stage and precision; when checkpoints are saved and who encodes the rows does not matter.
    With adapters, the weights that they stand on count too, since the training state leaves them out.
    """
    free: dict[str, Any] = {"sft": {"checkpoints", "encode_processes", "resume_from"}, "recovery": True}
    identity = {
        "stage": stage.model_dump(mode="json", exclude=free),
        "data_sha256": training.sha256,
        "held_out_sha256": held_out.sha256,
        "tokenizer_sha256": tokenizer_sha256(model_path),
    }
    return identity if stage.sft.lora is None else identity | {"model_sha256": weights_sha256(model_path)}


def policy_identity_of(stage: RLStage, model_path: Path, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What must not change between recorded rollouts or a checkpoint of an RL stage and the run that goes on from them.

    How many engines and scorers there are does not matter. The model does: rollouts of the first iterations are its own.
    """
    rows = "\n".join(json.dumps(asdict(prompt), sort_keys=True) for prompt in prompts)
    free: dict[str, Any] = {"grpo": {"checkpoints", "ledger"}, "rollout": True, "scorer": True, "recovery": True}
    return {
        "stage": stage.model_dump(mode="json", exclude=free),
        "data_sha256": hashlib.sha256(rows.encode()).hexdigest(),
        "tokenizer_sha256": tokenizer_sha256(model_path),
        "model_sha256": weights_sha256(model_path),
    }


def resume_point(run: Run, stage: SFTStage | RLStage, identity: dict[str, Any]) -> tuple[Path, CheckpointInfo] | None:
    """The verified checkpoint that the stage goes on from; None where it starts from its model.

    Earlier attempts of this job come before an SFT stage's `resume_from`. Broken checkpoints on the way are reported as events,
    and removed where this attempt has saved them: their steps are trained and saved again.

    Raises:
        CheckpointInvalid: there is a history and nothing good in it, or it belongs to other settings.
    """
    found = _newest(run, stage)
    step = 0 if found is None else found[1].info.step
    for newer, broken in checkpoints.steps_below(run.folder / "stages" / stage.name / "checkpoints").items():
        if newer > step:
            checkpoints.remove(broken)
            run.removed(broken)
    if found is None:
        return None
    path, manifest = found
    check_identity(manifest, identity, path)
    return path, replace(manifest.info, spec_sha256=spec_sha256(run))


def _newest(run: Run, stage: SFTStage | RLStage) -> tuple[Path, Manifest] | None:
    def report(path: Path, error: CheckpointInvalid) -> None:
        run.event("checkpoint_broken", error.message, path=str(path))

    attempts = attempts_of(run.folder)
    found = newest_good([attempt / "stages" / stage.name / "checkpoints" for attempt in attempts], report)
    if found is not None or isinstance(stage, RLStage) or stage.sft.resume_from is None:
        return found
    source = Path(stage.sft.resume_from)
    if (source / MANIFEST).exists():
        return source, verify(source)
    found = newest_good([source], report)
    if found is None:
        raise CheckpointInvalid(
            f"expected a checkpoint in {source}, got none; give a folder step-<n> with {MANIFEST} or the folder of such folders"
        )
    return found
