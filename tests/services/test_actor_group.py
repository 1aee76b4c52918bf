"""Groups of real Ray actors: deaths are named, also when a peer complains first."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray

from services.actor_group import ActorGroup, ActorSpec, check_groups, tend_while_waiting
from services.errors import DataError, PhaseTimeout, ResourceError, WorkerDied
from services.placement import actor_groups, reserve_member


class Echo:
    """Answers, sleeps, complains or dies on demand."""

    def __init__(self, index: int) -> None:
        self.index = index

    def pid(self) -> int:
        return os.getpid()

    def add(self, number: int) -> int:
        return self.index + number

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def refuse(self) -> None:
        raise DataError("expected a, got b; do c")

    def die_or_complain(self) -> None:
        """Member 1 dies a moment after member 0 reports the broken connection, as in a collective."""
        if self.index == 0:
            raise RuntimeError("Connection closed by peer")
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:
        ray.init(num_cpus=2, include_dashboard=False, namespace="test", _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture
def group(cluster: None) -> Iterator[ActorGroup]:
    with actor_groups([ActorSpec("echo", Echo, 2, 0.5)], "job") as [group]:
        yield group


def test_calls_keep_member_order(group: ActorGroup) -> None:
    assert group.call("add", 10, timeout_s=60) == [10, 11]
    assert group.scatter("add", [(1,), (5,)], timeout_s=60) == [1, 6]
    assert group.call_one(1, "add", 1, timeout_s=60) == 2
    assert ray.get_actor("echo-1") is not None


def test_a_job_error_arrives_as_itself(group: ActorGroup) -> None:
    with pytest.raises(DataError, match="expected a, got b; do c"):
        group.call("refuse", timeout_s=60)


def test_a_killed_member_is_named_at_once(group: ActorGroup) -> None:
    pid = group.call_one(1, "pid", timeout_s=60)
    started = time.monotonic()
    refs = [group.start(index, "sleep", 60) for index in range(2)]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match="echo-1"):
        group.wait(refs, [0, 1], "sleep", 60)
    assert time.monotonic() - started < 30


def test_a_death_is_named_before_the_complaint_it_causes(group: ActorGroup) -> None:
    with pytest.raises(WorkerDied, match="echo-1"):
        group.call("die_or_complain", timeout_s=60)


def test_a_late_member_is_named(group: ActorGroup) -> None:
    with pytest.raises(PhaseTimeout, match="echo-0, echo-1 did not answer"):
        group.call("sleep", 5, timeout_s=0.5)


def test_a_death_in_a_group_that_nobody_waits_for_is_noticed(group: ActorGroup) -> None:
    with actor_groups([ActorSpec("other", Echo, 1, 0.5)], "job") as [other]:
        os.kill(other.call_one(0, "pid", timeout_s=60), signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(WorkerDied, match="other-0 to answer a sign of life"):
            group.call("sleep", 40, timeout_s=60)
        assert time.monotonic() - started < 20


def test_the_block_ends_every_process(cluster: None) -> None:
    with actor_groups([ActorSpec("echo", Echo, 2, 0.5)], "job") as [group]:
        pids = group.call("pid", timeout_s=60)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_what_the_cluster_never_has_is_refused_with_the_numbers(cluster: None) -> None:
    spec = ActorSpec("trainer", Echo, 3, 1.0)
    with pytest.raises(ResourceError, match="at most 2 CPU in the cluster, the stage asks for 3"), actor_groups([spec], "job"):
        pass


def test_members_of_an_elastic_group_come_and_go_one_by_one(cluster: None) -> None:
    spec = ActorSpec("echo", Echo, 2, 0.5, elastic=True)
    with actor_groups([spec], "job") as [group]:
        assert group.call("add", 10, timeout_s=60) == [10, 11]
        pid = group.call_one(1, "pid", timeout_s=60)
        # Frozen processes hold what is reserved for them until they are ended.
        os.kill(pid, signal.SIGSTOP)
        group.end(1)
        group.replace(1)
        assert group.call_one(1, "add", 1, timeout_s=60) == 2
        assert group.call_one(1, "pid", timeout_s=60) != pid
        assert ray.get_actor("echo-1.1") is not None
        group.add(reserve_member(spec))
        group.add(reserve_member(spec))
        assert group.call("add", 10, timeout_s=60) == [10, 11, 12, 13]
        group.remove(2)
        group.remove(0)
        # Half of the two cores is free again, which a fifth member needs.
        group.add(reserve_member(spec))
        assert group.call_one(4, "add", 10, timeout_s=60) == 14
        os.kill(group.call_one(1, "pid", timeout_s=60), signal.SIGKILL)
        time.sleep(0.5)
        check_groups()
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 2


def test_what_tends_is_called_while_somebody_waits(group: ActorGroup) -> None:
    called: list[float] = []
    end = tend_while_waiting(lambda: called.append(time.monotonic()))
    group.call("sleep", 5, timeout_s=60)
    end()
    count = len(called)
    assert count >= 2
    group.call("sleep", 2.5, timeout_s=60)
    assert len(called) == count


def test_a_timeout_saves_the_stacks_of_those_that_are_late(cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    with actor_groups([ActorSpec("stuck", Echo, 2, 0.5)], "job") as [group]:
        group.call("add", 1, timeout_s=60)
        calls = [group.start(0, "add", 1), group.start(1, "sleep", 60)]
        with pytest.raises(PhaseTimeout, match="stuck-1 did not answer; the job's log has the stacks"):
            group.wait(calls, [0, 1], "sleep", 2)
    [record] = [record for record in caplog.records if record.name == "sedsft.stacks"]
    text = record.getMessage()
    assert text.startswith("stacks of stuck-1, innermost call first:")
    assert "test_actor_group.py" in text
    assert "in sleep" in text
