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
from ray.util.placement_group import placement_group

from services.actor_group import ActorGroup, ActorSpec
from services.jobspec import RolloutResources
from services.rollout.fleet import RolloutFleet, rollout_spec
from tests.services.tiny_llama import save_tiny_llama

RESOURCES = RolloutResources(workers=2, cpus_per_worker=0.5, max_model_len=256, max_num_seqs=64)


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
        bundles = [{"CPU": spec.cpus}] * spec.count
        placement = placement_group(bundles)
        ray.get(placement.ready(), timeout=30)
        return ActorGroup(spec, placement, 0)

    return build


@pytest.fixture(scope="module")
def fleet(spawn: Callable[[ActorSpec], ActorGroup], model_folder: Path) -> Iterator[RolloutFleet]:
    group = spawn(rollout_spec(RESOURCES))
    built = RolloutFleet(group, RESOURCES)
    built.start(str(model_folder), "bf16")
    built.ready(timeout_s=150)
    yield built
    group.kill()
