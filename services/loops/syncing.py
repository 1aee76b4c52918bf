"""The policy's way into the engines: what the trainers of an RL stage write or send, and what the probe compares."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sedsft.config import SamplingConfig
from sedsft.records import Prompt
from services.actor_group import ActorGroup
from services.jobspec import RLStage
from services.loops.policy_update import trainer_log_probs
from services.rollout.fleet import RolloutFleet
from services.rollout.transport import FileTransport, StreamTransport, Transport
from services.rollout.weight_sync import Probe, WeightSync


def policy_sync(
    stage: RLStage, folder: Path, fleet: RolloutFleet, trainers: ActorGroup, prompts: Sequence[Prompt]
) -> WeightSync:
    """Tie the trainers of `stage`, whose folder is `folder`, to the engines."""
    config = stage.grpo
    # The whole distribution, as rollouts are drawn.
    whole = SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)
    scored = partial(trainer_log_probs, trainers, timeout_s=stage.rollout.sync.probe_timeout_s)
    probe = Probe(prompts[: config.probe_prompts], whole, config.seed)
    return WeightSync(fleet, _transport(stage, folder, trainers), scored, probe, config.max_logprob_gap)


def _transport(stage: RLStage, folder: Path, trainers: ActorGroup) -> Transport:
    settings, backend = stage.rollout.sync, stage.transfer_backend
    if backend is not None:
        return StreamTransport(trainers, backend, settings)

    def write(target: Path) -> None:
        trainers.call("export_weights", target, settings.bucket_mb << 20, timeout_s=settings.export_timeout_s)

    return FileTransport(write, folder / "weights")
