"""Rows come out of any number of processes in the same chunks, and a process that dies is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import psutil
import pytest

from sedsft.data import DataRowsError, EncoderDied, LongRow, TokenizerError
from sedsft.data.encoding import CHUNK_ROWS, CHUNK_SIZE, EncodedRows, EncodeSettings, encode_chunks, encode_sft
from sedsft.data.lengths import LengthLimit
from sedsft.data.store import ContentHash
from sedsft.records import Example, Row
from sedsft.tasks.tiny_model import countdown_tokenizer


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EncodeSettings:
    folder = tmp_path_factory.mktemp("model")
    countdown_tokenizer().save_pretrained(folder)
    return EncodeSettings(folder, LengthLimit(20, "cut"))


def row(line: int) -> Row:
    """19 tokens, every third row 26 and the last two of ten refused."""
    question, answer = ("3 7 2 5>24", "7*3=21,5-2=3,21+3=24") if line % 3 == 0 else (f"3 7 {line % 9 + 1}>8", "7+3=10,10-2=8")
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Row((*([{"role": "system", "content": "s"}] if line % 10 > 7 else []), *turns), None, line, "f.jsonl")


def places(chunk: EncodedRows) -> tuple[list[int], ...]:
    columns = (chunk.examples, chunk.cut, chunk.dropped, chunk.refused, chunk.foreign)
    return tuple([row.line for row in column] for column in columns)


def content(chunks: list[EncodedRows]) -> str:
    digest = ContentHash()
    for chunk in chunks:
        digest.update(chunk.examples)
    return digest.hexdigest()


def test_what_becomes_of_each_row(settings: EncodeSettings) -> None:
    tokenizer = countdown_tokenizer()
    foreign = Example(np.array([1, len(tokenizer)], np.int32), np.array([False, True]), 5, "f.jsonl")
    fitting = Example(np.array([1, len(tokenizer) - 1], np.int32), np.array([False, True]), 6, "f.jsonl")
    [chunk] = encode_chunks([row(1), row(3), row(8), foreign, fitting], settings, 1)
    assert places(chunk) == ([1, 3, 6], [3], [], [8], [5])
    assert chunk.cut == (LongRow(3, "26 tokens", "f.jsonl", 26),)
    assert [len(example.input_ids_T) for example in chunk.examples] == [19, 20, 2]
    assert chunk.foreign[0].reason == f"token id {len(tokenizer)}"
    with pytest.raises(DataRowsError, match="expected token ids of this model's tokenizer, got 1 bad row"):
        encode_sft([row(8), foreign], tokenizer, 20, "cut")
    with pytest.raises(DataRowsError, match=r"can render, got 1 bad row; mend or remove these rows:\n  f\.jsonl, line 8: "):
        encode_sft([row(8), row(3)], tokenizer, 20, "error")
    with pytest.raises(DataRowsError, match=r"max_length=20 tokens, got 1 bad row.*\n  f\.jsonl, line 3: 26 tokens"):
        encode_sft([row(1), row(3)], tokenizer, 20, "error")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_result_does_not_depend_on_the_number_of_processes(settings: EncodeSettings) -> None:
    rows = [row(line) for line in range(1, 5 * CHUNK_ROWS)]
    one, *more = ([*encode_chunks(iter(rows), settings, processes)] for processes in (1, 2, 3))
    assert [sum(map(len, places(chunk)[:1] + places(chunk)[2:])) for chunk in one] == [CHUNK_ROWS] * 4 + [CHUNK_ROWS - 1]
    assert sum(len(chunk.cut) for chunk in one) > 300
    for chunks in more:
        assert content(chunks) == content(one)
        assert [places(chunk) for chunk in chunks] == [places(chunk) for chunk in one]
    assert active_children() == []


def test_long_rows_make_short_chunks(settings: EncodeSettings) -> None:
    long = Example(np.ones(CHUNK_SIZE // 2, np.int32), np.ones(CHUNK_SIZE // 2, np.bool_), 1)
    assert [len(chunk.examples) for chunk in encode_chunks([long] * 5, settings, 1)] == [2, 2, 1]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_few_rows_are_read_ahead_and_an_error_of_the_reader_ends_the_processes(settings: EncodeSettings) -> None:
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        for read in range(1, 7 * CHUNK_ROWS):
            yield row(read)
        raise DataRowsError("other rows", [], "mend them")

    chunks = encode_chunks(rows(), settings, 2)
    for number in range(1, 4):
        next(chunks)
        assert read == (number + 3) * CHUNK_ROWS
    with pytest.raises(DataRowsError, match="other rows"):
        next(chunks)
    assert active_children() == []


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_process_is_an_error(settings: EncodeSettings) -> None:
    def rows() -> Iterator[Row]:
        for line in range(1, 20 * CHUNK_ROWS):
            if line == 10 * CHUNK_ROWS:
                os.kill(active_children()[0].pid or 0, signal.SIGKILL)
            yield row(line)

    with pytest.raises(EncoderDied, match="expected 2 processes to encode rows, got the death of one"):
        for _ in encode_chunks(rows(), settings, 2):
            pass
    assert active_children() == []


ENDLESS = """
import sys
from itertools import cycle
from multiprocessing import active_children
from pathlib import Path
from sedsft.data.encoding import EncodeSettings, encode_chunks
from sedsft.data.lengths import LengthLimit
from sedsft.records import Row

turns = ({"role": "user", "content": "3 7 2>8"}, {"role": "assistant", "content": "7+3=10,10-2=8"})
chunks = encode_chunks(cycle([Row(turns, None, 1)]), EncodeSettings(Path(sys.argv[1]), LengthLimit(20, "cut")), 2)
next(chunks)
print(*(child.pid for child in active_children()), flush=True)
sys.stdin.read()
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_processes_end_with_the_one_that_started_them(settings: EncodeSettings) -> None:
    command = [sys.executable, "-c", ENDLESS, str(settings.model_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        assert all(child.is_running() for child in children)
        parent.kill()
    gone, alive = psutil.wait_procs(children, timeout=30)
    assert (len(gone), alive) == (2, [])


def test_a_tokenizer_that_cannot_be_used_is_told_before_any_process_starts(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="expected a model folder"):
        next(encode_chunks([row(1)], EncodeSettings(tmp_path / "none", LengthLimit(20, "cut")), 2))
