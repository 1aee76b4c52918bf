"""Encodes rows for SFT as they stream by, in this process or in several, with the same result in the same order."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sedsft.data import BadRow, DataRowsError, EncoderDied, LongRow, RowTally
from sedsft.data.chat import ChatEncoder, Refused, load_tokenizer
from sedsft.data.lengths import LengthLimit, OnTooLong
from sedsft.records import Example, Row

CHUNK_ROWS = 256
CHUNK_SIZE = 1 << 20
"""Characters of text and tokens in a chunk, beyond which it gets no further row."""
CHUNKS_PER_PROCESS = 2
"""Chunks that wait for, or are in, one process: enough to keep it busy while the results of another are written."""


@dataclass(frozen=True, slots=True)
class EncodeSettings:
    """What an encoding process needs to know."""

    model_path: Path
    limit: LengthLimit


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRows:
    """What has become of rows, in their order.

    Of rows that were too long, `cut` are examples that lost their end, `dropped` those that are not among the examples: all
    of them when rows are dropped, else those that would have no trained token left. The template refuses rows `refused`; rows
    `foreign` came with token ids that the tokenizer has not.
    """

    examples: tuple[Example, ...]
    cut: tuple[LongRow, ...]
    dropped: tuple[LongRow, ...]
    refused: tuple[BadRow, ...]
    foreign: tuple[BadRow, ...]


class RowEncoder:
    """Encodes conversations, and checks examples that came tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, limit: LengthLimit) -> None:
        self._chat = ChatEncoder(tokenizer)
        self._num_token_ids = len(tokenizer)
        self._limit = limit

    def encode(self, rows: Iterable[Row | Example]) -> EncodedRows:
        """Every row as an example, or why it is none."""
        examples: list[Example] = []
        cut: list[LongRow] = []
        dropped: list[LongRow] = []
        refused: list[BadRow] = []
        foreign: list[BadRow] = []
        for row in rows:
            try:
                whole = row if isinstance(row, Example) else self._chat.example(row)
            except Refused as reason:
                refused.append(BadRow(row.line, str(reason), row.file, kind=reason.kind))
                continue
            if (largest := int(whole.input_ids_T.max())) >= self._num_token_ids:
                foreign.append(BadRow(row.line, f"token id {largest}", row.file, kind="foreign_token_id"))
                continue
            fitting = self._limit.fit(whole)
            if isinstance(fitting, LongRow):
                dropped.append(fitting)
                continue
            examples.append(fitting)
            if fitting is not whole:
                length = len(whole.input_ids_T)
                cut.append(LongRow(row.line, f"{length} tokens", row.file, length))
        return EncodedRows(tuple(examples), tuple(cut), tuple(dropped), tuple(refused), tuple(foreign))


def encode_sft(
    rows: Iterable[Row | Example], tokenizer: PreTrainedTokenizerBase, max_length: int, on_too_long: OnTooLong
) -> EncodedRows:
    """All of `rows`, which are few, at once.

    Raises:
        DataRowsError: rows that the template refuses or that another tokenizer made; rows without a trained token, or, with
            on_too_long="error", of more than `max_length` tokens; also when no row remains.
    """
    limit = LengthLimit(max_length, on_too_long)
    encoded = RowEncoder(tokenizer, limit).encode(rows)
    check_foreign(RowTally.of(encoded.foreign))
    check_refused(RowTally.of(encoded.refused))
    limit.check(RowTally.of(encoded.dropped), bool(encoded.examples))
    return encoded


def check_foreign(rows: RowTally) -> None:
    """Refuse rows with unknown token ids, whatever the settings: if one row is another tokenizer's, all of them are.

    Raises:
        DataRowsError: the rows.
    """
    if rows.total:
        raise DataRowsError("token ids of this model's tokenizer", rows, "tokenize with this model's tokenizer")


def check_refused(rows: RowTally, or_else: str = "") -> None:
    """Refuse rows that the chat template refuses; `or_else` is said behind the remedy.

    Raises:
        DataRowsError: the rows.
    """
    if rows.total:
        raise DataRowsError("rows that the chat template can render", rows, f"mend or remove these rows{or_else}")


# --------------------------------------------------------------------------------------- several processes


def encode_chunks(rows: Iterable[Row | Example], settings: EncodeSettings, processes: int) -> Iterator[EncodedRows]:
    """`rows` in chunks, encoded in their order; the chunks and what is in them do not depend on `processes`.

    One process is this one. Of more, this one only reads; not more than 2 chunks per process are in memory.

    Raises:
        EncoderDied: a process was killed or could not start.
        TokenizerError: the model's tokenizer cannot be trained with.
    """
    tokenizer = load_tokenizer(settings.model_path)
    if processes == 1:
        yield from map(RowEncoder(tokenizer, settings.limit).encode, _chunks(rows))
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start_process, (settings,))
    waiting: deque[Future[EncodedRows]] = deque()
    try:
        for chunk in _chunks(rows):
            waiting.append(pool.submit(_encode_in_process, chunk))
            if len(waiting) >= CHUNKS_PER_PROCESS * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise EncoderDied(
            f"expected {processes} processes to encode rows, got the death of one: killed, mostly for want of memory, or not "
            "started; lower encode_processes, or give the driver more memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(rows: Iterable[Row | Example]) -> Iterator[list[Row | Example]]:
    chunk: list[Row | Example] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += len(row.input_ids_T) if isinstance(row, Example) else sum(len(turn["content"]) for turn in row.messages)
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_SIZE:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_encoder: RowEncoder | None = None
"""The encoder of an encoding process."""


def _start_process(settings: EncodeSettings) -> None:
    global _encoder
    # A tokenizer would start a thread per core in every process, and pass each text on to one of them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
    _encoder = RowEncoder(load_tokenizer(settings.model_path), settings.limit)


def _encode_in_process(rows: list[Row | Example]) -> EncodedRows:
    assert _encoder is not None, "expected a process that was started by _start_process"
    return _encoder.encode(rows)


def _end_with_parent() -> None:
    """A process waits for work for ever where its parent was killed, since its own end of the queue keeps it open."""
    parent = parent_process()
    assert parent is not None, "expected a child process"
    parent.join()
    os._exit(1)
