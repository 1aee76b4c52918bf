from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services.errors import RecordingInvalid
from services.loops.recording import Recording
from services.loops.rounds import iteration_seed
from services.rollout.fleet import prompt_seed
from services.rollout_record import recorded_files
from services.run import Run
from tests.services.loops.test_resume import rl_stage
from tests.services.loops.test_sft import events

IDENTITY = {"data_sha256": "ab", "stage": {"grpo": {"seed": 1}}}


def group(text: str) -> RolloutGroup:
    return RolloutGroup(Prompt((1,), text, "1", 1), (Sample((2,), (-1.5,), "2", False, 1),), (Score(1.0, "scored"),), seed=7)


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[list[Run]]:
    """Two attempts of a job."""
    (tmp_path / "job").mkdir()
    stage = rl_stage(tmp_path / "model")
    (tmp_path / "job" / "spec.json").write_text(stage.model_dump_json())
    runs = [Run(tmp_path / "job" / f"attempt-{number}", stage) for number in (1, 2)]
    yield runs
    for run in runs:
        run.finish("succeeded", None)


def test_a_later_attempt_reads_what_an_earlier_one_wrote(runs: list[Run]) -> None:
    first = Recording(runs[0], "rl", IDENTITY)
    assert first.read(1) is None
    first.write(1, [group("one")])
    later = Recording(runs[1], "rl", IDENTITY)
    assert [later.holds(iteration) for iteration in (1, 2)] == [True, False]
    assert later.read(1) == [group("one")]
    assert events(runs[1], "rollouts_read") == [{"iteration": 1}]
    assert later.read(2) is None


def test_seeds_and_first_version_are_read_without_the_rest(runs: list[Run]) -> None:
    first = Recording(runs[0], "rl", IDENTITY)
    two = replace(group("two"), samples=group("two").samples * 2, scores=group("two").scores * 2, seed=9)
    first.write(1, [group("one"), two])
    first.write(2, [group("one")])
    later = Recording(runs[1], "rl", IDENTITY)
    assert later.seeds() == {1: {7, 9}, 2: {7}}
    assert later.first_version() == 1
    path = recorded_files(runs[0].folder, "rl")[1]
    path.write_bytes(path.read_bytes()[:-20])
    assert later.seeds() == {2: {7}}
    assert later.first_version() is None
    assert first.first_version() is None


def test_a_damaged_file_is_reported_and_written_anew(runs: list[Run]) -> None:
    Recording(runs[0], "rl", IDENTITY).write(1, [group("one")])
    path = recorded_files(runs[0].folder, "rl")[1]
    path.write_bytes(path.read_bytes()[:-20])
    later = Recording(runs[1], "rl", IDENTITY)
    assert later.read(1) is None
    assert [event["path"] for event in events(runs[1], "recording_broken")] == [str(path)]
    later.write(1, [group("again")])
    assert Recording(runs[1], "rl", IDENTITY).read(1) == [group("again")]


def test_rollouts_of_other_settings_stop_the_stage(runs: list[Run]) -> None:
    Recording(runs[0], "rl", IDENTITY).write(1, [group("one")])
    with pytest.raises(RecordingInvalid, match=r"stage\.grpo\.seed: 1 there, 2 here"):
        Recording(runs[1], "rl", IDENTITY | {"stage": {"grpo": {"seed": 2}}}).read(1)


def test_no_two_samples_of_neighbouring_runs_share_a_seed() -> None:
    seeds = {
        prompt_seed(iteration_seed(seed, iteration, refill), prompt) + sample
        for seed in range(4)
        for iteration in range(1, 6)
        for refill in range(3)
        for prompt in range(16)
        for sample in range(8)
    }
    assert len(seeds) == 4 * 5 * 3 * 16 * 8
    assert max(seeds) < 2**62 + 8
    assert iteration_seed(42, 1) == iteration_seed(42, 1)
