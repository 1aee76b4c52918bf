"""A process that runs a reward function of the user's own behind the walls of `sedsft.rewards.confinement`.

    python -m sedsft.rewards.sandbox <memory MiB> <parent pid>

One line of JSON in, one out. First `{"source", "path", "function"}` and `{}` or `{"error"}`; then for every
`{"id", "arguments"}` one `{"id", "reward"}` or `{"id", "error"}`.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

from sedsft.rewards.confinement import Refused, confine

MEMORY_EXIT_CODE = 77
_LONGEST_REASON = 500


def _loaded(message: dict[str, Any]) -> Callable[..., Any]:
    """The function; runs the file."""
    module: dict[str, Any] = {"__name__": "reward", "__file__": message["path"]}
    exec(compile(message["source"], message["path"], "exec"), module)
    function = module.get(message["function"])
    if not callable(function):
        raise TypeError(f"expected a function {message['function']!r} in {message['path']}, got {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_LONGEST_REASON]


def _answer(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    try:
        value = function(*arguments)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return {"error": f"expected a finite number, got {str(value)[:100]!r}"}
        return {"reward": float(value)}
    except MemoryError:
        # The heap of a process that ran into its limit is not worth trusting: a fresh one takes over.
        os._exit(MEMORY_EXIT_CODE)
    except BaseException as error:  # noqa: BLE001 whatever the user's code raises, SystemExit too, is its item's error
        return {"error": _reason(error)}


def serve(lines: BinaryIO, out: BinaryIO) -> None:
    """Load the function, then answer until the owner closes the pipe."""

    def tell(message: dict[str, Any]) -> None:
        out.write(json.dumps(message).encode() + b"\n")

    try:
        function = _loaded(json.loads(lines.readline()))
    except BaseException as error:  # noqa: BLE001 the user's module runs here
        tell({"error": _reason(error)})
        return
    tell({})
    for line in lines:
        question = json.loads(line)
        tell({"id": question["id"], **_answer(function, question["arguments"])})


def main(arguments: list[str]) -> None:
    """Build the walls, then serve."""
    # What the code prints must not come between the answers; stderr leads nowhere.
    lines = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    os.dup2(2, 0)
    try:
        confine(int(arguments[0]), int(arguments[1]))
    except (Refused, OSError) as error:
        out.write(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    serve(lines, out)


if __name__ == "__main__":
    main(sys.argv[1:])
