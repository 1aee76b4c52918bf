r"""What is wrong with a gold answer, by its text alone: no algebra system is loaded, so the API can check golds at submit.

    python -m sedsft.rewards.golds <cpu seconds per item> <memory MiB> <parent pid>

serves as a scoring process does: the reward of a gold is 1 without a fatal fault, and `extracted` says what the fault is.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sedsft.records import ScoringItem
from sedsft.rewards import child
from sedsft.rewards.answer_text import closing_brace, last_box, read_answer
from sedsft.rewards.verdict import Reward
from sedsft.tasks.countdown import countdown_verdict

MAX_GOLD_CHARS = 20_000
GOLD_COMMAND = (sys.executable, "-m", "sedsft.rewards.golds")
COUNTDOWN = "countdown"
"""Data source of an item whose gold is a countdown problem."""

GoldFaultKind = Literal["empty_gold", "unparsable_gold", "no_self_match", "odd_gold"]

_ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([A-Za-z]+\*?)\}")
_LOST_ROW_BREAK = re.compile(r"(?<!\\)(?:\\\\)*\\(?=[-+\d])")
_NO_ARGUMENT = re.compile(r"\\(?:[dtc]?frac|sqrt)\s*(?:$|[,;=)\]}])")


@dataclass(frozen=True, slots=True)
class GoldFault:
    """One defect. An `odd_gold` can be matched, by `math` at least; the other kinds cannot, or only by the same defect."""

    kind: GoldFaultKind
    reason: str

    @property
    def fatal(self) -> bool:
        """Whether no right answer can match the gold."""
        return self.kind != "odd_gold"


def math_gold_fault(gold: str) -> GoldFault | None:
    r"""The first fault of a mathematical gold; None when it is sound.

    Sound means: not empty, braces and environments balanced, rows of matrices separated by `\\`, fractions with arguments,
    and equal to itself once boxed. Outer braces and stray punctuation at the end are odd.
    """
    if len(gold) > MAX_GOLD_CHARS:
        return GoldFault("unparsable_gold", f"expected a gold of at most {MAX_GOLD_CHARS} characters, got {len(gold)}")
    reading = read_answer(gold)
    if not reading.text:
        return GoldFault("empty_gold", f"expected a gold answer, got nothing to compare in {gold!r}")
    if (reason := next(_broken_latex(gold), None)) is not None:
        return GoldFault("unparsable_gold", reason)
    boxed = last_box(rf"\boxed{{{gold}}}")
    if boxed is None or read_answer(boxed) != reading:
        return GoldFault("no_self_match", f"expected the gold to match itself in a box, got {boxed!r} out of \\boxed{{{gold}}}")
    if gold.strip().endswith((",", ";")):
        return GoldFault("odd_gold", f"stray punctuation at the end of {gold!r}")
    if gold.strip().startswith("{") and closing_brace(gold.strip()) == len(gold.strip()) - 1:
        return GoldFault("odd_gold", f"outer braces in {gold!r}")
    return None


def _broken_latex(gold: str) -> Iterator[str]:
    depth = 0
    for brace in re.findall(r"(?<!\\)(?:\\\\)*([{}])", gold):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            break
    if depth:
        yield f"expected balanced braces, got {gold!r}"
    environments: list[str] = []
    for side, name in _ENVIRONMENT.findall(gold):
        if side == "begin":
            environments.append(name)
        elif not environments or environments.pop() != name:
            yield f"expected every \\end to close a \\begin, got {gold!r}"
            return
    if environments:
        yield f"expected \\end{{{environments[-1]}}}, got {gold!r}"
    if _LOST_ROW_BREAK.search(gold):
        yield rf"expected rows separated by \\, got {gold!r} with a single \ before a number"
    if _NO_ARGUMENT.search(gold):
        yield f"expected arguments of every fraction and root, got {gold!r}"


def countdown_gold_fault(gold: str) -> GoldFault | None:
    """Why `gold` is no countdown problem; None when it is one."""
    try:
        countdown_verdict(gold, "")
    except ValueError as error:
        return GoldFault("unparsable_gold", str(error))
    return None


def _scored(item: ScoringItem) -> Reward:
    fault = (countdown_gold_fault if item.data_source == COUNTDOWN else math_gold_fault)(item.gold)
    if fault is None:
        return Reward(1.0)
    return Reward(0.0 if fault.fatal else 1.0, f"{fault.kind}: {fault.reason}")


def main(arguments: Sequence[str]) -> None:
    """Serve gold checks."""
    limits = child.ChildLimits.of(list(arguments))
    child.limit_process(limits)
    child.serve(_scored, limits.cpu_s, child.take_stdout())


if __name__ == "__main__":
    main(sys.argv[1:])
