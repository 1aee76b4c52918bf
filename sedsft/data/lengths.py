"""The one rule for rows that are longer than the limit: refused, dropped, or cut behind a trained token."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from sedsft.data import DataRowsError, LongRow, RowTally
from sedsft.records import Example

OnTooLong = Literal["error", "drop", "cut"]


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How many tokens a row may have, and what becomes of longer ones."""

    max_length: int
    on_too_long: OnTooLong

    def fit(self, example: Example) -> Example | LongRow:
        """The example, or with "cut" what of it ends with the last trained token within the limit.

        What is cut must keep a trained token behind the first, which is never predicted.
        """
        length = len(example.input_ids_T)
        if length <= self.max_length:
            return example
        kept = np.flatnonzero(example.trained_T[1 : self.max_length])
        if self.on_too_long == "cut" and kept.size:
            end = int(kept[-1]) + 2
            return replace(example, input_ids_T=example.input_ids_T[:end], trained_T=example.trained_T[:end])
        lost = "no trained token would be left" if self.on_too_long == "cut" else "of which trained ones would be cut"
        return LongRow(example.line, f"{length} tokens, {lost}", example.file, length)

    def check(self, dropped: RowTally, any_left: bool) -> None:
        """Refuse `dropped` rows with "error", and under every setting where no other row is left.

        Raises:
            DataRowsError: the rows.
        """
        if dropped.total and (self.on_too_long == "error" or not any_left):
            remedy = "raise max_length or shorten these rows" + (" or set on_too_long" if self.on_too_long == "error" else "")
            raise DataRowsError(f"rows of at most max_length={self.max_length} tokens", dropped, remedy)
