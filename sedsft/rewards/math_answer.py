r"""Compares the boxed answer of a response with a gold answer: the default reward for mathematics.

From cheap and certain to dear: equal text, exact rational numbers, a decimal gold within its own rounding, lists by element,
then math-verify (sympy) behind guards. Model output is parsed as LaTeX only, never evaluated as Python.

math-verify bounds its own time with SIGALRM, so this module works in the main thread of a process only, and a call can
still hang inside one arithmetic operation: run it in a child process that can be killed.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from functools import lru_cache
from math import prod
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import parse, verify
from math_verify.errors import TimeoutException
from math_verify.parser import LatexExtractionConfig

from sedsft.rewards.answer_text import Answer, last_box, read_answer
from sedsft.rewards.exact_number import exact_number
from sedsft.rewards.numeric import differ
from sedsft.rewards.verdict import Verdict

MAX_CHARS = 512
MAX_NESTING = 50
MAX_DIGITS = 64
MAX_EXPONENT = 10_000
MAX_FACTORIAL = 1_000
MAX_TOWER = 24
"""Largest product of the numbers in a raised exponent: where a b <= 24, a^b is at most 3^8."""
MAX_EXPANSION = 50
"""Largest product of exponents on sums and functions in an answer with variables, since sympy multiplies those out."""
DECIMAL_RELATIVE_TOLERANCE = 1e-5
ALGEBRA_TIMEOUT_S = 2
"""Limit of each of math-verify's calls in whole seconds (it calls `signal.alarm`)."""

_LATEX_ONLY = (
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
        ),
    ),
)
_COSTLY = re.compile(r"\\(?:sum|prod|int|iint|oint|lim|bigcup|binom|dbinom|tbinom)(?![A-Za-z])|\*\*|!")
_SET_BUILDER = re.compile(r"^\\\{.*(?:\||\\mid|\\vert|:).*\\\}$", re.DOTALL)
_IN_BASE = re.compile(r"^\{?[0-9A-Z]+\}?_\{?\d+\}?$")
_CARET = re.compile(r"\^")
_POWER_OF_MANY = re.compile(r"(?:(?<![A-Za-z0-9])|(?<=\\[A-Za-z]{3})|(?<=\\[A-Za-z]{2}))\^")
"""A caret after anything but a number or a lone variable: a bracket, or a macro of two or three letters such as \\sin."""
_VARIABLE = re.compile(r"(?<![\\A-Za-z])(?![ei](?![A-Za-z]))[A-Za-z]+")
_ASSIGNMENT = re.compile(r"^(?:\\?[A-Za-z]+(?:_\{?\w+\}?)?(?:\([A-Za-z,]+\))?)(?:=|\\in(?![A-Za-z]))(?P<value>.+)$", re.DOTALL)


def math_verdict(gold: str, response: str) -> Verdict:
    """Whether the last boxed answer of `response` equals `gold`; `extracted` is None without an answer.

    Raises:
        TimeoutError: the algebra did not finish, so equality is unknown.
        RuntimeError: called outside the main thread, where math-verify cannot bound its time.
    """
    raw = last_box(response)
    if raw is None or not raw.strip():
        return Verdict("no_answer", False, None)
    if text_only(raw) or text_only(gold):
        return Verdict("scored", raw.strip() == gold.strip(), raw.strip()[:MAX_CHARS])
    truth, answer = read_answer(gold), read_answer(raw)
    if _equal(truth, answer):
        return Verdict("scored", True, _canonical(truth.text))
    return Verdict("scored", False, _canonical(answer.text))


def text_only(raw: str) -> bool:
    """Whether `raw` is too long or too deep to be compared by more than its characters."""
    return len(raw) > MAX_CHARS or _nesting(raw) > MAX_NESTING


def _canonical(text: str) -> str:
    """One string for all spellings of a rational number; other answers as they are spelled."""
    value = exact_number(text)
    return text if value is None else str(value)


def _equal(gold: Answer, answer: Answer) -> bool:
    if not gold.text or not answer.text or (gold.unit and answer.unit and gold.unit != answer.unit):
        return False
    if gold.text == answer.text:
        return True
    if gold.is_words and answer.is_words and gold.text.replace(" ", "") == answer.text.replace(" ", ""):
        return True  # data sets that drop every space spell golds such as `twolines`
    if gold.is_words or (answer.is_words and not gold.text.isalpha()):
        return False
    gold_text, answer_text = gold.text, _without_choice_letter(gold.text, answer.text)
    resolved = _resolved_equations(gold_text, answer_text)
    if resolved is None:
        return False
    gold_text, answer_text = resolved
    if gold_text == answer_text:
        return True
    same_number = _same_number(gold_text, answer_text, gold.percent, answer.percent)
    if same_number is not None:
        return same_number
    if any(_only_text(text) for text in (gold_text, answer_text)) or (len(gold_text) == len(answer_text) == 1):
        return False
    if exact_number(gold_text) is not None and _VARIABLE.search(answer_text):
        return False
    same_list = _same_list(gold_text, answer_text)
    if same_list is not None:
        return same_list
    return algebra_equal(gold_text, answer_text)


def _without_choice_letter(gold: str, answer: str) -> str:
    """`(C)27` is `C` to a gold that is a letter, and `27` to any other."""
    match = re.match(r"^\(([A-J])\)[.:]?(?P<rest>.+)$", answer)
    if match is None:
        return answer
    return match[1] if re.fullmatch("[A-J]", gold) else match["rest"]


def _resolved_equations(gold: str, answer: str) -> tuple[str, str] | None:
    """Drops `x=` where only one side names what it solves for; None for an answer that is an equation of another kind.

    `x=5`, `P(A)=5` and `2+3=5` give 5; `4=5` contradicts itself and `x+1=5` does not say what is 5.
    """
    gold_value, answer_value = _ASSIGNMENT.match(gold), _ASSIGNMENT.match(answer)
    if "=" in answer and "=" not in gold and "," not in answer:
        parts = answer.split("=")
        values = [value for part in parts if (value := exact_number(part)) is not None]
        named = answer_value is not None or not re.search(r"[-+0-9]", parts[0])
        if len(set(values)) > 1 or (len(values) < len(parts) and not named):
            return None
        return gold, parts[-1]
    if answer_value and not gold_value and "=" not in answer_value["value"] and "\\in" not in gold:
        return gold, answer_value["value"]
    if gold_value and "=" not in gold_value["value"] and "=" not in answer and "\\in" not in answer:
        return gold_value["value"], answer
    return gold, answer


def _same_number(gold: str, answer: str, gold_percent: bool, answer_percent: bool) -> bool | None:
    """Exact comparison of two rational numbers; None unless both are.

    A decimal gold may stand for a longer number: the answer must round to it and agree to a relative 1e-5. A percent sign on
    one side only may or may not have been asked for: 10 and 1/10 both match 10%.
    """
    gold_value, answer_value = exact_number(gold), exact_number(answer)
    if gold_value is None or answer_value is None:
        return None
    candidates = {answer_value}
    if answer_percent and not gold_percent:
        candidates.add(answer_value / 100)
    if gold_percent and not answer_percent:
        candidates.add(answer_value * 100)
    if gold_value in candidates:
        return True
    decimals = re.fullmatch(r"-?\d*\.(\d+)", gold)
    if decimals is None:
        return False
    half_unit = 0.5 * 10.0 ** -len(decimals[1])
    return any(abs(gold_value - c) <= min(half_unit, DECIMAL_RELATIVE_TOLERANCE * abs(gold_value)) for c in candidates)


def _only_text(text: str) -> bool:
    """Answers that the algebra misreads: set-builders, numbers in a base, times and ratios, digits with a space between."""
    return bool(_SET_BUILDER.match(text) or _IN_BASE.match(text) or ":" in text or re.search(r"\d \d", text))


def _same_list(gold: str, answer: str) -> bool | None:
    """Compares comma-separated answers by element; None when that does not settle it.

    `\\{1,2\\}` and `1,2` are unordered and match each other. A tuple `(1,2)` matches a bare `1,2` in the same order and never
    a set. A single value never matches several.
    """
    (gold_kind, gold_items), (answer_kind, answer_items) = _items(gold), _items(answer)
    if len(gold_items) == 1 and len(answer_items) == 1:
        return None
    if len(gold_items) != len(answer_items) and not re.search(r"\\pm|\\mp|\\infty|<|>|\\le|\\ge|\\cup", gold + answer):
        return False
    if gold_kind and answer_kind and gold_kind != answer_kind:
        return False
    ordered = gold_kind not in ("", "{") or answer_kind not in ("", "{")
    gold_canonical, answer_canonical = [_canonical(i) for i in gold_items], [_canonical(i) for i in answer_items]
    if (gold_canonical == answer_canonical) if ordered else (Counter(gold_canonical) == Counter(answer_canonical)):
        return gold_kind == answer_kind or "[" not in gold_kind + answer_kind
    return None


def _items(text: str) -> tuple[str, list[str]]:
    r"""Brackets around the whole ("()", "{", "[)", "(]", "[]", "" for none) and the items between top-level commas."""
    kind, body = "", text
    if text.startswith("\\{") and text.endswith("\\}"):
        kind, body = "{", text[2:-2]
    elif re.fullmatch(r"[(\[][^()\[\]]*[)\]]", text):
        kind, body = text[0] + text[-1], text[1:-1]
    items, depth, start = [], 0, 0
    for position, char in enumerate(body):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            items.append(body[start:position])
            start = position + 1
    return kind, [*items, body[start:]]


def _too_costly(answer: str, gold: str) -> bool:
    """Whether the algebra could take unbounded time on `answer`; constructs that the gold itself has are let through."""
    if any(len(digits) > MAX_DIGITS for digits in re.findall(r"\d+", answer)):
        return True
    if any(int(n) > MAX_FACTORIAL for n in re.findall(r"(\d+)\s*!", answer)):
        return True
    gold_has = {match[0] for match in _COSTLY.finditer(gold)}
    if any(match[0] not in gold_has and match[0] != "!" for match in _COSTLY.finditer(answer)):
        return True
    if re.search(r"[)}\]!]\s*!", answer):
        return True
    exponents = _exponents(answer)
    towers = [exponent for exponent in exponents if "^" in exponent]
    if towers and not any("^" in exponent for exponent in _exponents(gold)):
        return True
    if any(tower.count("^") > 1 or _product([tower]) > MAX_TOWER for tower in towers):
        return True
    if _product(exponents) > MAX_EXPONENT:
        return True
    return bool(_VARIABLE.search(answer)) and _product(_exponents(answer, _POWER_OF_MANY)) > MAX_EXPANSION


def _product(exponents: list[str]) -> int:
    return prod(max(1, int(digits)) for exponent in exponents for digits in re.findall(r"\d+", exponent))


def _exponents(text: str, caret: re.Pattern[str] = _CARET) -> list[str]:
    """The argument of each match of `caret`; an argument that is itself raised (9^9^9) includes what follows."""
    found = []
    for match in caret.finditer(text):
        rest = text[match.end() :]
        depth, end = 0, 0
        for end, char in enumerate(rest, 1):
            depth += (char in "{(") - (char in "})")
            if depth <= 0 and not (rest[end : end + 1].isdigit() and char.isdigit()):
                break
        found.append(rest[: end + 1] if rest[end : end + 1] == "^" else rest[:end])
    return found


def _nesting(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "({[") - (char in ")}]")
        deepest = max(deepest, depth)
    return deepest


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """sympy's reading of `text`, or None when it cannot be read."""
    spaced = re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text)  # math-verify sees a complex number only in an `i` that stands alone
    found = parse(rf"\boxed{{{spaced}}}", _LATEX_ONLY, parsing_timeout=ALGEBRA_TIMEOUT_S, raise_on_error=True)
    return next((item for item in found if not isinstance(item, str)), None)


def algebra_equal(gold: str, answer: str) -> bool:
    """Whether sympy shows two texts of bounded length and depth to be equal; False for what could take unbounded time.

    Raises:
        TimeoutError: the algebra did not finish, so equality is unknown.
        RuntimeError: called outside the main thread, where math-verify cannot bound its time.
    """
    if _too_costly(answer, gold) or _too_costly(gold, gold):
        return False
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("expected the main thread of a scoring process (math-verify uses SIGALRM), got another thread")
    try:
        gold_expression, answer_expression = _parsed(gold), _parsed(answer)
        if gold_expression is None or answer_expression is None or differ(gold_expression, answer_expression):
            return False
        return bool(
            verify(
                gold_expression,
                answer_expression,
                float_rounding=12,
                numeric_precision=50,
                allow_set_relation_comp=True,
                timeout_seconds=ALGEBRA_TIMEOUT_S,
                raise_on_error=True,
            )
        )
    except TimeoutException as error:
        raise TimeoutError(
            f"expected the comparison of {gold!r} with {answer!r} to end within {ALGEBRA_TIMEOUT_S} s a step, it did not"
        ) from error
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 - sympy raises errors of any type on expressions that it cannot compare: not shown equal
        return False
