"""Rollouts of an RL stage on disk: one Parquet file per iteration, complete before the update that uses it.

    <attempt>/stages/<stage>/rollouts/iteration-<n>.parquet     n from 1, six digits

One row per sample, the samples of a prompt one after the other:

    iteration        int32           iteration whose update used it
    group, sample    int32           place of the prompt in the iteration and of the sample in its group, from 0
    line             int64           row of the prompt in its data file
    data_source      string          what the file says the row is from
    prompt, answer   string          rendered prompt and gold answer
    prompt_ids       list<int32>
    response         string          decoding of response_ids
    response_ids     list<int32>
    log_probs        list<float32>   of each response token under the sampler, in nats
    truncated        bool            cut at the limit of tokens or wall time
    timed_out        bool            cut at the limit of wall time
    weight_version   int32           weights that drew it
    seed             int64           seed that it was drawn with
    status           string          scored, timeout, crashed or invalid
    reward           float64         means something only where status is scored
    extracted        string or null  answer read from the response
    detail           string          why it has no score
    correct          bool or null    whether the answer is right, where the reward alone does not tell
    parts            map             reward of each component by its type, before its weight
    seconds          float64         time that the scoring took

The metadata entry `sedsft.rollouts` is JSON: format, iteration, and the identity that a run which uses the file must share.
Pages carry checksums. Imports neither torch nor Ray, so that the API can read it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sedsft.records import Prompt, RolloutGroup, Sample, Score, ScoreStatus
from services.errors import RecordingInvalid
from services.rundir import attempts_of

FOLDER = "rollouts"
FORMAT = 1
"""Version of the columns."""

_META = b"sedsft.rollouts"
_SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("group", pa.int32()),
        ("sample", pa.int32()),
        ("line", pa.int64()),
        ("data_source", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response", pa.string()),
        ("response_ids", pa.list_(pa.int32())),
        ("log_probs", pa.list_(pa.float32())),
        ("truncated", pa.bool_()),
        ("timed_out", pa.bool_()),
        ("weight_version", pa.int32()),
        ("seed", pa.int64()),
        ("status", pa.string()),
        ("reward", pa.float64()),
        ("extracted", pa.string()),
        ("detail", pa.string()),
        ("correct", pa.bool_()),
        ("parts", pa.map_(pa.string(), pa.float64())),
        ("seconds", pa.float64()),
    ]
)


@dataclass(frozen=True)
class RecordedIteration:
    """What a file holds. Log-probabilities are float32 values, bit for bit those that were written."""

    iteration: int
    groups: list[RolloutGroup]
    identity: dict[str, Any]


def recorded_files(run_folder: Path, stage: str) -> dict[int, Path]:
    """Files of a stage by iteration, in order, from the attempts of a job up to that of `run_folder`.

    Of an iteration that several wrote the newest counts: an attempt writes what an earlier one has recorded only where that
    file is damaged.
    """
    files: dict[int, Path] = {}
    for attempt in attempts_of(run_folder):
        for path in (attempt / "stages" / stage / FOLDER).glob("iteration-*.parquet"):
            files[int(path.stem.rpartition("-")[2])] = path
    return dict(sorted(files.items()))


def recorded_stages(run_folder: Path) -> list[str]:
    """Names of the stages that have recorded rollouts, sorted."""
    return sorted({path.parent.name for attempt in attempts_of(run_folder) for path in attempt.glob(f"stages/*/{FOLDER}")})


def write_rollouts(folder: Path, iteration: int, groups: Sequence[RolloutGroup], identity: Mapping[str, Any]) -> Path:
    """Record the scored `groups` of an iteration. On disk under its name when this returns; a crash leaves nothing under it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_name(iteration)}.parquet"
    meta = json.dumps({"format": FORMAT, "iteration": iteration, "identity": identity}, sort_keys=True)
    table = _table(iteration, groups).replace_schema_metadata({_META: meta.encode()})
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def read_rollouts(path: Path) -> RecordedIteration:
    """The groups of an iteration, in the order in which they were written.

    Raises:
        RecordingInvalid: the file is missing or damaged, that of another iteration, or has the columns of another version.
    """
    table = read_table(path)
    try:
        meta = json.loads(table.schema.metadata[_META])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if meta["format"] != FORMAT:
        raise RecordingInvalid(f"expected rollouts of format {FORMAT} in {path}, got {meta['format']}; use the version of then")
    if path.stem != _name(meta["iteration"]):
        raise _damaged(path, f"rollouts of iteration {meta['iteration']}")
    return RecordedIteration(meta["iteration"], _groups(table), meta["identity"])


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """The file's rows, all columns or `columns` alone.

    Raises:
        RecordingInvalid: the file is missing or damaged, or has other columns.
    """
    try:
        table = pq.ParquetFile(path, page_checksum_verification=True).read(columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _damaged(path, error) from error
    wanted = _SCHEMA if columns is None else [_SCHEMA.field(name) for name in columns]
    if {field.name: field.type for field in table.schema} != {field.name: field.type for field in wanted}:
        raise _damaged(path, f"columns {', '.join(f'{field.name} {field.type}' for field in table.schema)}")
    return table


def _name(iteration: int) -> str:
    return f"iteration-{iteration:06d}"


def _damaged(path: Path, cause: object) -> RecordingInvalid:
    return RecordingInvalid(f"expected recorded rollouts in {path}, got: {cause}; restore the file or remove it")


def _table(iteration: int, groups: Sequence[RolloutGroup]) -> pa.Table:
    rows = [
        (place, g, group, sample, score)
        for place, group in enumerate(groups)
        for g, (sample, score) in enumerate(zip(group.samples, group.scores, strict=True))
    ]
    samples, scores = [row[3] for row in rows], [row[4] for row in rows]
    columns: dict[str, Any] = {
        "iteration": np.full(len(rows), iteration),
        "group": [row[0] for row in rows],
        "sample": [row[1] for row in rows],
        "line": [row[2].prompt.line for row in rows],
        "data_source": [row[2].prompt.data_source for row in rows],
        "prompt": [row[2].prompt.text for row in rows],
        "answer": [row[2].prompt.answer for row in rows],
        "prompt_ids": _lists([row[2].prompt.prompt_ids for row in rows], np.int32),
        "response": [sample.text for sample in samples],
        "response_ids": _lists([sample.response_ids for sample in samples], np.int32),
        "log_probs": _lists([sample.log_probs for sample in samples], np.float32),
        "truncated": [sample.truncated for sample in samples],
        "timed_out": [sample.timed_out for sample in samples],
        "weight_version": [sample.weight_version for sample in samples],
        "seed": [row[2].seed + row[1] for row in rows],
        "status": [score.status for score in scores],
        "reward": np.array([score.reward for score in scores], dtype=np.float64),
        "extracted": [score.extracted for score in scores],
        "detail": [score.detail for score in scores],
        "correct": [score.correct for score in scores],
        "parts": [list(score.parts.items()) for score in scores],
        "seconds": np.array([score.seconds for score in scores], dtype=np.float64),
    }
    arrays = [
        columns[field.name] if isinstance(columns[field.name], pa.Array) else pa.array(columns[field.name], type=field.type)
        for field in _SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA)


def _lists(values: Sequence[Sequence[float]], dtype: npt.DTypeLike) -> pa.Array:
    """One list per row, without a Python object per element on the way."""
    offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
    flat = np.fromiter(itertools.chain.from_iterable(values), dtype=dtype, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _groups(table: pa.Table) -> list[RolloutGroup]:
    records: Iterator[dict[str, Any]] = iter(table.to_pylist())
    return [_group(list(rows)) for _, rows in itertools.groupby(records, key=lambda row: row["group"])]


def _group(rows: Sequence[dict[str, Any]]) -> RolloutGroup:
    first = rows[0]
    prompt = Prompt(tuple(first["prompt_ids"]), first["prompt"], first["answer"], first["line"], first["data_source"])
    samples = tuple(
        Sample(
            response_ids=tuple(row["response_ids"]),
            log_probs=tuple(row["log_probs"]),
            text=row["response"],
            truncated=row["truncated"],
            weight_version=row["weight_version"],
            timed_out=row["timed_out"],
        )
        for row in rows
    )
    scores = tuple(
        Score(
            reward=row["reward"],
            status=cast(ScoreStatus, row["status"]),
            extracted=row["extracted"],
            detail=row["detail"],
            correct=row["correct"],
            parts=dict(row["parts"]),
            seconds=row["seconds"],
        )
        for row in rows
    )
    return RolloutGroup(prompt, samples, scores, first["seed"])
