"""Saving beside training: what is published when, and what a death or a full disk leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from services import checkpoints
from services.actor_group import ActorGroup, ActorSpec
from services.checkpoints import CheckpointInfo, newest_good, verify
from services.errors import WorkerDied
from services.loops.saving import CheckpointSaver
from services.placement import actor_groups
from services.run import Run
from tests.services.local_ray import local_ray
from tests.services.loops.poisoned_worker import SlowWriter
from tests.services.loops.test_sft import attempt, events, make_spec

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CARD = "---\ntags: []\n---\n"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray():
        yield


@pytest.fixture
def group(cluster: None) -> Iterator[ActorGroup]:
    with actor_groups([ActorSpec("writer", SlowWriter, count=2, cpus=1)], "saving") as [group]:
        yield group


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = attempt(tmp_path / "job", 1, make_spec(tmp_path))
    yield run
    run.finish("succeeded", None)


def info(step: int) -> CheckpointInfo:
    return CheckpointInfo("sft", step, "0" * 64, step)


def test_training_goes_on_while_files_are_written(group: ActorGroup, run: Run, tmp_path: Path) -> None:
    root = tmp_path / "stage" / "checkpoints"
    saver = CheckpointSaver(run, group, tmp_path / "stage", keep=2)
    saver.poll()
    saver.wait()
    assert saver.begin(info(1), CARD) >= 0
    for value in range(3):
        assert group.call("echo", value, timeout_s=60) == [value, value]
        saver.poll()
        assert newest_good([root], pytest.fail) is None
    assert [path.name for path in root.iterdir()] == ["step-1.tmp-1"]
    (root / "go").touch()
    # The next save first waits for this one.
    saver.begin(info(2), CARD)
    assert [record.step for record in run.checkpoints] == [1]
    assert (root / "step-1" / "README.md").read_text() == CARD
    assert [file.name for file in verify(root / "step-1").files] == ["README.md", "rank-0.json", "rank-1.json"]
    while not run.checkpoints[1:]:
        saver.poll()
    saver.begin(info(3), CARD)
    saver.wait()
    assert sorted(checkpoints.steps_below(root)) == [2, 3]
    assert events(run, "checkpoint_removed") == [{"path": str(root / "step-1")}]
    assert (root / "latest").read_text() == "step-3"


def test_a_full_disk_fails_the_stage_and_leaves_the_checkpoint_before(group: ActorGroup, run: Run, tmp_path: Path) -> None:
    root = tmp_path / "stage" / "checkpoints"
    saver = CheckpointSaver(run, group, tmp_path / "stage", keep=2)
    root.mkdir(parents=True)
    (root / "go").touch()
    saver.begin(info(1), CARD)
    saver.wait()
    (root / "full").touch()
    saver.begin(info(2), CARD)
    with pytest.raises(OSError, match="No space left on device"):
        saver.wait()
    found = newest_good([root], pytest.fail)
    assert found is not None
    assert found[0] == root / "step-1"


def test_a_rank_that_dies_while_it_writes_leaves_a_folder_that_nobody_reads(
    group: ActorGroup, run: Run, tmp_path: Path
) -> None:
    root = tmp_path / "stage" / "checkpoints"
    saver = CheckpointSaver(run, group, tmp_path / "stage", keep=2)
    saver.begin(info(1), CARD)
    ray.kill(group.actors[1])
    with pytest.raises(WorkerDied, match="writer-1"):
        saver.poll()
    assert newest_good([root], pytest.fail) is None
    assert [path.name for path in root.iterdir()] == ["step-1.tmp-1"]


def test_a_driver_that_dies_before_it_publishes_leaves_no_checkpoint(group: ActorGroup, run: Run, tmp_path: Path) -> None:
    root = tmp_path / "stage" / "checkpoints"
    saver = CheckpointSaver(run, group, tmp_path / "stage", keep=2)
    saver.begin(info(1), CARD)
    (root / "go").touch()
    assert all(group.call("saved", True, timeout_s=60))
    assert newest_good([root], pytest.fail) is None
    # Whoever comes next writes the step anew, into an empty folder.
    again = CheckpointSaver(run, group, tmp_path / "stage", keep=2)
    again.begin(info(1), CARD)
    again.wait()
    verify(root / "step-1")
