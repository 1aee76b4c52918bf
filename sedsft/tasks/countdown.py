"""Countdown: reach a target from three or four numbers, step by step. Every problem can have many valid derivations.

A problem is the text `3 7 2 5>24`, a derivation the text `7-3=4,4*5=20,...`: each step takes two of the values at hand, each
value is used exactly once, every value lies in 1..60, and the last result is the target. Spaces do not matter.
Groups: `3` has three numbers; `4` has four and a derivation without `*`; `H` has four and every derivation needs `*`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, combinations_with_replacement
from typing import NamedTuple

LARGEST_NUMBER = 9
LARGEST_VALUE = 60
GROUPS = ("3", "4", "H")

_PROBLEM = re.compile(r"\s*([1-9])((?:\s+[1-9])+)\s*>\s*([1-9][0-9]?)\s*")
_STEP = re.compile(r"\s*([1-9][0-9]?)\s*([-+*])\s*([1-9][0-9]?)\s*=\s*([1-9][0-9]?)\s*")
_LONGEST_RESPONSE = 1000


class Step(NamedTuple):
    """One line of a derivation: left op right = result."""

    left: int
    op: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.op}{self.right}={self.result}"

    def larger_first(self) -> Step:
        """The same step with the operands of + and * in falling order, so that equal steps look equal."""
        if self.op != "-" and self.left < self.right:
            return Step(self.right, self.op, self.left, self.result)
        return self


Derivation = tuple[Step, ...]


def derivation_text(steps: Derivation) -> str:
    """The steps as a model writes them, without spaces."""
    return ",".join(map(str, steps))


@dataclass(frozen=True, slots=True)
class Problem:
    """Numbers in rising order, a target, and all derivations (operands of + and * in falling order)."""

    numbers: tuple[int, ...]
    target: int
    derivations: tuple[Derivation, ...]

    @property
    def group(self) -> str:
        """`3`, `4` or `H`, as the module's text defines them."""
        if len(self.numbers) == 3:
            return "3"
        return "4" if self.is_narrow else "H"

    @property
    def is_narrow(self) -> bool:
        """True when some derivation does without `*`."""
        return any(all(step.op != "*" for step in steps) for steps in self.derivations)

    @property
    def held_out(self) -> bool:
        """True for the fifth of all problems that no training data may contain; depends on numbers and target alone."""
        digest = hashlib.sha256(problem_text(self.numbers, self.target).encode()).digest()
        return int.from_bytes(digest[:8], "big") % 5 == 0

    def canonical(self) -> Derivation:
        """The derivation that narrow data show: fewest `*`, then fewest `-`, then the larger operands first."""
        return min(self.derivations, key=_narrowness)

    def sample_text(self, rng: random.Random) -> str:
        """The problem with its numbers in random order."""
        return problem_text(rng.sample(self.numbers, len(self.numbers)), self.target)

    def sample_derivation(self, rng: random.Random) -> Derivation:
        """A uniformly random derivation with random operand order in + and *."""
        steps = rng.choice(self.derivations)
        return tuple(Step(s.right, s.op, s.left, s.result) if s.op != "-" and rng.random() < 0.5 else s for s in steps)


def problem_text(numbers: Sequence[int], target: int) -> str:
    """Numbers and target as prompt and gold answer spell them, such as `3 7 2 5>24`."""
    return f"{' '.join(map(str, numbers))}>{target}"


def _narrowness(steps: Derivation) -> tuple[int, int, tuple[tuple[int, int], ...]]:
    ops = Counter(step.op for step in steps)
    return ops["*"], ops["-"], tuple((-step.left, -step.right) for step in steps)


@cache
def all_problems() -> tuple[Problem, ...]:
    """Every solvable problem of three or four numbers in 1..9 and a target in 1..60, with all its derivations."""
    problems = []
    for count in (3, 4):
        for numbers in combinations_with_replacement(range(1, LARGEST_NUMBER + 1), count):
            by_target: dict[int, list[Derivation]] = {}
            for steps in _derivations(numbers):
                by_target.setdefault(steps[-1].result, []).append(steps)
            problems += [Problem(numbers, target, tuple(by_target[target])) for target in sorted(by_target)]
    return tuple(problems)


@cache
def _derivations(values: tuple[int, ...]) -> tuple[Derivation, ...]:
    """All ways to combine `values` (rising order) into one value. Equal values are interchangeable and counted once."""
    if len(values) == 1:
        return ((),)
    found = []
    for right, left in sorted(set(combinations(values, 2))):
        rest = list(values)
        rest.remove(left)
        rest.remove(right)
        for op, result in (("+", left + right), ("-", left - right), ("*", left * right)):
            if 1 <= result <= LARGEST_VALUE:
                step = Step(left, op, right, result)
                found += [(step, *tail) for tail in _derivations(tuple(sorted([*rest, result])))]
    return tuple(found)


def countdown_verdict(gold: str, response: str) -> tuple[bool, str | None]:
    """Whether `response` derives the target of the problem `gold`, and the derivation in a form that equal ones share.

    Every step is checked, since the target stands in the prompt: operands must be at hand and are used up, the arithmetic
    must hold, all values lie in 1..60, all numbers are used, and the last result is the target. The form has the operands of
    + and * in falling order and no spaces; it is None when the response does not parse as steps. A wrong derivation has a
    form too.

    Raises:
        ValueError: `gold` is not a problem text.
    """
    problem = _PROBLEM.fullmatch(gold)
    if problem is None:
        raise ValueError(f"expected a countdown problem such as '3 7 2 5>24', got {gold!r}; fix the gold answer of this row")
    at_hand = Counter(map(int, (problem[1], *problem[2].split())))
    if len(response) > _LONGEST_RESPONSE:
        return False, None
    steps = []
    for part in response.split(","):
        match = _STEP.fullmatch(part)
        if match is None:
            return False, None
        steps.append(Step(int(match[1]), match[2], int(match[3]), int(match[4])))
    canonical = derivation_text(tuple(step.larger_first() for step in steps))
    return _derives(steps, at_hand, int(problem[3])), canonical


def _derives(steps: Sequence[Step], at_hand: Counter[int], target: int) -> bool:
    for left, op, right, result in steps:
        at_hand.subtract((left, right))
        if min(at_hand.values()) < 0 or not 1 <= result <= LARGEST_VALUE:
            return False
        if result != {"+": left + right, "-": left - right, "*": left * right}[op]:
            return False
        at_hand[result] += 1
    return at_hand.total() == 1 and at_hand[target] == 1
