"""Weights sent from real DeepSpeed ranks into real vLLM engines, from memory to memory, through vLLM's transfer interface."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sedsft.config import AdamWConfig, DataConfig, GRPOConfig, LoRAConfig, SamplingConfig
from sedsft.records import PolicyRow, Prompt
from services.actor_group import ActorGroup, ActorSpec
from services.jobspec import ModelRef, RLStage, RolloutResources, SyncSettings, TrainerResources
from services.loops.policy_update import trainer_log_probs
from services.loops.ranks import start_ranks, trainer_actors
from services.loops.syncing import policy_sync
from services.placement import actor_groups
from services.rollout.fleet import RolloutFleet, rollout_spec
from services.rollout.health import State
from services.training.messages import PolicySetup
from services.training.policy_worker import PolicyWorker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SYNC = SyncSettings(transport="gloo", bucket_mb=1, load_timeout_s=60)
ENGINES = RolloutResources(workers=2, cpus_per_worker=0.5, max_model_len=256, max_num_seqs=64, restarts=3, sync=SYNC)
PROMPTS = [Prompt(prompt_ids=(1, 3, *range(5 + i, 15 + i)), text="", answer="", line=i + 1) for i in range(8)]
SAMPLING = SamplingConfig(max_tokens=16)


def stage_of(model: Path, **grpo: Any) -> RLStage:
    config = GRPOConfig(
        data=DataConfig(path="unused.jsonl"),
        iterations=1,
        optimizer=AdamWConfig(learning_rate=3e-3, schedule="constant"),
        max_tokens=16,
        **{"precision": "bf16", **grpo},
    )
    trainer = TrainerResources(workers=2, cpus_per_worker=0.5, zero_stage=3)
    return RLStage(model=ModelRef(path=str(model)), grpo=config, trainer=trainer, rollout=ENGINES)


@contextmanager
def trainers_of(stage: RLStage) -> Iterator[ActorGroup]:
    with actor_groups([trainer_actors(stage.trainer, PolicyWorker)], "stream") as [trainers]:
        start_ranks(
            trainers,
            stage.trainer,
            lambda ranks: PolicySetup(ranks, str(stage.model.path), stage.grpo, stage.trainer.zero_stage, 99),
        )
        yield trainers


def train(trainers: ActorGroup, seed: int) -> None:
    """An optimizer step on random rows."""
    rng = np.random.default_rng(seed)
    prompt, shards = np.arange(3, 9, dtype=np.int32), []
    for _ in range(len(trainers)):
        responses = rng.integers(5, 70, (4, 8), dtype=np.int32)
        shards.append([PolicyRow(prompt, ids, np.full(8, -4, np.float32), float(rng.normal())) for ids in responses])
    trainers.scatter("update", [(rows, 64, 1) for rows in shards], timeout_s=100)


def settle(fleet: RolloutFleet, *states: State) -> None:
    deadline = time.monotonic() + 150
    while sorted(state.value for state in fleet.states().values()) != sorted(state.value for state in states):
        assert time.monotonic() < deadline, fleet.states()
        fleet._tend()
        time.sleep(0.1)


def agree(fleet: RolloutFleet, trainers: ActorGroup, version: int) -> float:
    """Mean gap over what the fleet samples now."""
    groups = fleet.generate(PROMPTS * 4, 2, SAMPLING, seed=version, timeout_s=100)
    assert {sample.weight_version for samples in groups for sample in samples} == {version}
    pairs = [(p.prompt_ids, s.response_ids) for p, g in zip(PROMPTS * 4, groups, strict=True) for s in g]
    drawn = np.concatenate([np.array(sample.log_probs) for samples in groups for sample in samples])
    return float(np.abs(drawn - np.concatenate(trainer_log_probs(trainers, pairs))).mean())


@pytest.fixture(scope="module")
def group(spawn: Callable[[ActorSpec], ActorGroup]) -> ActorGroup:
    return spawn(rollout_spec(ENGINES))


@pytest.fixture(scope="module")
def fleet(group: ActorGroup, model_folder: Path) -> Iterator[RolloutFleet]:
    built = RolloutFleet(group, ENGINES)
    built.start(str(model_folder), "bf16")
    built.ready(timeout_s=150)
    yield built
    built.close()
    group.kill()


def test_engines_follow_the_trainers_and_a_lost_one_waits(
    fleet: RolloutFleet, group: ActorGroup, model_folder: Path, tmp_path: Path
) -> None:
    stage = stage_of(model_folder)
    with trainers_of(stage) as trainers:
        sync = policy_sync(stage, tmp_path, fleet, trainers, PROMPTS)
        before = trainer_log_probs(trainers, [((1, 3, 9), tuple(range(20, 30)))])[0]
        for version in (1, 2, 3):
            began = time.monotonic()
            report = sync.push(version)
            print(f"\nsync {version}: {time.monotonic() - began:.2f} s, {report.figures()}")
            assert report.refitted == report.stale == ()
            assert len(report.engines) == 2
            assert agree(fleet, trainers, version) < 0.05
            train(trainers, version)
        # The weights did change, by far more than the bound.
        after = trainer_log_probs(trainers, [((1, 3, 9), tuple(range(20, 30)))])[0]
        assert np.abs(after - before).mean() > 0.3
        assert list(tmp_path.iterdir()) == []
        # Without files an engine that comes late waits for the next sync; the other serves.
        os.kill(group.call_one(0, "engine_pids", timeout_s=30)[0], signal.SIGKILL)
        sync.push(4)
        assert agree(fleet, trainers, 4) < 0.05
        settle(fleet, State.STALE, State.READY)
        assert agree(fleet, trainers, 4) < 0.05
        train(trainers, 4)
        assert len(sync.push(5).engines) == 2
        assert agree(fleet, trainers, 5) < 0.05


def test_an_engine_that_dies_while_it_receives(
    fleet: RolloutFleet, group: ActorGroup, model_folder: Path, tmp_path: Path
) -> None:
    """Nothing is known of the others either: all are started again, within the budget, and get the weights in the same sync."""
    stage = stage_of(model_folder)
    with trainers_of(stage) as trainers:
        sync = policy_sync(stage, tmp_path, fleet, trainers, PROMPTS)
        sync.push(11)
        pid = group.call_one(1, "engine_pids", timeout_s=30)[0]
        os.kill(pid, signal.SIGSTOP)
        # Frozen, it keeps the trainers waiting in the middle of a broadcast; then it is gone.
        threading.Timer(4.0, os.kill, (pid, signal.SIGKILL)).start()
        fleet._kept().confirm = lambda: None  # type: ignore[method-assign]
        began = time.monotonic()
        try:
            report = sync.push(12)
        finally:
            del fleet._kept().confirm  # type: ignore[method-assign]
        print(f"\nsent again after a death on the way: {time.monotonic() - began:.1f} s")
        assert report.engines
        settle(fleet, *[State.READY] * len(report.engines), *[State.STALE] * (2 - len(report.engines)))
        assert agree(fleet, trainers, 12) < 0.05


def test_adapters_are_merged_on_the_way(fleet: RolloutFleet, model_folder: Path, tmp_path: Path) -> None:
    stage = stage_of(model_folder, lora=LoRAConfig(rank=4, alpha=16))
    with trainers_of(stage) as trainers:
        sync = policy_sync(stage, tmp_path, fleet, trainers, PROMPTS)
        for version in (21, 22):
            sync.push(version)
            assert agree(fleet, trainers, version) < 0.05
            train(trainers, version)
        # A transport of files brings the same weights into the same engines.
        files = stage.model_copy(update={"rollout": ENGINES.model_copy(update={"sync": SyncSettings()})})
        policy_sync(files, tmp_path, fleet, trainers, PROMPTS).push(23)
        assert agree(fleet, trainers, 23) < 0.05
