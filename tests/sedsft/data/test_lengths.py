"""The one rule for rows that are too long: refused, dropped or cut, whatever they were made from."""

from __future__ import annotations

import numpy as np
import pytest

from sedsft.data import DataRowsError, LongRow, RowTally
from sedsft.data.lengths import LengthLimit
from sedsft.records import Example


def example(trained: list[int], line: int) -> Example:
    return Example(np.arange(len(trained), dtype=np.int32), np.array(trained, np.bool_), line, "f")


EXAMPLES = (example([0, 1, 1], 1), example([0, 1, 0, 1], 2), example([0, 0, 0, 1], 3))


def test_rows_within_the_limit_are_left_alone() -> None:
    for rule in ("error", "drop", "cut"):
        assert [LengthLimit(4, rule).fit(e) for e in EXAMPLES] == list(EXAMPLES)  # type: ignore[arg-type]


@pytest.mark.parametrize("rule", ["error", "drop"])
def test_longer_rows_are_no_examples(rule: str) -> None:
    short, *long = (LengthLimit(3, rule).fit(e) for e in EXAMPLES)  # type: ignore[arg-type]
    assert short is EXAMPLES[0]
    reason = "4 tokens, of which trained ones would be cut"
    assert long == [LongRow(2, reason, "f", 4), LongRow(3, reason, "f", 4)]


def test_a_cut_ends_with_a_trained_token_behind_the_first() -> None:
    limit = LengthLimit(3, "cut")
    cut = limit.fit(EXAMPLES[1])
    assert isinstance(cut, Example)
    assert (cut.input_ids_T.tolist(), cut.trained_T.tolist(), cut.line, cut.file) == ([0, 1], [False, True], 2, "f")
    assert limit.fit(EXAMPLES[2]) == LongRow(3, "4 tokens, no trained token would be left", "f", 4)
    assert limit.fit(example([1, 0, 0, 1], 5)) == LongRow(5, "4 tokens, no trained token would be left", "f", 4)


def test_what_is_refused() -> None:
    rows = RowTally.of(LongRow(line, "9 tokens", "f", 9) for line in (2, 7))
    with pytest.raises(
        DataRowsError, match=r"max_length=3 tokens, got 2 bad rows; .* or set on_too_long:\n  f, line 2: 9 tokens"
    ):
        LengthLimit(3, "error").check(rows, any_left=True)
    LengthLimit(3, "drop").check(rows, any_left=True)
    with pytest.raises(DataRowsError, match="got 2 bad rows; raise max_length or shorten these rows:"):
        LengthLimit(3, "drop").check(rows, any_left=False)
    LengthLimit(3, "error").check(RowTally(), any_left=False)
