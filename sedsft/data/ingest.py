"""Data files to examples on disk, in one pass that keeps no row in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sedsft.config import DataConfig
from sedsft.data import RowTally
from sedsft.data.encoding import EncodeSettings, check_foreign, check_refused, encode_chunks
from sedsft.data.sources import sft_rows
from sedsft.data.store import ExampleStore, write_store
from sedsft.records import Example


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """What has become of the rows of `data`: each is an example, or among those skipped or dropped."""

    data: DataConfig
    examples: ExampleStore
    skipped: RowTally
    """Rows that cannot be used."""
    dropped: RowTally
    """`LongRow`s that are not among the examples."""
    cut: RowTally
    """`LongRow`s of examples that lost their end."""


def store_rows(
    path: Path, data: DataConfig, settings: EncodeSettings, processes: int, progress: Callable[[int], None]
) -> StoredRows:
    """Read, encode and write the rows of `data` to `path`; `progress` is told how many usable rows are encoded.

    Raises:
        DataFileError: files that cannot be read.
        DataRowsError: behind the last row, rows that cannot be read, rendered or are too long, unless they may be left out;
            also when no row remains.
        TokenizerError, EncoderDied: as `encode_chunks` does.
    """
    skipped, refused, foreign, dropped, cut = (RowTally() for _ in range(5))

    def encoded() -> Iterator[tuple[Example, ...]]:
        done = kept = 0
        for chunk in encode_chunks(sft_rows(data, skipped), settings, processes):
            refused.add(*chunk.refused)
            foreign.add(*chunk.foreign)
            dropped.add(*chunk.dropped)
            cut.add(*chunk.cut)
            if data.on_bad_row == "skip":
                skipped.add(*chunk.refused)
            kept += len(chunk.examples)
            done += len(chunk.examples) + len(chunk.refused) + len(chunk.foreign) + len(chunk.dropped)
            yield chunk.examples
            progress(done)
        # Here, behind the last row and before the file appears.
        check_foreign(foreign)
        if data.on_bad_row == "error" or not kept:
            check_refused(refused, "" if data.on_bad_row == "skip" else ", or set on_bad_row to skip")
        settings.limit.check(dropped, any_left=kept > 0)

    path.parent.mkdir(parents=True, exist_ok=True)
    return StoredRows(data, write_store(path, encoded()), skipped, dropped, cut)
