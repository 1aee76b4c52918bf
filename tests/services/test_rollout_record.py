from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services.errors import RecordingInvalid
from services.rollout_record import read_rollouts, read_table, recorded_files, recorded_stages, write_rollouts

IDENTITY = {"stage": {"grpo": {"seed": 1}}, "data_sha256": "ab"}


def float32(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def random_groups(count: int) -> list[RolloutGroup]:
    """Groups of two whose log-probabilities are float32 values of every size, subnormals among them."""
    random = np.random.default_rng(0)
    groups = []
    for line in range(1, count + 1):
        samples = []
        for _ in range(2):
            ids = random.integers(0, 150_000, random.integers(1, 40))
            bits = random.integers(0, 0x7F800000, len(ids)) | (1 << 31)
            log_probs = tuple(float32(b) for b in bits)
            samples.append(Sample(tuple(ids.tolist()), log_probs, f"a\n{line} ü", line % 2 == 0, line, line % 4 == 0))
        right = Score(1 / 3, "scored", "1/3", correct=True, parts={"answer": 1.0, "length": 1 / 7}, seconds=0.1)
        scores = (right, Score(float("nan"), "timeout", None, "late"))
        prompt = Prompt((1, line), "zwölf?", "12", line, "openai/gsm8k")
        groups.append(RolloutGroup(prompt, tuple(samples), scores, seed=2**62 - 2 - line))
    return groups


def unpacked(value: Any) -> Any:
    """Everything in a record, floats as their bytes, so that NaN equals itself."""
    if dataclasses.is_dataclass(value):
        return [(field.name, unpacked(getattr(value, field.name))) for field in dataclasses.fields(value)]
    if isinstance(value, tuple | dict):
        return [unpacked(item) for item in (value.items() if isinstance(value, dict) else value)]
    return struct.pack("<d", value) if isinstance(value, float) else value


def test_groups_come_back_bit_for_bit(tmp_path: Path) -> None:
    groups = random_groups(50)
    path = write_rollouts(tmp_path / "rollouts", 7, groups, IDENTITY)
    assert path.name == "iteration-000007.parquet"
    recorded = read_rollouts(path)
    assert (recorded.iteration, recorded.identity) == (7, IDENTITY)
    assert [unpacked(group) for group in recorded.groups] == [unpacked(group) for group in groups]
    table = pq.read_table(path)
    assert table.column("seed").to_pylist()[:2] == [groups[0].seed, groups[0].seed + 1]
    assert table.column("group").to_pylist()[:4] == [0, 0, 1, 1]
    assert table.column("sample").to_pylist()[:4] == [0, 1, 0, 1]
    assert set(table.column("iteration").to_pylist()) == {7}
    assert math.isnan(table.column("reward").to_pylist()[1])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("record", [Prompt, Sample, Score, RolloutGroup])
def test_every_field_is_set_in_the_test_above(record: type) -> None:
    group = random_groups(4)[3]
    values = {Prompt: [group.prompt], Sample: group.samples, Score: group.scores, RolloutGroup: [group]}[record]
    for field in dataclasses.fields(record):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        assert any(getattr(value, field.name) != default for value in values), f"{field.name} would be lost unnoticed"


def test_every_flipped_byte_of_the_data_is_noticed(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 1, random_groups(3), IDENTITY)
    whole = path.read_bytes()
    footer = struct.unpack("<I", whole[-8:-4])[0]
    unnoticed = []
    for place in range(4, len(whole) - footer - 8, 37):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            groups = read_rollouts(path).groups
        except RecordingInvalid:
            continue
        # Statistics in page headers may change without a reader noticing; values may not.
        if [unpacked(group) for group in groups] != [unpacked(group) for group in random_groups(3)]:
            unnoticed.append(place)
    assert unnoticed == []


@pytest.mark.parametrize("content", [b"", b"PAR1", None])
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "iteration-000001.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecordingInvalid, match="expected recorded rollouts"):
        read_rollouts(path)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = write_rollouts(tmp_path, 1, random_groups(1), IDENTITY)
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["seed"]), path)
    with pytest.raises(RecordingInvalid, match="columns"):
        read_rollouts(path)
    assert read_table(path, ["prompt", "group"]).num_rows == 2


def test_the_newest_attempt_counts_and_later_ones_do_not(tmp_path: Path) -> None:
    attempts = [tmp_path / f"attempt-{number}" for number in (1, 2, 10)]
    for attempt, iterations in zip(attempts, [(1, 2), (2, 3), (3,)], strict=True):
        for iteration in iterations:
            write_rollouts(attempt / "stages" / "rl" / "rollouts", iteration, random_groups(1), IDENTITY)
    (attempts[0] / "stages" / "rl" / "rollouts" / "iteration-000009.parquet.7.tmp").touch()
    found = recorded_files(attempts[1], "rl")
    assert {iteration: path.parents[3].name for iteration, path in found.items()} == {
        1: "attempt-1",
        2: "attempt-2",
        3: "attempt-2",
    }
    assert recorded_files(attempts[2], "rl")[3].parents[3].name == "attempt-10"
    assert recorded_stages(attempts[2]) == ["rl"]
    assert recorded_files(attempts[2], "sft") == {}
