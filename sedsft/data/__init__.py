"""From data files to token batches: sources, chat templates and response masks, row order, batching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_LISTED_ROWS = 20


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, with the reason."""

    line: int
    reason: str
    file: str = ""
    """Name of the row's file where there are several."""

    @property
    def place(self) -> str:
        """Where the row stands, for people."""
        return f"{self.file}, line {self.line}" if self.file else f"line {self.line}"


class DataFileError(ValueError):
    """A data file that cannot be read as what it is given for."""


class DataRowsError(DataFileError):
    """Rows that cannot be used, all of them in one error; the text lists the first 20 by line."""

    def __init__(self, expected: str, bad: Sequence[BadRow], remedy: str) -> None:
        listed = "".join(f"\n  {row.place}: {row.reason}" for row in bad[:_LISTED_ROWS])
        more = f"\n  and {len(bad) - _LISTED_ROWS} more" if len(bad) > _LISTED_ROWS else ""
        noun = "bad row" if len(bad) == 1 else "bad rows"
        super().__init__(f"expected {expected}, got {len(bad)} {noun}; {remedy}:{listed}{more}")
        self.expected = expected
        self.bad = tuple(bad)
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.expected, self.bad, self.remedy)


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or prompted with."""
