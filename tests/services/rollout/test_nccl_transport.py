"""Weights sent from GPU to GPU: the same as over gloo, with vLLM's own NCCL engine. Needs two CUDA devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sedsft.config import LoRAConfig
from services.actor_group import ActorGroup, ActorSpec
from services.jobspec import RolloutResources, SyncSettings
from services.loops.syncing import policy_sync
from services.rollout.fleet import RolloutFleet, rollout_spec
from tests.services.rollout.test_weight_stream import PROMPTS, agree, stage_of, train, trainers_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two CUDA devices are needed"),
]

ENGINE = RolloutResources(
    gpus_per_worker=1, max_model_len=256, max_num_seqs=64, gpu_memory_utilization=0.3, sync=SyncSettings(bucket_mb=1)
)
ADAPTERS: dict[str, Any] = {"lora": LoRAConfig(rank=4, alpha=16)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_engine_follows_the_trainer(
    spawn: Callable[[ActorSpec], ActorGroup], model_folder: Path, tmp_path: Path, precision: str
) -> None:
    group = spawn(rollout_spec(ENGINE))
    fleet = RolloutFleet(group, ENGINE)
    fleet.start(str(model_folder), "fp32" if precision == "fp32" else "bf16")
    fleet.ready(timeout_s=300)
    version = 0
    for zero_stage in range(4):
        for grpo in ({}, ADAPTERS):
            stage = stage_of(model_folder, precision=precision, **grpo)
            trainer = stage.trainer.model_copy(update={"workers": 1, "gpus_per_worker": 1, "zero_stage": zero_stage})
            stage = stage.model_copy(update={"trainer": trainer, "rollout": ENGINE})
            assert stage.transfer_backend == "nccl"
            with trainers_of(stage) as trainers:
                sync = policy_sync(stage, tmp_path, fleet, trainers, PROMPTS)
                for _ in range(3):
                    version += 1
                    report = sync.push(version)
                    assert report.refitted == report.stale == ()
                    assert agree(fleet, trainers, version) < 0.05
                    train(trainers, version)
    assert list(tmp_path.iterdir()) == []
    fleet.close()
    group.kill()
