"""Rows of the SFT stage: read, encoded onto disk, and split into those trained on and those held out."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from sedsft.config import DataConfig, SFTConfig
from sedsft.data import EncoderDied, RowTally
from sedsft.data.encoding import EncodeSettings
from sedsft.data.files import count_rows
from sedsft.data.ingest import StoredRows, store_rows
from sedsft.data.lengths import LengthLimit
from sedsft.data.store import ExampleStore
from services.data_report import report_data
from services.errors import DataError, WorkerDied
from services.run import Run

ROWS = "data"
"""Folder of the encoded rows in that of the stage."""
MAX_HELD_OUT_ROWS = 100
LISTED_ROWS = 100
"""Rows that an event lists; data_report.json has more."""


def sft_examples(run: Run, config: SFTConfig, folder: Path, model_path: Path) -> tuple[ExampleStore, ExampleStore]:
    """Training rows and held-out rows, which every attempt writes below the stage's `folder`; those of attempts before go.

    Raises:
        DataFileError, DataRowsError: rows that cannot be used.
        DataError: too few rows to hold one out.
        WorkerDied: an encoding process.
    """
    for left in run.folder.parent.glob(f"attempt-*/stages/{folder.name}/{ROWS}"):
        shutil.rmtree(left)
    rows = _stored(run, config, config.data, folder / ROWS / "training.arrow", model_path)
    held_out = None
    if config.held_out is not None:
        held_out = _stored(run, config, config.held_out, folder / ROWS / "held_out.arrow", model_path)
    report_data(run, folder, rows, held_out, model_path)
    if held_out is not None:
        return rows.examples, held_out.examples
    if len(rows.examples) < 2:
        raise DataError(f"expected at least 2 rows in {config.data.path} to hold one out, got {len(rows.examples)}")
    training = len(rows.examples) - max(1, min(MAX_HELD_OUT_ROWS, len(rows.examples) // 10))
    return rows.examples[:training], rows.examples[training:]


def _stored(run: Run, config: SFTConfig, data: DataConfig, path: Path, model_path: Path) -> StoredRows:
    """The rows of `data` on disk; what has become of the others goes to `run`."""
    settings = EncodeSettings(model_path, LengthLimit(config.max_length, config.on_too_long))
    total = count_rows(data.path, data.max_rows) or 0
    try:
        rows = store_rows(path, data, settings, config.encode_processes, lambda done: run.phase("data", done, total))
    except EncoderDied as error:
        raise WorkerDied(str(error)) from error
    _tell(run, "rows_skipped", rows.skipped, f"rows of {data.path} cannot be used")
    _tell(run, "rows_dropped", rows.dropped, f"rows of {data.path} are too long")
    _tell(run, "rows_cut", rows.cut, f"rows of {data.path} are cut at {config.max_length} tokens")
    return rows


def _tell(run: Run, kind: str, tally: RowTally, what: str) -> None:
    if tally.total:
        run.event(
            kind, f"{tally.total} {what}", kinds=dict(tally.kinds), first=[asdict(row) for row in tally.first[:LISTED_ROWS]]
        )
