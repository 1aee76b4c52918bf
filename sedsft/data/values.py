"""Checks of the values in a row: texts, turns, gold answers, token ids. What does not fit is `Malformed`, with the reason."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sedsft.data import BadRowKind

Turn = dict[str, str]
RowObject = dict[str, object]


class Malformed(Exception):
    """The reason why one row is refused: its kind, and for people what was expected and what came."""

    def __init__(self, kind: BadRowKind, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, slots=True)
class TurnKeys:
    """How a layout writes a turn: the keys of its role and content, and its names of the roles."""

    role: str
    content: str
    roles: Mapping[str, str]


CHAT = TurnKeys("role", "content", {name: name for name in ("system", "user", "assistant")})
SHAREGPT = TurnKeys("from", "value", {"system": "system", "human": "user", "gpt": "assistant", **CHAT.roles})


def lookup(row: Mapping[str, object], name: str) -> object:
    """Value of a column, or of a field inside one by its dotted name; None where it is missing or null."""
    if name in row:
        return row[name]
    value: object = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def column(row: RowObject, name: str) -> object:
    """Value of a column that the row must have."""
    value = lookup(row, name)
    if value is None:
        if name in row:
            raise Malformed("null_column", f"expected the column {name}, got null")
        raise Malformed("missing_column", f"expected the column {name}, got the columns {listed(row)}")
    return value


def listed(names: Iterable[str]) -> str:
    """The first 20 names for people; what is no valid Unicode, as JSON's escapes can write it, is shown escaped."""
    names = list(names)
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return shown.encode("utf-8", "backslashreplace").decode() or "(none)"


def first(row: RowObject, *names: str) -> str:
    """The first of the columns that the row has; the first of all if it has none, so that the error names it."""
    return next((name for name in names if lookup(row, name) is not None), names[0])


def text(value: object, name: str) -> str:
    """A text that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise Malformed("wrong_type", f"expected {name} to be a text, got {kind(value)}")
    if not value.strip():
        raise Malformed("empty_text", f"expected {name} to have content, got an empty text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Malformed("invalid_unicode", f"expected {name} to be valid Unicode, got a lone surrogate") from None
    return value


def text_column(row: RowObject, *names: str) -> str:
    """The text in the first of the columns that the row has."""
    name = first(row, *names)
    return text(column(row, name), name)


def optional_text(row: RowObject, name: str) -> str | None:
    """The text in a column that may be missing, null or blank."""
    value = lookup(row, name)
    return None if value is None or (isinstance(value, str) and not value.strip()) else text(value, name)


def turn(role: str, content: str) -> Turn:
    """A chat turn."""
    return {"role": role, "content": content}


def as_turns(value: object, name: str, role: str) -> tuple[Turn, ...]:
    """Turns from a list of turns, or one turn of `role` from a text."""
    return (turn(role, text(value, name)),) if isinstance(value, str) else turns(value, name)


def turns(value: object, name: str, keys: TurnKeys = CHAT) -> tuple[Turn, ...]:
    """Turns from a list of objects with a role and a content and nothing else."""
    if not isinstance(value, list):
        raise Malformed("wrong_type", f"expected {name} to be a list of turns, got {kind(value)}")
    if not value:
        raise Malformed("no_turns", f"expected turns in {name}, got an empty list")
    return tuple(_turn(item, f"{name}[{index}]", keys) for index, item in enumerate(value))


def _turn(item: object, where: str, keys: TurnKeys) -> Turn:
    if not isinstance(item, dict):
        raise Malformed("wrong_type", f"expected {where} to be an object with {keys.role} and {keys.content}, got {kind(item)}")
    role = item.get(keys.role)
    if not isinstance(role, str) or role not in keys.roles:
        raise Malformed("unknown_role", f"expected the role of {where} to be one of {', '.join(keys.roles)}, got {role!r:.60}")
    extra = [key for key, field in item.items() if key not in (keys.role, keys.content) and field is not None]
    if extra:
        raise Malformed(
            "unknown_field", f"expected {where} to have {keys.role} and {keys.content} only, got {listed(extra)} too"
        )
    return turn(keys.roles[role], text(item.get(keys.content), f"the content of {where}"))


def gold(value: object, name: str) -> str:
    """Gold answer as a text, possibly empty: texts as they are, numbers without a trailing .0, a list of one as its item."""
    if isinstance(value, list) and len(value) == 1:
        return gold(value[0], f"{name}[0]")
    if isinstance(value, str):
        return text(value, name).strip() if value.strip() else ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    raise Malformed("wrong_type", f"expected {name} to be a text, a finite number or a list of one of them, got {kind(value)}")


def integers(value: object, name: str, low: int, high: int) -> list[int]:
    """A list of whole numbers from `low` to `high`."""
    if not isinstance(value, list):
        raise Malformed("wrong_type", f"expected {name} to be a list of whole numbers, got {kind(value)}")
    for index, item in enumerate(value):
        if type(item) is not int or not low <= item <= high:
            raise Malformed(
                "not_a_token_id", f"expected {name}[{index}] to be a whole number from {low} to {high}, got {kind(item)}"
            )
    return value


def kind(value: object) -> str:
    """A value's type as JSON names it."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, bool | int | float):
        return f"{value!r:.60}"
    if isinstance(value, str):
        return "a text"
    return "an object" if isinstance(value, dict) else type(value).__name__
