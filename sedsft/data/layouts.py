"""Layouts of a row: which columns each one has, which one a row is in, and how it becomes a conversation or token ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from sedsft.config import Layout
from sedsft.data import DataFileError
from sedsft.data.values import (
    SHAREGPT,
    Malformed,
    RowObject,
    Turn,
    as_turns,
    column,
    first,
    gold,
    integers,
    kind,
    listed,
    lookup,
    optional_text,
    text,
    text_column,
    turn,
    turns,
)

Purpose = Literal["SFT", "RL"]

_MAX_TOKEN_ID = 2**31 - 1
# Not taken from sedsft.vocabulary, which needs torch.
_IGNORED_LABEL = -100

_COLUMNS: dict[Purpose, dict[Layout, tuple[tuple[str, ...], ...]]] = {
    "SFT": {
        "tokens": (("input_ids",), ("labels",)),
        "messages": (("messages",),),
        "sharegpt": (("conversations",),),
        "prompt_completion": (("prompt",), ("completion", "response")),
        "question_answer": (("question", "problem"), ("response", "solution", "answer")),
        "alpaca": (("instruction",), ("output",)),
        "verl": (("extra_info.question",), ("extra_info.answer",)),
    },
    "RL": {
        "messages": (("messages",), ("answer",)),
        "prompt_completion": (("prompt",), ("answer",)),
        "question_answer": (("question", "problem"), ("answer", "response")),
        "verl": (("prompt",), ("reward_model",)),
    },
}
"""What a row must have: one column out of each tuple. The order is that in which candidates are named."""

_OPTIONAL: dict[Layout, tuple[str, ...]] = {
    "tokens": ("attention_mask",),
    "sharegpt": ("system",),
    "alpaca": ("input", "system", "history"),
}


def check_layout(layout: Layout, purpose: Purpose, columns: Mapping[str, str], path: str) -> None:
    """Refuse a layout that the purpose has not, and renamed columns that the layout has not.

    Raises:
        DataFileError: what the layouts or the columns are.
    """
    if layout not in _COLUMNS[purpose]:
        raise DataFileError(f"expected a layout for {purpose} ({_layouts(purpose)}), got {layout!r} for {path}")
    known = [name for choice in _COLUMNS[purpose][layout] for name in choice] + list(_OPTIONAL.get(layout, ()))
    if unknown := sorted(columns.keys() - set(known)):
        raise DataFileError(
            f"expected the keys of `columns` to be columns of the layout {layout} ({', '.join(known)}), got "
            f"{', '.join(unknown)} for {path}; remove them, or set `format`"
        )


def rename(row: RowObject, columns: Mapping[str, str]) -> RowObject:
    """The row with the layout's names of its columns. A column given to one name is not there under its own.

    A name whose column is missing or null is missing, even where the row has a column of that name.
    """
    if not columns:
        return row
    taken = columns.keys() | set(columns.values())
    values = {name: lookup(row, source) for name, source in columns.items()}
    others = {name: value for name, value in row.items() if name not in taken}
    return others | {name: value for name, value in values.items() if value is not None}


def detect(row: RowObject, purpose: Purpose, path: str) -> Layout:
    """The one layout whose columns the row has.

    Raises:
        DataFileError: none fits, or several do; names them.
    """
    fits = [
        layout
        for layout, needed in _COLUMNS[purpose].items()
        if all(any(lookup(row, name) is not None for name in choice) for choice in needed)
    ]
    if len(fits) == 1:
        return fits[0]
    names = listed(row)
    if fits:
        raise DataFileError(f"expected columns of one layout in {path}, got {names}, which fit {', '.join(fits)}; set `format`")
    raise DataFileError(
        f"expected the columns of a layout for {purpose} in {path} ({_layouts(purpose)}), got {names}; name them with `columns`"
    )


def _layouts(purpose: Purpose) -> str:
    return "; ".join(
        f"{layout}: {' + '.join('|'.join(choice) for choice in needed)}" for layout, needed in _COLUMNS[purpose].items()
    )


# ----------------------------------------------------------------------------------------------------- SFT


def conversation(row: RowObject, layout: Layout) -> tuple[Turn, ...]:
    """Turns of a row for SFT in any layout but `tokens`, of which a user's and later an assistant's are among them."""
    if layout == "messages":
        messages = turns(column(row, "messages"), "messages")
    elif layout == "sharegpt":
        messages = _with_own_system(row, turns(column(row, "conversations"), "conversations", SHAREGPT))
    elif layout == "alpaca":
        messages = _alpaca(row)
    elif layout == "prompt_completion":
        messages = _prompt_completion(row)
    elif layout == "verl":
        messages = _question_answer(row, ("extra_info.question",), ("extra_info.answer",))
    else:
        messages = _question_answer(row, ("question", "problem"), ("response", "solution", "answer"))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Malformed("no_assistant_turn", "expected an assistant turn, got none")
    if "user" not in roles[: roles.index("assistant")]:
        raise Malformed("turn_order", "expected a user turn before the first assistant turn, got none")
    return messages


def _question_answer(row: RowObject, questions: tuple[str, ...], answers: tuple[str, ...]) -> tuple[Turn, ...]:
    return turn("user", text_column(row, *questions)), turn("assistant", text_column(row, *answers))


def _prompt_completion(row: RowObject) -> tuple[Turn, ...]:
    if lookup(row, "completion") is not None and lookup(row, "response") is not None:
        raise Malformed("conflicting_columns", "expected one of completion and response, got both")
    name = first(row, "completion", "response")
    prompt = as_turns(column(row, "prompt"), "prompt", "user")
    return (*prompt, *as_turns(column(row, name), name, "assistant"))


def _alpaca(row: RowObject) -> tuple[Turn, ...]:
    """Earlier exchanges, then the instruction with its input below a blank line, then the output."""
    history = lookup(row, "history") or []
    if not isinstance(history, list):
        raise Malformed("wrong_type", f"expected history to be a list of pairs, got {kind(history)}")
    messages: list[Turn] = []
    for index, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Malformed("wrong_type", f"expected history[{index}] to be a pair of instruction and output, got {kind(pair)}")
        for role, item, value in zip(("user", "assistant"), (0, 1), pair, strict=True):
            messages.append(turn(role, text(value, f"history[{index}][{item}]")))
    asked = [text_column(row, "instruction"), optional_text(row, "input")]
    messages.append(turn("user", "\n\n".join(part for part in asked if part is not None)))
    messages.append(turn("assistant", text_column(row, "output")))
    return _with_own_system(row, tuple(messages))


def _with_own_system(row: RowObject, messages: tuple[Turn, ...]) -> tuple[Turn, ...]:
    system = optional_text(row, "system")
    if system is None:
        return messages
    if any(message["role"] == "system" for message in messages):
        raise Malformed("conflicting_columns", "expected one system prompt, got a system turn and the column system")
    return (turn("system", system), *messages)


def tokens(row: RowObject) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
    """Token ids and the mask of trained ones, up to the last one trained, since nothing behind it bears on the loss.

    Labels repeat the id where a token is trained and are -100 elsewhere; the first token is never trained, as no token
    comes before it. A padded row must be padded on the right.
    """
    ids = integers(column(row, "input_ids"), "input_ids", 0, _MAX_TOKEN_ID)
    labels = integers(column(row, "labels"), "labels", _IGNORED_LABEL, _MAX_TOKEN_ID)
    if len(ids) != len(labels):
        raise Malformed("label_count", f"expected as many labels as input_ids, got {len(labels)} and {len(ids)}")
    ids_T, labels_T = np.array(ids, np.int32), np.array(labels, np.int32)
    trained_T = labels_T != _IGNORED_LABEL
    differs = np.flatnonzero(trained_T & (labels_T != ids_T))
    if len(differs):
        at = int(differs[0])
        raise Malformed(
            "label_mismatch", f"expected labels[{at}] to be {_IGNORED_LABEL} or input_ids[{at}] = {ids[at]}, got {labels[at]}"
        )
    trained_T[:1] = False
    if not trained_T.any():
        raise Malformed("no_trained_token", "expected a trained token behind the first, got labels of -100 only")
    length = int(np.flatnonzero(trained_T)[-1]) + 1
    if lookup(row, "attention_mask") is not None:
        mask = integers(column(row, "attention_mask"), "attention_mask", 0, 1)
        if len(mask) != len(ids) or 0 in mask[:length]:
            raise Malformed(
                "attention_mask",
                "expected attention_mask to be 1 up to the last trained token, got padding there or another length",
            )
    return ids_T[:length], trained_T[:length]


# ------------------------------------------------------------------------------------------------------ RL


def prompt_and_gold(row: RowObject, layout: Layout) -> tuple[tuple[Turn, ...], str]:
    """Turns of a row for RL, the last the user's, and its gold answer, which may be empty."""
    if layout == "question_answer":
        messages: tuple[Turn, ...] = (turn("user", text_column(row, "question", "problem")),)
        name = first(row, "answer", "response")
        answer = gold(column(row, name), name).rsplit("####", 1)[-1].strip()
    elif layout == "verl":
        messages = as_turns(column(row, "prompt"), "prompt", "user")
        model = column(row, "reward_model")
        if not isinstance(model, dict):
            raise Malformed("wrong_type", f"expected reward_model to be an object with ground_truth, got {kind(model)}")
        answer = gold(model.get("ground_truth"), "reward_model.ground_truth")
    else:
        source = "messages" if layout == "messages" else "prompt"
        messages = as_turns(column(row, source), source, "user")
        answer = gold(column(row, "answer"), "answer")
    if messages[-1]["role"] != "user":
        raise Malformed("turn_order", f"expected the last turn of a prompt to be the user's, got the {messages[-1]['role']}'s")
    return messages, answer
