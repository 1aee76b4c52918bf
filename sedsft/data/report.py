"""What training rows are before anything is trained on them: how many of each fate, how long, how much of them is trained.

Every row that was read was either kept, skipped since it cannot be used, or dropped since it is too long.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sedsft.data import BadRow, BadRowKind
from sedsft.data.hub import hub_origin
from sedsft.data.ingest import StoredRows
from sedsft.data.overlap import BenchmarkOverlap, OverlapScan
from sedsft.records import Example

HISTOGRAM_BINS = 20
LISTED_DUPLICATES = 20
RENDERED_EXAMPLES = 3
RENDERED_TOKENS = 2000
"""Tokens after which a rendered example is broken off."""

REMEDIES: dict[BadRowKind, str] = {
    "attention_mask": "pad on the right, or leave attention_mask out",
    "conflicting_columns": "keep one of the columns",
    "empty_gold": "fill in the answer or remove the row",
    "empty_line": "remove the line",
    "empty_text": "fill in the text or remove the row",
    "foreign_token_id": "tokenize the rows with this model's tokenizer",
    "invalid_json": "write one JSON object per line",
    "invalid_unicode": "replace the lone surrogate",
    "invalid_utf8": "save the file as UTF-8",
    "label_count": "give one label per token",
    "label_mismatch": "repeat the token's id where it is trained, -100 elsewhere",
    "missing_column": "add the column, or name it with `columns`",
    "no_assistant_turn": "add the response or remove the row",
    "no_end_token": "use a chat template that ends the assistant's turn with an end token",
    "no_trained_token": "label a token behind the first, or remove the row",
    "no_self_match": "mend the gold answer: a response that repeats it would not be right",
    "no_turns": "add turns or remove the row",
    "not_a_problem": "mend the gold answer or choose another reward",
    "not_a_token_id": "write token ids as whole numbers of the vocabulary",
    "not_an_object": "write each row as a JSON object",
    "null_column": "fill in the column or remove the row",
    "template_refused": "change the turns to what the chat template accepts",
    "too_long": "raise max_length or shorten the row",
    "turn_order": "let a user's turn come first",
    "unclear_turns": "use a chat template with {% generation %} blocks, or rows with one assistant turn",
    "unknown_field": "remove the field; tool calls and images are not trained on",
    "unknown_role": "use the roles system, user and assistant",
    "unparsable_gold": "mend the gold answer or choose another reward",
    "wrong_type": "write the value in the type that the layout has",
}
"""What to do about rows of each kind."""


@dataclass(frozen=True, slots=True)
class Reason:
    """How many rows were refused for one reason, and what to do about them."""

    kind: BadRowKind
    count: int
    remedy: str


@dataclass(frozen=True, slots=True)
class Bin:
    """Rows with `low` to `high` tokens, both included."""

    low: int
    high: int
    rows: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Distribution of a number of tokens over rows; quantiles are values of rows."""

    total: int
    mean: float
    smallest: int
    median: int
    p95: int
    largest: int
    histogram: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class Duplicate:
    """A row with the same tokens and mask as the row `first`."""

    place: str
    first: str


@dataclass(frozen=True, slots=True)
class Segment:
    """Neighbouring tokens as text, special tokens included, that all carry a loss or all do not."""

    text: str
    tokens: int
    trained: bool


@dataclass(frozen=True, slots=True)
class RenderedExample:
    """A row as the model reads it. `left_out` tokens follow that are not shown."""

    why: str
    place: str
    tokens: int
    segments: tuple[Segment, ...]
    left_out: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """Rows of one source: how many had which fate, those that cannot be used, and what the kept ones are."""

    source: str
    kept: int
    skipped: int
    dropped: int
    cut: int
    reasons: tuple[Reason, ...]
    """Of skipped and dropped rows together."""
    bad_rows: tuple[BadRow, ...]
    """The first skipped, then the first dropped rows."""
    cut_rows: tuple[BadRow, ...]
    duplicates: int
    """Kept rows that repeat an earlier one."""
    listed_duplicates: tuple[Duplicate, ...]
    tokens: Lengths
    trained: Lengths
    """Tokens that carry a loss; the first of a row never does."""
    rendered: tuple[RenderedExample, ...]
    overlap: tuple[BenchmarkOverlap, ...]

    @property
    def rows_read(self) -> int:
        """Every row that was read has one fate."""
        return self.kept + self.skipped + self.dropped

    @property
    def trained_share(self) -> float:
        """Share of tokens that carry a loss."""
        return self.trained.total / self.tokens.total

    def key_figures(self) -> dict[str, Any]:
        """The numbers of an event."""
        return {
            "source": self.source,
            "rows_read": self.rows_read,
            "kept": self.kept,
            "skipped": self.skipped,
            "dropped": self.dropped,
            "cut": self.cut,
            "duplicates": self.duplicates,
            "reasons": {reason.kind: reason.count for reason in self.reasons},
            "tokens": self.tokens.total,
            "trained_tokens": self.trained.total,
            "trained_share": self.trained_share,
        }

    def as_dict(self) -> dict[str, Any]:
        """The whole report for JSON."""
        overlap = [asdict(own) | {"share": own.share} for own in self.overlap]
        return {"rows_read": self.rows_read, "trained_share": self.trained_share} | asdict(self) | {"overlap": overlap}


def build_data_report(rows: StoredRows, tokenizer: PreTrainedTokenizerBase, scan: OverlapScan | None = None) -> DataReport:
    """Look at every kept row once; `scan` is passed the text of each, special tokens left out.

    In memory are 8 bytes a row and one counter for each length that occurs. There must be a row.
    """
    lengths: Counter[int] = Counter()
    trained_lengths: Counter[int] = Counter()
    hashes = array("Q")
    first_of: dict[int, int] = {}
    for index, example in enumerate(rows.examples):
        length = len(example.input_ids_T)
        lengths[length] += 1
        first_of.setdefault(length, index)
        trained_lengths[int(example.trained_T[1:].sum())] += 1
        hashes.append(_content(example))
        if scan is not None:
            scan.add(str(tokenizer.decode(example.input_ids_T.tolist(), skip_special_tokens=True)), example.line, example.file)
    repeated, first = _duplicates(np.frombuffer(hashes, np.uint64))
    reasons = (rows.skipped.kinds + rows.dropped.kinds).most_common()
    return DataReport(
        source=hub_origin(rows.data.path) or rows.data.path,
        kept=len(hashes),
        skipped=rows.skipped.total,
        dropped=rows.dropped.total,
        cut=rows.cut.total,
        reasons=tuple(Reason(kind, count, REMEDIES[kind]) for kind, count in reasons),
        bad_rows=(*rows.skipped.first, *rows.dropped.first),
        cut_rows=tuple(rows.cut.first),
        duplicates=len(repeated),
        listed_duplicates=tuple(
            Duplicate(_place(rows.examples[again]), _place(rows.examples[before]))
            for again, before in zip(repeated[:LISTED_DUPLICATES], first, strict=False)
        ),
        tokens=_summary(lengths),
        trained=_summary(trained_lengths),
        rendered=_rendered(rows.examples, first_of, tokenizer),
        overlap=scan.result() if scan is not None else (),
    )


def _content(example: Example) -> int:
    """64 bits of a hash of tokens and mask; among ten million rows two differing ones share theirs in 1 of 400,000 cases."""
    digest = hashlib.blake2b(example.input_ids_T.astype("<i4").tobytes(), digest_size=8)
    digest.update(example.trained_T.astype("u1").tobytes())
    return int.from_bytes(digest.digest(), "little")


def _duplicates(hashes_B: np.ndarray[Any, np.dtype[np.uint64]]) -> tuple[list[int], list[int]]:
    """Rows that repeat an earlier one, in order, and for each the earliest."""
    order_B = np.argsort(hashes_B, kind="stable")
    sorted_B = hashes_B[order_B]
    repeated = np.sort(order_B[1:][sorted_B[1:] == sorted_B[:-1]])
    first = order_B[np.searchsorted(sorted_B, hashes_B[repeated])]
    return repeated.tolist(), first.tolist()


def _summary(lengths: Counter[int]) -> Lengths:
    ordered = sorted(lengths.items())
    rows, total = lengths.total(), sum(length * count for length, count in ordered)

    def quantile(share: float) -> int:
        """The value of the row that `share` of all rows, rounded up, reach at most."""
        cumulated = accumulate(count for _, count in ordered)
        return next(length for (length, _), upto in zip(ordered, cumulated, strict=True) if upto >= math.ceil(share * rows))

    smallest, largest = ordered[0][0], ordered[-1][0]
    width = math.ceil((largest - smallest + 1) / HISTOGRAM_BINS)
    counts: Counter[int] = Counter()
    for length, count in ordered:
        counts[(length - smallest) // width] += count
    last = (largest - smallest) // width
    bins = tuple(Bin(smallest + i * width, smallest + (i + 1) * width - 1, counts[i]) for i in range(last + 1))
    return Lengths(total, total / rows, smallest, quantile(0.5), quantile(0.95), largest, bins)


def _rendered(
    examples: Sequence[Example], first_of: dict[int, int], tokenizer: PreTrainedTokenizerBase
) -> tuple[RenderedExample, ...]:
    """The first row, the shortest and the longest; `first_of` is the first row of each length."""
    found: dict[int, str] = {0: "first"}
    for why, index in (("shortest", first_of[min(first_of)]), ("longest", first_of[max(first_of)])):
        found[index] = f"{found[index]}, {why}" if index in found else why
    # Where one row is several of them, the next ones make up the number.
    for index in range(min(len(examples), RENDERED_EXAMPLES)):
        if len(found) < RENDERED_EXAMPLES:
            found.setdefault(index, "another")
    return tuple(render(examples[index], why, tokenizer) for index, why in sorted(found.items()))


def render(example: Example, why: str, tokenizer: PreTrainedTokenizerBase) -> RenderedExample:
    """Text segments of an example, split where the mask changes; the first token carries no loss."""
    shown = min(len(example.input_ids_T), RENDERED_TOKENS)
    ids, trained_T = example.input_ids_T[:shown].tolist(), example.trained_T[:shown].copy()
    trained_T[:1] = False
    edges = [0, *(np.flatnonzero(trained_T[1:] != trained_T[:-1]) + 1).tolist(), shown]
    segments = tuple(
        Segment(str(tokenizer.decode(ids[a:b], skip_special_tokens=False)), b - a, bool(trained_T[a]))
        for a, b in pairwise(edges)
    )
    length = len(example.input_ids_T)
    return RenderedExample(why, _place(example), length, segments, length - shown)


def _place(example: Example) -> str:
    return f"{example.file}, line {example.line}" if example.file else f"line {example.line}"
