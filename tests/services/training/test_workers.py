"""Both workers as Ray actors, the way a loop drives them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from sedsft.config import AdamWConfig, CEObjective, DataConfig, GRPOConfig, SFTConfig
from sedsft.records import Example, PolicyRow
from services import checkpoints
from services.actor_group import ActorGroup, ActorSpec
from services.checkpoints import CheckpointInfo
from services.errors import ModelError
from services.placement import actor_groups
from services.training.messages import PolicySetup, SFTSetup
from services.training.policy_worker import PolicyWorker
from services.training.ranks import RankSetup, trainer_env
from services.training.sft_worker import SFTWorker
from tests.services.local_ray import local_ray
from tests.services.tiny_llama import save_tiny_llama

TIMEOUT_S = 120.0
DATA = DataConfig(path="unused.jsonl")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray():
        yield


def ranks_of(group: ActorGroup) -> list[RankSetup]:
    host, port = group.call_one(0, "address", timeout_s=TIMEOUT_S)
    return [RankSetup(rank, len(group), host, port) for rank in range(len(group))]


def actors(worker: type) -> list[ActorSpec]:
    return [ActorSpec("trainer", worker, count=2, cpus=1, env=trainer_env(gpu=False, threads=1))]


@pytest.mark.slow
def test_fine_tuning_learns_and_publishes(cluster: None, tmp_path: Path) -> None:
    model = str(save_tiny_llama(tmp_path / "model"))
    optimizer = AdamWConfig(learning_rate=5e-3)
    config = SFTConfig(objective=CEObjective(), data=DATA, steps=8, optimizer=optimizer, micro_batch_size=2)
    ids = np.random.default_rng(0).integers(5, 72, (5, 8), dtype=np.int32)
    examples = [Example(row, np.arange(8) > 3, line) for line, row in enumerate(ids)]
    with actor_groups(actors(SFTWorker), "sft") as [group]:
        setups = [(SFTSetup(ranks, model, config, 2, 8),) for ranks in ranks_of(group)]
        group.scatter("setup", setups, timeout_s=TIMEOUT_S)
        shards = [examples[rank::2] for rank in range(2)]
        sketches = group.scatter("mass_sketch", [(s, 2) for s in shards], timeout_s=TIMEOUT_S)
        assert [sketch.num_tokens for sketch in sketches] == [12, 8]
        losses = []
        for step in range(1, 9):
            scattered = group.scatter("train_step", [(s, 20, None, step) for s in shards], timeout_s=TIMEOUT_S)
            found = [figures for figures, _ in scattered]
            losses.append(sum(rank["loss"] for rank in found) / 20)
            assert sum(rank["tokens"] for rank in found) == 20
            assert sum(rank["extra"] for rank in found) == 0
        assert losses[-1] < 0.2 * losses[0]
        writing = checkpoints.begin(tmp_path / "checkpoints", 8, attempt=1)
        group.call("begin_save", writing, timeout_s=TIMEOUT_S)
        files = [file for rank in group.call("saved", True, timeout_s=TIMEOUT_S) for file in rank]
        record = checkpoints.publish(writing, files, CheckpointInfo("sft", 8, "0" * 64, consumed_samples=40))
    checkpoints.verify(Path(record.path))
    AutoModelForCausalLM.from_pretrained(record.path)


@pytest.mark.slow
def test_policy_moves_towards_rewarded_responses(cluster: None, tmp_path: Path) -> None:
    model = str(save_tiny_llama(tmp_path / "model"))
    config = GRPOConfig(data=DATA, iterations=1, optimizer=AdamWConfig(learning_rate=1e-3, schedule="constant"))
    pairs = [((1, 3, 20 + i), tuple(range(30 + i, 36 + i))) for i in range(4)]
    with actor_groups(actors(PolicyWorker), "rl") as [group]:
        setups = [(PolicySetup(ranks, model, config, 3, 2),) for ranks in ranks_of(group)]
        group.scatter("setup", setups, timeout_s=TIMEOUT_S)
        before = group.scatter("log_probs", [(pairs[:3],), (pairs[3:],)], timeout_s=TIMEOUT_S)
        flat = [*before[0], *before[1]]
        rows = [
            PolicyRow(np.array(prompt, np.int32), np.array(response, np.int32), flat[i], 1.0 if i % 2 else -1.0)
            for i, (prompt, response) in enumerate(pairs)
        ]
        found = group.scatter("update", [(rows[:3], 24, 1), (rows[3:], 24, 1)], timeout_s=TIMEOUT_S)
        # The weights are those that gave the old log-probabilities: there is no gap and nothing is clipped.
        assert sum(rank["tokens"] for rank in found) == 24
        assert sum(rank["clipped"] for rank in found) == 0
        assert sum(rank["logprob_gap"] for rank in found) == pytest.approx(0, abs=1e-4)
        assert sum(rank["loss"] for rank in found) == pytest.approx(0, abs=1e-4)
        after = group.call("log_probs", pairs, timeout_s=TIMEOUT_S)
        for i, (new, old) in enumerate(zip(after[0], flat, strict=True)):
            assert (new.sum() > old.sum()) == bool(i % 2)
        group.call("export_weights", tmp_path / "sync", timeout_s=TIMEOUT_S)
    AutoModelForCausalLM.from_pretrained(tmp_path / "sync")


@pytest.mark.slow
def test_a_folder_without_weights_is_a_model_error(cluster: None, tmp_path: Path) -> None:
    config = SFTConfig(objective=CEObjective(), data=DATA, steps=1)
    with actor_groups(actors(SFTWorker), "sft") as [group]:
        setups = [(SFTSetup(ranks, str(tmp_path), config, 0, 1),) for ranks in ranks_of(group)]
        with pytest.raises(ModelError, match="expected a model folder"):
            group.scatter("setup", setups, timeout_s=TIMEOUT_S)
