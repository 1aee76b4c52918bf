"""What the SFT and the RL loop share about trainer ranks: spawning, meeting, merging figures, saving."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from services import checkpoints
from services.actor_group import ActorGroup, ActorSpec
from services.checkpoints import CheckpointInfo, FileRecord
from services.jobspec import TrainerResources
from services.run import Run
from services.training.messages import PolicySetup, SFTSetup
from services.training.ranks import RankSetup, trainer_env

SETUP_TIMEOUT_S = 1800.0
"""Loading a large model from shared storage, and on a fresh machine DeepSpeed's compiler."""
STEP_TIMEOUT_S = 1800.0
SAVE_TIMEOUT_S = 3600.0

MODEL_CARD = "README.md"

SAME_ON_ALL_RANKS = ("grad_norm", "learning_rate")


def trainer_actors(resources: TrainerResources, worker: type[Any]) -> ActorSpec:
    """Actors named trainer-0, trainer-1, ... that run `worker`."""
    env = trainer_env(gpu=resources.gpus_per_worker > 0, threads=_threads(resources))
    return ActorSpec("trainer", worker, resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, env=env)


def start_ranks(
    trainers: ActorGroup, resources: TrainerResources, setup: Callable[[RankSetup], SFTSetup | PolicySetup]
) -> None:
    """Let rank 0 offer an address, then open the model on all ranks at once."""
    host, port = trainers.call_one(0, "address", timeout_s=SETUP_TIMEOUT_S)
    ranks = [
        RankSetup(rank, len(trainers), host, port, gpu=resources.gpus_per_worker > 0, threads=_threads(resources))
        for rank in range(len(trainers))
    ]
    trainers.scatter("setup", [(setup(rank),) for rank in ranks], timeout_s=SETUP_TIMEOUT_S)


def _threads(resources: TrainerResources) -> int:
    return max(1, math.floor(resources.cpus_per_worker))


def merge_sums(per_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    """Add what ranks summed over their own tokens; gradient norm and learning rate are the same on all of them."""
    first = per_rank[0]
    return {name: first[name] if name in SAME_ON_ALL_RANKS else sum(rank[name] for rank in per_rank) for name in first}


def publish_files(run: Run, writing: Path, files: Sequence[FileRecord], info: CheckpointInfo, card: str) -> None:
    """Make what all ranks wrote into `writing`, with the model card `card`, a visible checkpoint."""
    (writing / MODEL_CARD).write_text(card, encoding="utf-8")
    run.published(checkpoints.publish(writing, [*files, checkpoints.on_disk(writing, MODEL_CARD)], info))


def prune(run: Run, folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of this attempt below the stage's `folder`."""
    for removed in checkpoints.prune(folder / "checkpoints", keep):
        run.removed(removed)


def spec_sha256(run: Run) -> str:
    """Hash of the resolved spec, which a checkpoint carries."""
    return hashlib.sha256((run.folder.parent / "spec.json").read_bytes()).hexdigest()
