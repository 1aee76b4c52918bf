"""Checks rows that came tokenized against the tokenizer and the length limit, as `sedsft.data.chat` does with conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from sedsft.data import BadRow, DataRowsError
from sedsft.data.chat import EncodedRows
from sedsft.records import Example


def limit_examples(
    examples: Sequence[Example], max_length: int, on_too_long: Literal["error", "drop", "cut"], num_token_ids: int
) -> EncodedRows:
    """Examples of at most `max_length` tokens; a cut one ends with the last trained token within them.

    Raises:
        DataRowsError: token ids not below `num_token_ids`; longer ones with on_too_long="error"; no example remains.
    """
    foreign = [
        BadRow(e.line, f"token id {e.input_ids_T.max()}", e.file) for e in examples if e.input_ids_T.max() >= num_token_ids
    ]
    if foreign:
        raise DataRowsError(f"token ids below the tokenizer's {num_token_ids}", foreign, "tokenize with this model's tokenizer")
    fitting: list[Example] = []
    cut: list[int] = []
    too_long: list[BadRow] = []
    for example in examples:
        length = len(example.input_ids_T)
        kept = np.flatnonzero(example.trained_T[:max_length])
        if length <= max_length:
            fitting.append(example)
        elif on_too_long == "cut" and kept.any():
            end = int(kept[-1]) + 1
            fitting.append(replace(example, input_ids_T=example.input_ids_T[:end], trained_T=example.trained_T[:end]))
            cut.append(example.line)
        else:
            lost = "no trained token would be left" if on_too_long == "cut" else "of which trained ones would be cut"
            too_long.append(BadRow(example.line, f"{length} tokens, {lost}", example.file))
    if too_long and (on_too_long == "error" or not fitting):
        remedy = "raise max_length or shorten these rows" + (" or set on_too_long" if on_too_long == "error" else "")
        raise DataRowsError(f"rows of at most max_length={max_length} tokens", too_long, remedy)
    return EncodedRows(tuple(fitting), tuple(row.line for row in too_long), tuple(cut))
