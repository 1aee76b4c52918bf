"""The modes of the loop over stand-in engines: who waits for whom, which weights draw what, and that no group is lost."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from pydantic import ValidationError

from sedsft.config import GRPOConfig, SamplingConfig
from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services.errors import GroupsLost, RewardFailure, WorkerDied
from services.loops.group_counts import GroupCounts, check_staleness, staleness
from services.loops.group_flow import GroupFlow
from services.loops.grpo import overlap_of
from services.loops.overlap import OneStepOff, Overlap
from services.loops.overlap_async import Async
from services.loops.rounds import Rounds
from services.loops.timeline import Timeline
from services.rollout.feed import Ask, Feed
from services.rollout.fleet import Halted, prompt_seed

SIZE = 4
"""Prompts of an iteration."""


class StandInRun:
    def __init__(self) -> None:
        self.events: list[str] = []

    def event(self, kind: str, message: str, /, **data: Any) -> None:
        self.events.append(kind)

    def phase(self, phase: str, step: int = 0, steps: int = 0) -> None:
        pass


class StandInRecording:
    """Keeps iterations in memory; `files` are those of an earlier attempt."""

    def __init__(self, files: dict[int, list[RolloutGroup]]) -> None:
        self.files, self.written = files, dict[int, list[RolloutGroup]]()
        self.broken: set[int] = set()

    def holds(self, iteration: int) -> bool:
        return iteration in self.files

    def read(self, iteration: int) -> list[RolloutGroup] | None:
        return None if iteration in self.broken else self.files.get(iteration)

    def seeds(self) -> dict[int, set[int]]:
        return {iteration: {group.seed for group in groups} for iteration, groups in self.files.items()}

    def write(self, iteration: int, groups: Sequence[RolloutGroup]) -> None:
        assert iteration not in self.written
        self.written[iteration] = list(groups)


class StandInEngines:
    """Finish what they have in random order, one group after the other, with the weights they hold."""

    def __init__(self, seed: int, seconds: float = 0.0) -> None:
        self.held, self.sampling = 0, False
        self.rewards = random.Random(seed)
        self._order, self._seconds = random.Random(seed), seconds
        self._halted = threading.Event()
        self.dies_at: int | None = None
        self.unscored = False

    def _group(self, seed: int, group_size: int) -> tuple[Sample, ...]:
        if self._halted.is_set():
            raise Halted
        if self.held == self.dies_at:
            raise WorkerDied("expected rollout-0 to answer, its process ended")
        time.sleep(self._seconds)
        return tuple(Sample((seed % 97, g), (-1.0, -1.0), "", False, self.held) for g in range(group_size))

    def sample(self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, seed: int) -> list[RolloutGroup]:
        seeds = [prompt_seed(seed, place) for place in range(len(prompts))]
        with self._busy():
            return [RolloutGroup(p, self._group(s, group_size), seed=s) for p, s in zip(prompts, seeds, strict=True)]

    def stream(self, feed: Feed, group_size: int, sampling: SamplingConfig) -> None:
        running: list[Ask] = []
        with self._busy():
            while True:
                ended = feed.ended
                running += feed.take()
                if not running and ended:
                    return
                if running:
                    ask = running.pop(self._order.randrange(len(running)))
                    feed.put(ask, self._group(ask.seed, group_size))
                elif self._halted.is_set():
                    raise Halted
                time.sleep(0.0005)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        assert not self.sampling
        self.sampling = True
        try:
            yield
        finally:
            self.sampling = False

    @contextmanager
    def halted(self) -> Iterator[None]:
        self._halted.set()
        yield
        self._halted.clear()

    def score(self, groups: Sequence[RolloutGroup], max_error_share: float) -> list[RolloutGroup]:
        return self.scored(groups)

    def scored(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        status = "timeout" if self.unscored else "scored"
        return [
            replace(group, scores=tuple(Score(float(self.rewards.random() < 0.5), status) for _ in group.samples))
            for group in groups
        ]


@dataclass
class Loop:
    """What `services.loops.grpo` does with a mode, without trainers."""

    overlap: dict[str, Any]
    iterations: int = 6
    seed: int = 0
    seconds: float = 0.0
    files: dict[int, list[RolloutGroup]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    first_version: int = 1

    def __post_init__(self) -> None:
        config = config_of(overlap=self.overlap, iterations=self.iterations, **self.settings)
        self.engines, self.recording, self.run = (
            StandInEngines(self.seed, self.seconds),
            StandInRecording(self.files),
            StandInRun(),
        )
        prompts = [Prompt((i,), "", "", i + 1) for i in range(30)]
        self.counts, self.timeline = GroupCounts(), Timeline()
        self.rounds = Rounds(
            self.run,
            config,
            self.engines,
            prompts,
            self.recording,
            self.first_version,
            self.timeline,
            self.counts,  # type: ignore[arg-type]
        )
        self.step = 0
        self.ages: dict[int, set[int]] = {}
        self.fits: list[int] = []
        self.mode: Overlap = overlap_of(self.rounds, self.fit)

    def fit(self) -> None:
        version = self.rounds.version(self.step + 1)
        if self.engines.held != version:
            assert not self.engines.sampling, "weights may change in quiet engines only"
            self.engines.held = version
            self.fits.append(version)

    def go(self, until: int | None = None) -> Loop:
        try:
            while self.step < (until or self.iterations):
                self.advance()
        finally:
            self.mode.close()
        return self

    def advance(self) -> None:
        iteration = self.step + 1
        groups = self.mode.groups(iteration)
        self.mode.check()
        version = self.rounds.version(iteration)
        check_staleness(groups, version, self.mode.max_staleness, iteration)
        self.ages[iteration] = set(staleness(groups, version))
        self.mode.begin_next(iteration)
        time.sleep(self.seconds * SIZE)
        self.step = iteration
        self.mode.settle(iteration)
        assert not self.engines.sampling
        if self.mode.wants_weights(iteration):
            self.fit()
        self.mode.check()


def config_of(**settings: Any) -> GRPOConfig:
    sizes = {"prompts_per_iteration": SIZE, "mini_batch_prompts": SIZE, "group_size": 2}
    return GRPOConfig.model_validate({"data": {"path": "unused"}, **sizes, **settings})


def seeds_of(loop: Loop) -> list[int]:
    return sorted(group.seed for groups in loop.recording.written.values() for group in groups)


def test_each_mode_draws_with_the_weights_it_says() -> None:
    sync = Loop({"mode": "sync"}).go()
    assert set(map(tuple, sync.ages.values())) == {(0,)}
    assert sync.fits == [1, 2, 3, 4, 5, 6, 7]
    ahead = Loop({"mode": "one_step_off"}).go()
    assert [set(ages) for ages in ahead.ages.values()] == [{0}, {1}, {1}, {1}, {1}, {1}]
    # Iterations 2 to 6 are drawn with the weights of 1 to 5; nothing is drawn with those behind.
    assert ahead.fits == [1, 2, 3, 4, 5]
    # Which prompts and seeds an iteration has does not depend on the mode.
    assert {i: [g.seed for g in groups] for i, groups in sync.recording.written.items()} == {
        i: [g.seed for g in groups] for i, groups in ahead.recording.written.items()
    }
    assert ahead.counts == GroupCounts(6 * SIZE, 6 * SIZE, 0)


@pytest.mark.parametrize("max_staleness", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_async_uses_every_ticket_once_and_never_too_old(max_staleness: int, seed: int) -> None:
    loop = Loop({"mode": "async", "max_staleness": max_staleness}, seed=seed).go()
    assert seeds_of(loop) == sorted(loop.rounds.seed(i, p) for i in range(1, 7) for p in range(SIZE))
    assert all(0 <= age <= max_staleness for ages in loop.ages.values() for age in ages)
    assert loop.ages[1] == {0}
    assert loop.counts == GroupCounts(6 * SIZE, 6 * SIZE, 0)


def test_overlap_takes_the_longer_of_sampling_and_training() -> None:
    seconds = {}
    for mode in ("sync", "one_step_off", "async"):
        loop = Loop({"mode": mode}, seconds=0.02)
        loop.timeline.cut()
        loop.go()
        seconds[mode] = loop.timeline.cut().end_s
    # Sampling and training take 80 ms each an iteration: 12 of them in turn, or 7 of them where they go side by side.
    assert seconds["sync"] > 0.95
    assert seconds["one_step_off"] < 0.85 * seconds["sync"], seconds
    assert seconds["async"] < 0.85 * seconds["sync"], seconds


@pytest.mark.parametrize("overlap", [{"mode": "one_step_off"}, {"mode": "async", "max_staleness": 2}])
@pytest.mark.parametrize("recorded", [1, 3, 6])
def test_a_run_that_goes_on_reads_what_is_recorded(overlap: dict[str, Any], recorded: int) -> None:
    before = Loop(overlap).go()
    files = {i: groups for i, groups in before.recording.written.items() if i <= recorded}
    after = Loop(overlap, files=files).go()
    assert set(after.recording.written) == set(range(recorded + 1, 7))
    used = [group.seed for groups in (files | after.recording.written).values() for group in groups]
    assert sorted(used) == seeds_of(before)
    # Behind the last recorded iteration engines hold the weights that they held before.
    expected = {1} if overlap["mode"] == "one_step_off" else {0, 1, 2}
    assert all(after.ages[i] <= expected for i in range(recorded + 1, 7)), after.ages


@pytest.mark.parametrize("overlap", [{"mode": "sync"}, {"mode": "one_step_off"}, {"mode": "async"}])
def test_recordings_that_are_broken_or_of_other_weights_are_drawn_again(overlap: dict[str, Any]) -> None:
    before = Loop(overlap).go()
    files = dict(before.recording.written)
    loop = Loop(overlap, files=files)
    loop.recording.broken = {3}
    loop.go()
    assert set(loop.recording.written) == {3}
    assert {group.seed for group in loop.recording.written[3]} == {group.seed for group in files[3]}
    # Of a run whose weights had other numbers, every iteration is drawn anew, and told.
    other = Loop(overlap, files=files, first_version=9).go()
    assert other.run.events == ["recording_broken"] * 6
    assert seeds_of(other) == seeds_of(before)


def test_refills_go_on_while_the_trainers_train() -> None:
    settings = {"max_refills": 2}
    sync, ahead = (Loop({"mode": mode}, settings=settings).go() for mode in ("sync", "one_step_off"))
    for loop in (sync, ahead):
        sizes = [len(groups) for groups in loop.recording.written.values()]
        assert max(sizes) > SIZE
        assert loop.counts == GroupCounts(sum(sizes), sum(sizes), 0)
    with pytest.raises(ValidationError, match="expected no max_refills with overlap mode 'async'"):
        config_of(iterations=2, overlap={"mode": "async"}, max_refills=1)


@pytest.mark.parametrize("mode", ["one_step_off", "async"])
def test_what_goes_wrong_in_a_thread_is_raised_and_threads_end(mode: str) -> None:
    loop = Loop({"mode": mode})
    loop.engines.dies_at = 3
    with pytest.raises(WorkerDied):
        loop.go()
    assert not loop.engines.sampling
    left = Loop({"mode": mode}, seconds=0.01)
    left.go(until=2)
    assert not left.engines.sampling


def test_too_many_samples_without_a_score_stop_the_async_mode() -> None:
    loop = Loop({"mode": "async"})
    loop.engines.unscored = True
    with pytest.raises(RewardFailure, match="got 8 of 8"):
        loop.go()


# ------------------------------------------------------------------------------------------------ by hand


def flow(max_staleness: int, iterations: int = 3) -> tuple[GroupFlow, Rounds]:
    rounds = Loop({"mode": "async", "max_staleness": max_staleness}, iterations).rounds
    return GroupFlow(rounds, max_staleness, []), rounds


def sampled(flow: GroupFlow, asks: Sequence[Ask], version: int) -> None:
    for ask in asks:
        flow.put(ask, (Sample((1,), (-1.0,), "", False, version),) * 2)
    flow.scored(flow.unscored(0.0))


def test_room_and_counts_by_hand() -> None:
    going, rounds = flow(max_staleness=1)
    counts = rounds.counts
    assert going.ended
    assert going.take() == []
    going.open(1)
    first = list(going.take())
    # The iterations 1 and 2 may be drawn with the weights of 1.
    assert len(first) == 8
    assert [ask.seed for ask in first] == [rounds.seed(i, p) for i in (1, 2) for p in range(4)]
    sampled(going, [first[5], first[0], first[7]], version=1)
    assert going.use(1) is None
    sampled(going, [first[2]], version=1)
    used = going.use(1)
    assert used is not None
    assert [group.seed for group in used] == [first[i].seed for i in (0, 2, 5, 7)]
    assert (counts.submitted, counts.accepted, counts.dropped, going.checked()) == (8, 4, 0, 4)
    assert list(going.take()) == []
    sampled(going, [first[i] for i in (1, 3, 4)], version=1)
    going.shut()
    assert going.ended
    going.open(2)
    second = list(going.take())
    assert [ask.seed for ask in second] == [rounds.seed(3, p) for p in range(4)]
    sampled(going, second, version=2)
    used = going.use(2)
    assert used is not None
    # The oldest first: the three of version 1, then one of version 2, though a fourth of version 1 is under way.
    assert [group.seed for group in used] == [first[i].seed for i in (1, 3, 4)] + [second[0].seed]
    assert going.ended, "nothing is left to be asked for"
    # What was asked for with version 1 and comes so late is too old for iteration 3: dropped, and asked for again.
    sampled(going, [first[6]], version=1)
    assert going.use(3) is None
    assert (counts.submitted, counts.accepted, counts.dropped, going.checked()) == (12, 8, 1, 3)
    going.open(3)
    again = list(going.take())
    assert [ask.seed for ask in again] == [first[6].seed]
    sampled(going, again, version=3)
    used = going.use(3)
    assert used is not None
    assert (counts.submitted, counts.accepted, counts.dropped, going.checked()) == (13, 12, 1, 0)


def test_a_group_that_vanishes_is_noticed_at_once() -> None:
    going, _ = flow(max_staleness=1)
    going.open(1)
    asks = going.take()
    going._sampling.discard(asks[0].seed)
    with pytest.raises(GroupsLost, match=r"got 8 = 0 \+ 0 \+ 7"):
        sampled(going, asks[1:2], version=1)
    starved, _ = flow(max_staleness=1)
    starved._waiting.clear()
    with pytest.raises(GroupsLost, match="no ticket is left"):
        starved.check_supply(1)


@pytest.mark.parametrize("seed", range(20))
def test_counts_add_up_whatever_the_order(seed: int) -> None:
    """A random walk over everything that can happen, with groups that come arbitrarily late."""
    rng = random.Random(seed)
    going, rounds = flow(max_staleness=rng.randint(1, 3), iterations=8)
    running: list[tuple[Ask, int]] = []
    used: list[int] = []
    step = 0
    while step < 8:
        held = step + 1
        match rng.randrange(4):
            case 0:
                going.open(held)
                running += [(ask, held) for ask in going.take()]
            case 1 if running:
                ask, version = running.pop(rng.randrange(len(running)))
                going.put(ask, (Sample((1,), (-1.0,), "", False, version),) * 2)
            case 2:
                going.scored(going.unscored(0.0))
            case 3 if (groups := going.use(step + 1)) is not None:
                check_staleness(groups, rounds.version(step + 1), going._max_staleness, step + 1)
                used += [group.seed for group in groups]
                step += 1
                going.shut()
        going.checked()
    assert sorted(used) == sorted(rounds.seed(i, p) for i in range(1, 9) for p in range(SIZE))
    assert rounds.counts.submitted == 8 * SIZE + rounds.counts.dropped


def test_modes_by_settings() -> None:
    assert isinstance(Loop({"mode": "one_step_off"}).mode, OneStepOff)
    assert isinstance(Loop({"mode": "async", "max_staleness": 4}).mode, Async)
    for bad in ({"mode": "async", "max_staleness": 0}, {"mode": "sync", "max_staleness": 1}, {"mode": "two_steps_off"}):
        with pytest.raises(ValidationError):
            config_of(iterations=1, overlap=bad)
