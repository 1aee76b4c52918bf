"""From data files to token batches: sources, chat templates and response masks, row order, batching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

_LISTED_ROWS = 20
_KEPT_ROWS = 10_000

BadRowKind = Literal[
    "attention_mask",
    "conflicting_columns",
    "empty_gold",
    "empty_line",
    "empty_text",
    "foreign_token_id",
    "invalid_json",
    "invalid_unicode",
    "invalid_utf8",
    "label_count",
    "label_mismatch",
    "missing_column",
    "no_assistant_turn",
    "no_end_token",
    "no_self_match",
    "no_trained_token",
    "no_turns",
    "not_a_problem",
    "not_a_token_id",
    "not_an_object",
    "null_column",
    "template_refused",
    "too_long",
    "turn_order",
    "unclear_turns",
    "unknown_field",
    "unknown_role",
    "unparsable_gold",
    "wrong_type",
]
"""Why a row cannot be used, for counting; the names stay."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, with the reason."""

    line: int
    reason: str
    file: str = ""
    """Name of the row's file where there are several."""
    kind: BadRowKind = field(kw_only=True)
    """Stable name of the reason."""

    @property
    def place(self) -> str:
        """Where the row stands, for people."""
        return f"{self.file}, line {self.line}" if self.file else f"line {self.line}"


@dataclass(frozen=True, slots=True)
class LongRow(BadRow):
    """A row that is longer than the limit."""

    length: int = 0
    """Its tokens up to the last trained one."""
    kind: BadRowKind = field(default="too_long", kw_only=True)


class RowTally:
    """Rows of any number, of which the first 10,000 are kept, and how many have which kind of reason."""

    def __init__(self) -> None:
        self.first: list[BadRow] = []
        self.total = 0
        self.kinds: Counter[BadRowKind] = Counter()

    @classmethod
    def of(cls, rows: Iterable[BadRow]) -> Self:
        """A tally of `rows`."""
        tally = cls()
        tally.add(*rows)
        return tally

    def add(self, *rows: BadRow) -> None:
        """Count more rows."""
        self.total += len(rows)
        self.first += rows[: _KEPT_ROWS - len(self.first)]
        self.kinds.update(row.kind for row in rows)


class DataFileError(ValueError):
    """A data file that cannot be read as what it is given for."""


class DataRowsError(DataFileError):
    """Rows that cannot be used, in one error; the text lists the first 20 by line and, of more, the reasons."""

    def __init__(self, expected: str, bad: Iterable[BadRow] | RowTally, remedy: str) -> None:
        tally = bad if isinstance(bad, RowTally) else RowTally.of(bad)
        listed = "".join(f"\n  {row.place}: {row.reason}" for row in tally.first[:_LISTED_ROWS])
        if tally.total > _LISTED_ROWS:
            listed += f"\n  and {tally.total - _LISTED_ROWS} more; all by reason:"
            listed += "".join(f"\n    {count} x {kind}" for kind, count in tally.kinds.most_common())
        noun = "bad row" if tally.total == 1 else "bad rows"
        super().__init__(f"expected {expected}, got {tally.total} {noun}; {remedy}:{listed}")
        self.expected = expected
        self.tally = tally
        self.remedy = remedy

    @property
    def bad(self) -> tuple[BadRow, ...]:
        """The first 10,000 of the rows."""
        return tuple(self.tally.first)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.expected, self.tally, self.remedy)


class TokenizerError(ValueError):
    """A tokenizer that cannot be trained or prompted with."""


class EncoderDied(RuntimeError):
    """A process that encodes rows ended before its work was done."""
