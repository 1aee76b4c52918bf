"""Compares an output with a gold answer in one of three ways. Nothing of the output is ever evaluated as code.

`math_verify`  last balanced box; text, exact numbers, then guarded algebra (`math_answer`). The default.
`strict`       string equality with the last `\\boxed{}` of the last 100 characters: the reward of the SED-SFT authors' RL runs
               (verl's `math_dapo` with strict boxes). Unlike theirs, an empty gold matches nothing.
`qwen`         the conventions of Qwen2.5-Math's evaluation, which the paper's tables follow (`qwen_answer`).

Importing this module loads no algebra system. Calls belong into the main thread of a process that can be killed: `math_verify`
and `qwen` bound the algebra by SIGALRM, which an arithmetic operation inside C code can outlast.
"""

from __future__ import annotations

import importlib
from typing import Literal, get_args

from sedsft.rewards.verdict import Verdict

Mode = Literal["math_verify", "strict", "qwen"]
STRICT_TAIL_CHARS = 100


def verify(gold: str, output: str, mode: Mode = "math_verify") -> Verdict:
    """The verdict on `output`. Never raises but on an unknown mode or a lack of memory: what goes wrong is its status."""
    if mode not in get_args(Mode):
        raise ValueError(f"expected one of the modes {', '.join(get_args(Mode))}, got {mode!r}")
    try:
        return judge(gold, output, mode)
    except TimeoutError:
        return Verdict("timeout", None, None)
    except MemoryError:
        # Not a property of this output: whoever limits the memory of the process decides.
        raise
    except Exception:  # noqa: BLE001 any output must get a verdict, and libraries raise errors of any type on hostile text
        return Verdict("error", None, None)


def judge(gold: str, output: str, mode: Mode) -> Verdict:
    """As `verify`, but lets errors through, so that whoever records them can say what happened.

    Raises:
        TimeoutError: the algebra did not finish.
    """
    if mode == "strict":
        return strict_verdict(gold, output)
    if mode == "qwen":
        verdict: Verdict = importlib.import_module("sedsft.rewards.qwen_answer").qwen_verdict(gold, output)
    else:
        verdict = importlib.import_module("sedsft.rewards.math_answer").math_verdict(gold, output)
    return verdict


def strict_verdict(gold: str, output: str) -> Verdict:
    r"""String equality of `gold` with the content of the last `\boxed{` in the last 100 characters; a box cut off is none."""
    tail = output[-STRICT_TAIL_CHARS:]
    start = tail.rfind("\\boxed{")
    if start < 0:
        return Verdict("no_answer", False, None)
    depth = 0
    for position in range(start, len(tail)):
        depth += (tail[position] == "{") - (tail[position] == "}")
        if tail[position] == "}" and depth == 0:
            answer = tail[start + len("\\boxed{") : position]
            return Verdict("scored", bool(gold) and answer == gold, answer)
    return Verdict("no_answer", False, None)
