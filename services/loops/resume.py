"""Going on where an earlier attempt of the job, or another run of the same stage, left off."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sedsft.records import Example
from services.checkpoints import (
    MANIFEST,
    CheckpointInfo,
    Manifest,
    check_identity,
    newest_good,
    tokenizer_sha256,
    verify,
)
from services.errors import CheckpointInvalid
from services.jobspec import SFTStage
from services.loops.ranks import spec_sha256
from services.run import Run


def identity_of(stage: SFTStage, model_path: Path, training: Sequence[Example], held_out: Sequence[Example]) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it: settings, rows and tokenizer.

    The settings include ranks, ZeRO stage and precision; when checkpoints are saved does not matter.
    """
    return {
        "stage": stage.model_dump(mode="json", exclude={"sft": {"checkpoints", "resume_from"}}),
        "data_sha256": _rows_sha256(training),
        "held_out_sha256": _rows_sha256(held_out),
        "tokenizer_sha256": tokenizer_sha256(model_path),
    }


def _rows_sha256(examples: Sequence[Example]) -> str:
    """Hash over tokens and loss masks of all rows, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids_T).to_bytes(8, "little"))
        digest.update(example.input_ids_T.astype("<i8").tobytes())
        digest.update(example.trained_T.astype("u1").tobytes())
    return digest.hexdigest()


def resume_point(run: Run, stage: SFTStage, identity: dict[str, Any]) -> tuple[Path, CheckpointInfo] | None:
    """The verified checkpoint that the stage goes on from; None where it starts from its model.

    Earlier attempts of this job come before `resume_from`. Broken checkpoints on the way are reported as events.

    Raises:
        CheckpointInvalid: there is a history and nothing good in it, or it belongs to other settings.
    """
    found = _newest(run, stage)
    if found is None:
        return None
    path, manifest = found
    check_identity(manifest, identity, path)
    run.event("resumed", f"going on behind step {manifest.info.step} of {path}", path=str(path), step=manifest.info.step)
    return path, replace(manifest.info, spec_sha256=spec_sha256(run))


def _newest(run: Run, stage: SFTStage) -> tuple[Path, Manifest] | None:
    def report(path: Path, error: CheckpointInvalid) -> None:
        run.event("checkpoint_broken", error.message, path=str(path))

    attempts = sorted(run.folder.parent.glob("attempt-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    found = newest_good([attempt / "stages" / stage.name / "checkpoints" for attempt in attempts], report)
    if found is not None or stage.sft.resume_from is None:
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
