"""Reads the rows of a data file, in any of the usual layouts, and refuses what cannot be used by line number.

Needs neither torch nor a tokenizer: the API reads a job's data with it before anything starts.

| layout            | columns for SFT                                      | columns for RL                            |
|-------------------|------------------------------------------------------|-------------------------------------------|
| messages          | messages                                             | messages, answer                          |
| prompt_completion | prompt, completion or response                       | prompt, answer                            |
| question_answer   | question or problem, response or solution or answer  | question or problem, answer or response   |
| verl              | (none: the rows have no response)                    | prompt, reward_model.ground_truth         |

`prompt` and `completion` are texts or lists of turns. Where a row has several of the columns joined by "or", the first one
counts, except that both a completion and a response are refused; other columns are ignored. A gold answer with GSM8K's
`#### 42` in a question_answer row is what follows the mark. Lines count from 1; in .parquet and .json files they are rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from sedsft.config import DataConfig
from sedsft.data import BadRow, DataFileError, DataRowsError
from sedsft.records import Row

Purpose = Literal["SFT", "RL"]
Layout = Literal["messages", "prompt_completion", "question_answer", "verl"]
Turn = dict[str, str]

_ROLES = ("system", "user", "assistant")

_COLUMNS: dict[Purpose, dict[Layout, tuple[tuple[str, ...], ...]]] = {
    "SFT": {
        "messages": (("messages",),),
        "prompt_completion": (("prompt",), ("completion", "response")),
        "question_answer": (("question", "problem"), ("response", "solution", "answer")),
    },
    "RL": {
        "messages": (("messages",), ("answer",)),
        "prompt_completion": (("prompt",), ("answer",)),
        "question_answer": (("question", "problem"), ("answer", "response")),
        "verl": (("prompt",), ("reward_model",)),
    },
}
"""What a row must have: one column out of each tuple."""


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Prompts with a gold answer; `skipped` are the lines of well-formed rows whose gold answer is empty."""

    rows: tuple[Row, ...]
    skipped: tuple[int, ...]


class _Malformed(Exception):
    """The reason why one row is refused."""


class _EmptyGold(Exception):
    """A well-formed row whose gold answer is empty."""


def read_sft_rows(config: DataConfig) -> tuple[Row, ...]:
    """Conversations with at least one assistant turn.

    Raises:
        DataRowsError: rows that cannot be used, all in one error.
        DataFileError: a file that is missing, empty, of another type, or whose layout is not clear.
    """
    rows, _ = _read(config, "SFT", _sft_row)
    return rows


def read_prompt_rows(config: DataConfig) -> PromptRows:
    """Conversations that end with a user turn, with their gold answers. Raises as `read_sft_rows` does."""
    rows, skipped = _read(config, "RL", _prompt_row)
    if not rows:
        raise DataFileError(f"expected gold answers in {config.path}, got {len(skipped)} rows with an empty one; fill them in")
    return PromptRows(rows, skipped)


def read_benchmark(path: str, max_rows: int | None = None, system_prompt: str | None = None) -> tuple[Row, ...]:
    """Rows with the columns `problem` and `answer`, as one user turn each. Raises as `read_sft_rows` does."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    for line, row in _numbered(Path(path), max_rows):
        try:
            messages = (_turn("user", _text(_column(row, "problem"), "problem")),)
            answer = _text(_gold(_column(row, "answer"), "answer"), "answer")
            rows.append(Row(_with_system(messages, system_prompt), answer, line))
        except _Malformed as error:
            bad.append(BadRow(line, str(error)))
    if bad:
        raise DataRowsError(f"every row of {path} to have a problem and an answer", bad, "mend or remove these rows")
    return tuple(rows)


# ------------------------------------------------------------------------------------------------- layouts


def _read(
    config: DataConfig, purpose: Purpose, convert: Callable[[object, Layout], tuple[tuple[Turn, ...], str | None]]
) -> tuple[tuple[Row, ...], tuple[int, ...]]:
    """Rows, and lines of rows with an empty gold."""
    rows: list[Row] = []
    skipped: list[int] = []
    bad: list[BadRow] = []
    layout: Layout | None = None if config.format == "auto" else config.format
    if layout is not None and layout not in _COLUMNS[purpose]:
        raise DataFileError(f"expected a layout for {purpose} ({_layouts(purpose)}), got {layout!r} for {config.path}")
    for line, row in _numbered(Path(config.path), config.max_rows):
        if layout is None and isinstance(row, dict):
            layout = _detect(row, purpose, config.path)
        try:
            messages, answer = convert(row, layout or "messages")
            rows.append(Row(_with_system(messages, config.system_prompt), answer, line))
        except _EmptyGold:
            skipped.append(line)
        except _Malformed as error:
            bad.append(BadRow(line, str(error)))
    if bad:
        raise DataRowsError(f"{purpose} rows in {config.path}", bad, "mend or remove these rows")
    return tuple(rows), tuple(skipped)


def _detect(row: Mapping[str, object], purpose: Purpose, path: str) -> Layout:
    """The one layout whose columns the row has."""
    fits = [
        layout
        for layout, needed in _COLUMNS[purpose].items()
        if all(any(row.get(column) is not None for column in choice) for choice in needed)
    ]
    if len(fits) == 1:
        return fits[0]
    columns = ", ".join(map(str, row)) or "no columns"
    if fits:
        raise DataFileError(
            f"expected columns of one layout in {path}, got {columns}, which fit {', '.join(fits)}; set `format`"
        )
    raise DataFileError(f"expected the columns of a layout for {purpose} in {path} ({_layouts(purpose)}), got {columns}")


def _layouts(purpose: Purpose) -> str:
    return "; ".join(
        f"{layout}: {' + '.join('|'.join(choice) for choice in needed)}" for layout, needed in _COLUMNS[purpose].items()
    )


def _sft_row(row: object, layout: Layout) -> tuple[tuple[Turn, ...], None]:
    if layout == "messages":
        messages = _turns(_column(row, "messages"), "messages")
    elif layout == "prompt_completion":
        if _has(row, "completion") and _has(row, "response"):
            raise _Malformed("expected one of completion and response, got both")
        name = _first(row, "completion", "response")
        prompt = _as_turns(_column(row, "prompt"), "prompt", "user")
        messages = (*prompt, *_as_turns(_column(row, name), name, "assistant"))
    else:
        name = _first(row, "response", "solution", "answer")
        messages = (_question(row), _turn("assistant", _text(_column(row, name), name)))
    roles = [turn["role"] for turn in messages]
    if "assistant" not in roles:
        raise _Malformed("expected an assistant turn, got none")
    if "user" not in roles[: roles.index("assistant")]:
        raise _Malformed("expected a user turn before the first assistant turn, got none")
    return messages, None


def _prompt_row(row: object, layout: Layout) -> tuple[tuple[Turn, ...], str]:
    if layout == "question_answer":
        messages: tuple[Turn, ...] = (_question(row),)
        name = _first(row, "answer", "response")
        gold = _gold(_column(row, name), name).rsplit("####", 1)[-1].strip()
    elif layout == "verl":
        messages = _as_turns(_column(row, "prompt"), "prompt", "user")
        model = _column(row, "reward_model")
        if not isinstance(model, dict):
            raise _Malformed(f"expected reward_model to be an object with ground_truth, got {_kind(model)}")
        gold = _gold(model.get("ground_truth"), "reward_model.ground_truth")
    else:
        source = "messages" if layout == "messages" else "prompt"
        messages = _as_turns(_column(row, source), source, "user")
        gold = _gold(_column(row, "answer"), "answer")
    if messages[-1]["role"] != "user":
        raise _Malformed(f"expected the last turn of a prompt to be the user's, got the {messages[-1]['role']}'s")
    if not gold:
        raise _EmptyGold
    return messages, gold


# -------------------------------------------------------------------------------------------------- values


def _has(row: object, column: str) -> bool:
    return isinstance(row, dict) and row.get(column) is not None


def _column(row: object, column: str) -> object:
    if isinstance(row, _Malformed):
        raise row
    if not isinstance(row, dict):
        raise _Malformed(f"expected an object, got {_kind(row)}")
    if row.get(column) is None:
        state = "null" if column in row else f"the columns {', '.join(map(str, row)) or '(none)'}"
        raise _Malformed(f"expected the column {column}, got {state}")
    return row[column]


def _first(row: object, *columns: str) -> str:
    """The first of the columns that the row has; the first of all if it has none, so that the error names it."""
    return next((column for column in columns if _has(row, column)), columns[0])


def _question(row: object) -> Turn:
    name = _first(row, "question", "problem")
    return _turn("user", _text(_column(row, name), name))


def _text(value: object, name: str) -> str:
    """A text that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise _Malformed(f"expected {name} to be a text, got {_kind(value)}")
    if not value.strip():
        raise _Malformed(f"expected {name} to have content, got an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Malformed(f"expected {name} to be valid Unicode, got a lone surrogate") from None
    return value


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}


def _as_turns(value: object, name: str, role: str) -> tuple[Turn, ...]:
    """Turns from a list of turns, or one turn of `role` from a text."""
    return (_turn(role, _text(value, name)),) if isinstance(value, str) else _turns(value, name)


def _turns(value: object, name: str) -> tuple[Turn, ...]:
    if not isinstance(value, list):
        raise _Malformed(f"expected {name} to be a list of turns, got {_kind(value)}")
    if not value:
        raise _Malformed(f"expected turns in {name}, got an empty list")
    turns = []
    for index, turn in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(turn, dict):
            raise _Malformed(f"expected {where} to be an object with role and content, got {_kind(turn)}")
        role = turn.get("role")
        if role not in _ROLES:
            raise _Malformed(f"expected the role of {where} to be one of {', '.join(_ROLES)}, got {role!r:.60}")
        extra = [str(key) for key, item in turn.items() if key not in ("role", "content") and item is not None]
        if extra:
            raise _Malformed(f"expected {where} to have role and content only, got {', '.join(extra)} too")
        turns.append(_turn(cast(str, role), _text(turn.get("content"), f"the content of {where}")))
    return tuple(turns)


def _gold(value: object, name: str) -> str:
    """Gold answer as a text, possibly empty: texts as they are, numbers without a trailing .0, a list of one as its item."""
    if isinstance(value, list) and len(value) == 1:
        return _gold(value[0], f"{name}[0]")
    if isinstance(value, str):
        return _text(value, name).strip() if value.strip() else ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise _Malformed(f"expected {name} to be a text, a finite number or a list of one of them, got {_kind(value)}")


def _kind(value: object) -> str:
    """A value's type as JSON names it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return "a text"
    return "an object" if isinstance(value, dict) else type(value).__name__


def _with_system(messages: tuple[Turn, ...], system_prompt: str | None) -> tuple[Turn, ...]:
    if system_prompt is None or any(turn["role"] == "system" for turn in messages):
        return messages
    return (_turn("system", system_prompt), *messages)


# --------------------------------------------------------------------------------------------------- files


def _numbered(path: Path, max_rows: int | None) -> Iterator[tuple[int, object]]:
    """Values of the file's first rows with their line numbers. What is no value comes as `_Malformed`."""
    readers: dict[str, Callable[[Path], Iterator[object]]] = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
    if path.suffix not in readers:
        raise DataFileError(f"expected a file ending in {', '.join(readers)}, got {path}")
    if not path.is_file():
        raise DataFileError(f"expected a data file, got {path}, which {'is no file' if path.exists() else 'does not exist'}")
    line = 0
    try:
        for line, value in enumerate(islice(readers[path.suffix](path), max_rows), start=1):
            yield line, value
    except OSError as error:
        raise DataFileError(f"expected a readable file, got {error}") from error
    if line == 0:
        raise DataFileError(f"expected rows in {path}, got an empty file")


def _jsonl(path: Path) -> Iterator[object]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield _json_value(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def _json_value(line: bytes) -> object:
    if not line.strip():
        return _Malformed("expected an object, got an empty line")
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _Malformed(f"expected UTF-8, got byte 0x{line[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return _Malformed(f"expected JSON, got {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested thousands deep
        return _Malformed(f"expected JSON that can be read, got: {error}")


def _json(path: Path) -> Iterator[object]:
    value = _json_value(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(value, _Malformed):
        raise DataFileError(f"{value} in {path}")
    if not isinstance(value, list):
        raise DataFileError(f"expected a list of rows in {path}, got {_kind(value)}; use .jsonl for one object per line")
    yield from value


def _parquet(path: Path) -> Iterator[object]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataFileError(f"expected a readable parquet file, got {path}: {error}") from error
