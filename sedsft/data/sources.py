"""Reads the rows of data files, in any of the usual layouts, and refuses what cannot be used by file and line.

Needs neither torch nor a tokenizer: the API reads a job's data with it before anything starts.

| layout            | columns for SFT                                              | columns for RL                            |
|-------------------|--------------------------------------------------------------|-------------------------------------------|
| tokens            | input_ids, labels; attention_mask                            | (none: there is no text)                  |
| messages          | messages                                                     | messages, answer                          |
| sharegpt          | conversations; system                                        | (none)                                    |
| prompt_completion | prompt, completion or response                               | prompt, answer                            |
| question_answer   | question or problem, response or solution or answer          | question or problem, answer or response   |
| alpaca            | instruction, output; input, system, history                  | (none)                                    |
| verl              | extra_info.question, extra_info.answer                       | prompt, reward_model.ground_truth         |

Behind the semicolon are columns that may be missing. `prompt` and `completion` are texts or lists of turns. Where a row has
several of the columns joined by "or", the first one counts, except that both a completion and a response are refused; other
columns are ignored. A gold answer with GSM8K's `#### 42` in a question_answer row is what follows the mark. The first object
of the first file decides the layout of all. Lines count from 1; in .parquet and .json files they are rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from sedsft.config import DataConfig, Layout
from sedsft.data import BadRow, DataFileError, DataRowsError, RowTally
from sedsft.data.files import Placed, read_values
from sedsft.data.layouts import Purpose, check_layout, conversation, detect, prompt_and_gold, rename, tokens
from sedsft.data.values import Malformed, RowObject, Turn, column, gold, kind, optional_text, text_column, turn
from sedsft.records import Example, Row


@dataclass(frozen=True, slots=True)
class SFTRows:
    """Rows to train on: conversations, or, in the layout `tokens`, examples; of those that cannot be used, the first 10,000."""

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    skipped: tuple[BadRow, ...]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompts with a gold answer; `skipped` are rows whose gold answer is empty and those that cannot be used."""

    rows: tuple[Row, ...]
    skipped: tuple[BadRow, ...]


def iter_sft_rows(config: DataConfig) -> Iterator[Row | Example | BadRow]:
    """Every row in order: a conversation with at least one assistant turn, an example, or why it cannot be used.

    Raises:
        DataFileError: a file that is missing, empty, of another kind, or whose layout is not clear; a setting that the
            layout does not have.
    """

    def convert(row: RowObject, layout: Layout, placed: Placed) -> Row | Example:
        if layout == "tokens":
            return Example(*tokens(row), placed.line, placed.file)
        return Row(_with_system(conversation(row, layout), config.system_prompt), None, placed.line, placed.file)

    return _converted(config, "SFT", convert)


def sft_rows(config: DataConfig, skipped: RowTally) -> Iterator[Row | Example]:
    """The rows of `iter_sft_rows` that can be used; the others go to `skipped`. Raises as it does, and

    Raises:
        DataRowsError: behind the last row, rows that cannot be used; with on_bad_row="skip" only when no other is left.
    """
    any_good = False
    for item in iter_sft_rows(config):
        if isinstance(item, BadRow):
            skipped.add(item)
        else:
            any_good = True
            yield item
    _check_bad(config, "SFT", skipped, any_good)


def check_sft_rows(config: DataConfig) -> None:
    """Read all rows and keep none. Raises as `sft_rows` does."""
    for _ in sft_rows(config, RowTally()):
        pass


def read_sft_rows(config: DataConfig) -> SFTRows:
    """All rows of a file that is small. Raises as `sft_rows` does."""
    skipped = RowTally()
    items = list(sft_rows(config, skipped))
    rows = tuple(item for item in items if isinstance(item, Row))
    examples = tuple(item for item in items if isinstance(item, Example))
    return SFTRows(rows, examples, tuple(skipped.first))


def read_prompt_rows(config: DataConfig) -> PromptRows:
    """Conversations that end with a user turn, with their gold answers. Raises as `sft_rows` does."""

    def convert(row: RowObject, layout: Layout, placed: Placed) -> Row:
        messages, answer = prompt_and_gold(row, layout)
        source = optional_text(row, "data_source") if layout == "verl" else None
        return Row(_with_system(messages, config.system_prompt), answer, placed.line, placed.file, source or "")

    rows: list[Row] = []
    bad: list[BadRow] = []
    empty: list[BadRow] = []
    for item in _converted(config, "RL", convert):
        if isinstance(item, BadRow):
            bad.append(item)
        elif item.answer:
            rows.append(item)
        else:
            empty.append(BadRow(item.line, "expected a gold answer, got an empty one", item.file, kind="empty_gold"))
    _check_bad(config, "RL", RowTally.of(bad), bool(rows))
    if not rows:
        raise DataFileError(f"expected gold answers in {config.path}, got {len(empty)} rows with an empty one; fill them in")
    return PromptRows(tuple(rows), tuple(sorted(bad + empty, key=lambda row: (row.file, row.line))))


def read_benchmark(path: str, max_rows: int | None = None, system_prompt: str | None = None) -> tuple[Row, ...]:
    """Rows with the columns `problem` and `answer`, as one user turn each. Raises as `sft_rows` does."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    for placed in read_values(path, max_rows):
        try:
            row = _object(placed.value)
            messages = (turn("user", text_column(row, "problem")),)
            answer = gold(column(row, "answer"), "answer")
            if not answer:
                raise Malformed("empty_text", "expected answer to have content, got an empty text")
            rows.append(Row(_with_system(messages, system_prompt), answer, placed.line, placed.file))
        except Malformed as error:
            bad.append(BadRow(placed.line, str(error), placed.file, kind=error.kind))
    if bad:
        raise DataRowsError(f"every row of {path} to have a problem and an answer", bad, "mend or remove these rows")
    return tuple(rows)


R = TypeVar("R")


def _converted(config: DataConfig, purpose: Purpose, convert: Callable[[RowObject, Layout, Placed], R]) -> Iterator[R | BadRow]:
    layout: Layout | None = None if config.format == "auto" else config.format
    if layout is not None:
        _check_settings(config, layout, purpose)
    renamed = "".join(f", {name} being {source}" for name, source in config.columns.items())
    for placed in read_values(config.path, config.max_rows):
        try:
            row = rename(_object(placed.value), config.columns)
            if layout is None:
                layout = detect(row, purpose, config.path)
                _check_settings(config, layout, purpose)
            item = convert(row, layout, placed)
        except Malformed as error:
            yield BadRow(placed.line, f"{error}{renamed}", placed.file, kind=error.kind)
        else:
            yield item


def _check_settings(config: DataConfig, layout: Layout, purpose: Purpose) -> None:
    check_layout(layout, purpose, config.columns, config.path)
    if layout == "tokens" and config.system_prompt is not None:
        raise DataFileError(
            f"expected no system_prompt with the layout tokens of {config.path}, since its rows are tokenized; remove it"
        )


def _check_bad(config: DataConfig, purpose: Purpose, bad: RowTally, any_good: bool) -> None:
    if bad.total and (config.on_bad_row == "error" or not any_good):
        remedy = "mend or remove these rows" + ("" if config.on_bad_row == "skip" else ", or set on_bad_row to skip")
        raise DataRowsError(f"{purpose} rows in {config.path}", bad, remedy)


def _object(value: object) -> RowObject:
    if isinstance(value, Malformed):
        raise value
    if not isinstance(value, dict):
        raise Malformed("not_an_object", f"expected an object, got {kind(value)}")
    return value


def _with_system(messages: tuple[Turn, ...], system_prompt: str | None) -> tuple[Turn, ...]:
    if system_prompt is None or any(message["role"] == "system" for message in messages):
        return messages
    return (turn("system", system_prompt), *messages)
