"""A Ray cluster of this process and two engines on a random tiny Llama, shared by the tests of one file.

Not by all files: other rooms start clusters of their own in the same process.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from services.actor_group import ActorGroup, ActorSpec
from services.jobspec import RolloutResources
from services.placement import reserve_member
from services.rollout.fleet import RolloutFleet, rollout_spec
from services.rollout.transport import WeightLoad
from tests.services.tiny_llama import save_tiny_llama

RESOURCES = RolloutResources(workers=2, cpus_per_worker=0.5, max_model_len=256, max_num_seqs=64)


def serve(fleet: RolloutFleet, folder: Path, version: int = 0) -> None:
    """Load weights and take them for verified."""
    with fleet.exclusive():
        for engine in fleet.load_weights(WeightLoad.of_files(folder, version), timeout_s=60):
            fleet.judge(engine, agrees=True)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ro-", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=8, include_dashboard=False, _temp_dir=folder, log_to_driver=False, object_store_memory=200 << 20)
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def spawn(ray_cluster: None) -> Callable[[ActorSpec], ActorGroup]:
    numbers = itertools.count()

    def build(spec: ActorSpec) -> ActorGroup:
        # Ray frees the name of a killed actor a little later.
        spec = replace(spec, role=f"{spec.role}-{next(numbers)}")
        group = ActorGroup(spec, None, 0)
        for _ in range(spec.count):
            group.add(reserve_member(spec))
        return group

    return build


@pytest.fixture(scope="module")
def fleet(spawn: Callable[[ActorSpec], ActorGroup], model_folder: Path) -> Iterator[RolloutFleet]:
    group = spawn(rollout_spec(RESOURCES))
    built = RolloutFleet(group, RESOURCES)
    built.start(str(model_folder), "bf16")
    built.ready(timeout_s=150)
    serve(built, model_folder)
    yield built
    built.close()
    group.kill()
