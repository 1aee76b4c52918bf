"""Tokenized rows that are too long are refused, dropped or cut."""

from __future__ import annotations

import numpy as np
import pytest

from sedsft.data import DataRowsError
from sedsft.data.lengths import limit_examples
from sedsft.records import Example


def example(trained: list[int], line: int) -> Example:
    return Example(np.arange(len(trained), dtype=np.int32), np.array(trained, np.bool_), line, "f")


EXAMPLES = (example([0, 1, 1], 1), example([0, 1, 0, 1], 2), example([0, 0, 0, 1], 3))


def test_refused() -> None:
    with pytest.raises(DataRowsError, match=r"max_length=3 tokens, got 2 bad rows.*\n  f, line 2: 4 tokens"):
        limit_examples(EXAMPLES, 3, "error", 4)
    assert limit_examples(EXAMPLES, 4, "error", 4).examples == EXAMPLES


def test_dropped() -> None:
    limited = limit_examples(EXAMPLES, 3, "drop", 4)
    assert (limited.examples, limited.dropped, limited.cut) == (EXAMPLES[:1], (2, 3), ())
    with pytest.raises(DataRowsError, match="got 3 bad rows"):
        limit_examples(EXAMPLES, 2, "drop", 4)


def test_cut_ends_with_a_trained_token_and_drops_what_would_have_none() -> None:
    limited = limit_examples(EXAMPLES, 3, "cut", 4)
    assert [e.trained_T.tolist() for e in limited.examples] == [[False, True, True], [False, True]]
    assert [len(e.input_ids_T) for e in limited.examples] == [3, 2]
    assert (limited.dropped, limited.cut) == ((3,), (2,))


def test_ids_of_another_tokenizer() -> None:
    with pytest.raises(DataRowsError, match=r"token ids below the tokenizer's 3, got 2 bad rows.*\n  f, line 2: token id 3\n"):
        limit_examples(EXAMPLES, 4, "error", 3)
