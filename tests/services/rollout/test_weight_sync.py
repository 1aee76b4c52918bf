"""Verified weight sync: a good one passes, a stale lm_head and a wrong trainer are caught."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle

from sedsft.config import SamplingConfig
from sedsft.records import Prompt
from services.actor_group import ActorGroup, ActorSpec
from services.errors import WeightSyncMismatch, WorkerDied
from services.jobspec import RolloutResources
from services.rollout.fleet import RolloutFleet, rollout_spec
from services.rollout.health import State
from services.rollout.transport import FileTransport
from services.rollout.weight_sync import Pair, Probe, WeightSync
from services.rollout.worker import RolloutSetup, RolloutWorker
from tests.services.rollout.stale_extension import STALE_FROM
from tests.services.tiny_llama import random_llama, save_tiny_llama

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# Ray workers cannot import this file: the test's worker class travels by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROOT = Path(__file__).parents[3]
ONE = RolloutResources(workers=1, cpus_per_worker=0.5, max_model_len=256, max_num_seqs=64)
PROBE = Probe(
    prompts=[Prompt(prompt_ids=(1, 3, *range(5 + i, 15 + i)), text="", answer="", line=i + 1) for i in range(8)],
    sampling=SamplingConfig(temperature=1.0, max_tokens=64),
    seed=11,
)


class StaleHeadWorker(RolloutWorker):
    """Loads weights as vLLM's own `reload_weights` does: without the lm_head's packed copy. `fix_at` calls repair it."""

    loads = 0
    fix_at = 1_000

    async def load_weights(self, folder: str, version: int) -> int:
        self.loads += 1
        if self.loads >= self.fix_at:
            return await super().load_weights(folder, version)
        await self._started()._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        self._version = version
        return version


class RepairedWorker(StaleHeadWorker):
    fix_at = 2


class PlantedWorker(RolloutWorker):
    """Its engine forgets the lm_head's packed copy from version `stale_extension.STALE_FROM` on."""

    async def start(self, setup: RolloutSetup) -> int:
        engine = importlib.import_module("services.rollout.engine")
        args_of = engine._engine_args

        def planted(setup: RolloutSetup) -> Any:
            args = args_of(setup)
            args.worker_extension_cls = "tests.services.rollout.stale_extension.StaleHead"
            return args

        engine._engine_args = planted
        return await super().start(setup)


def trainer_of(seed: int, *, tied: bool = True) -> tuple[Callable[[Path], None], Callable[[list[Pair]], list[np.ndarray]]]:
    """Export and log-probabilities (temperature 1) of the random model of this seed."""
    model = random_llama(seed, tied=tied)

    def log_probs(pairs: list[Pair]) -> list[np.ndarray]:
        found = []
        for prompt_ids, response_ids in pairs:
            with torch.no_grad():
                logits_TV = model(torch.tensor([[*prompt_ids, *response_ids]])).logits[0].float()
            rows_RV = logits_TV[len(prompt_ids) - 1 : -1].log_softmax(-1)
            found.append(rows_RV.gather(1, torch.tensor(response_ids)[:, None])[:, 0].numpy())
        return found

    return lambda folder: model.save_pretrained(folder), log_probs


@pytest.fixture(scope="module")
def one_engine(
    request: pytest.FixtureRequest, spawn: Callable[[ActorSpec], ActorGroup], model_folder: Path
) -> Iterator[RolloutFleet]:
    group = spawn(replace(rollout_spec(ONE), worker=request.param))
    fleet = RolloutFleet(group, ONE)
    fleet.start(str(model_folder), "bf16")
    fleet.ready(timeout_s=150)
    yield fleet
    fleet.close()
    group.kill()


def test_push_is_verified_and_keeps_one_folder_for_refits(fleet: RolloutFleet, tmp_path: Path) -> None:
    for version, seed in ((0, 0), (1, 3), (2, 4)):
        export, log_probs = trainer_of(seed)
        report = WeightSync(fleet, FileTransport(export, tmp_path), log_probs, PROBE, 0.05).push(version)
        assert report.version == version
        assert report.refitted == ()
        assert [gap.engine for gap in report.engines] == [0, 1]
        assert report.mean_gap <= max(gap.mean for gap in report.engines) <= 0.05
        assert report.max_gap == max(gap.largest for gap in report.engines)
        assert report.mean_gap <= report.max_gap
        assert [folder.name for folder in tmp_path.iterdir()] == [f"weights-{version}"]
        [group] = fleet.generate(PROBE.prompts[:1], 2, PROBE.sampling, seed=0, timeout_s=60)
        assert {sample.weight_version for sample in group} == {version}


def test_wrong_trainer_log_probs_are_caught(fleet: RolloutFleet, tmp_path: Path) -> None:
    export, _ = trainer_of(3)
    _, other_log_probs = trainer_of(4)
    with pytest.raises(WeightSyncMismatch, match=r"version 7 to differ by at most 0.05 on average, got rollout-0 mean \d"):
        WeightSync(fleet, FileTransport(export, tmp_path), other_log_probs, PROBE, 0.05).push(7)
    assert list(tmp_path.iterdir()) == []


def test_log_probs_that_are_not_numbers_are_caught(fleet: RolloutFleet, tmp_path: Path) -> None:
    export, log_probs = trainer_of(3)
    with pytest.raises(WeightSyncMismatch, match="mean nan"):
        WeightSync(
            fleet, FileTransport(export, tmp_path), lambda pairs: [p * np.nan for p in log_probs(pairs)], PROBE, 0.05
        ).push(8)


@pytest.mark.parametrize("one_engine", [StaleHeadWorker], indirect=True)
def test_stale_lm_head_is_caught(one_engine: RolloutFleet, tmp_path: Path) -> None:
    export, log_probs = trainer_of(5)
    with pytest.raises(WeightSyncMismatch, match="rollout-0 mean"):
        WeightSync(one_engine, FileTransport(export, tmp_path), log_probs, PROBE, 0.05).push(1)


@pytest.mark.parametrize("one_engine", [RepairedWorker], indirect=True)
def test_one_refit_repairs(one_engine: RolloutFleet, tmp_path: Path) -> None:
    export, log_probs = trainer_of(5)
    report = WeightSync(one_engine, FileTransport(export, tmp_path), log_probs, PROBE, 0.05).push(1)
    assert report.refitted == (0,)
    assert report.mean_gap <= 0.05


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_head_that_goes_stale_is_caught_at_the_next_sync(
    spawn: Callable[[ActorSpec], ActorGroup], tmp_path: Path, tied: bool
) -> None:
    model = save_tiny_llama(tmp_path / "model", tied=tied)
    spec = rollout_spec(ONE)
    group = spawn(replace(spec, worker=PlantedWorker, env={**spec.env, "PYTHONPATH": str(ROOT)}))
    events: list[tuple[str, str]] = []
    fleet = RolloutFleet(group, ONE, lambda kind, message, /, **_: events.append((kind, message)))
    fleet.start(str(model), "bf16")
    fleet.ready(timeout_s=150)
    for version in range(1, STALE_FROM):
        export, log_probs = trainer_of(version, tied=tied)
        report = WeightSync(fleet, FileTransport(export, tmp_path), log_probs, PROBE, 0.05).push(version)
        assert report.refitted == ()
        assert report.mean_gap <= 0.05
    export, log_probs = trainer_of(STALE_FROM, tied=tied)
    figures = r"at most 0.05 on average, got rollout-0 mean \d+\.\d+, largest \d+\.\d+ over \d+ tokens, also after a second"
    with pytest.raises(WeightSyncMismatch, match=figures) as caught:
        WeightSync(fleet, FileTransport(export, tmp_path), log_probs, PROBE, 0.05).push(STALE_FROM)
    print(f"\n{'tied' if tied else 'untied'}: {caught.value.message}")
    assert fleet.states() == {0: State.STALE}
    with pytest.raises(WorkerDied, match="no engine holds verified weights"):
        fleet.generate(PROBE.prompts, 1, PROBE.sampling, seed=0, timeout_s=60)
    fleet.close()
    group.kill()
