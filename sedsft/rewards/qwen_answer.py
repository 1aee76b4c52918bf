r"""Compares answers by the conventions of Qwen2.5-Math's evaluation, which the paper's tables follow.

Written anew: the original evaluates model output as Python. The order is the same: find the answer (a phrase, the last box
even if it is not closed, the last number of the text), drop layout, units and degrees, then compare text, numbers within a
relative 1e-4 (also of a hundredth and a hundredfold of the gold), lists by element, equations by their sides, and what is left
by algebra, which here is math-verify's behind the guards of `math_answer`.

Not taken over, since they give points for nothing: an empty gold, which matched almost any answer, and units of one letter
inside an expression, which deleted variables.
"""

from __future__ import annotations

import re
from fractions import Fraction

from sedsft.rewards.math_answer import algebra_equal, text_only
from sedsft.rewards.verdict import Verdict

RELATIVE_TOLERANCE = Fraction(1, 10_000)

_PHRASES = ("he answer is", "final answer is", "答案是")
_NUMBER = re.compile(r"-?\d*\.?\d+")
_CHOICE = re.compile(r"\b([A-E])\b")
_LAYOUT = re.compile(
    r"\\(?:left|right|!|limits|displaystyle|mathbf|mathrm)(?![A-Za-z])|\\[,;: ]|\\?\$|\^\s*\{?\s*\\circ\s*\}?|\\?%|[\"']|\n|"
    r"\\cdot(?![A-Za-z])"
)
_SAME = {
    r"\tfrac": r"\frac", r"\dfrac": r"\frac", r"\neq": r"\ne", r"\leq": r"\le", r"\geq": r"\ge", r"\{": "{", r"\}": "}",
    "bmatrix": "pmatrix", "{array}": "{pmatrix}", "infinity": r"\infty", "π": r"\pi", "−": "-",
}  # fmt: skip
_TEXT = re.compile(r"\\(?:text|mbox|textbf)\s*\{([^{}]*)\}")
_TEXT_AT_END = re.compile(r"(?<=.)\\(?:text|mbox)\s*\{[^{}]*\}(?:\^\d)?$")
_UNITS = re.compile(
    r"(?<![A-Za-z\\])(?:degrees?|feet|foot|ft|inch(?:es)?|yards?|miles?|mph|km/h|cm|mm|km|meters?|centimeters?|kilometers?|"
    r"square|units?|cubic|seconds?|minutes?|min|hours?|hrs?|days?|weeks?|months?|years?|cents?|dollars?|percent|points?|people|"
    r"students?|grams?|kg|pounds?|ounces?|gallons?|liters?|ways?|times|per|each|total|east|west|north|south)(?![A-Za-z])",
    re.IGNORECASE,
)
_LETTER_UNIT_AT_END = re.compile(r"(?<=\d)\s*[cghlmst]$")
_WORDS = {"zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "twenty": "20", "hundred": "100"}  # fmt: skip
_PMATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", re.DOTALL)


def qwen_verdict(gold: str, output: str) -> Verdict:
    """Whether the answer found in `output` is the gold.

    Raises:
        TimeoutError: the algebra did not finish, so equality is unknown.
        RuntimeError: called outside the main thread, where math-verify cannot bound its time.
    """
    raw = _found(output)
    if not raw:
        return Verdict("no_answer", False, None)
    if text_only(raw) or text_only(gold):
        return Verdict("scored", raw == gold.strip(), raw[:512])
    truth, answer = _plain(gold), _plain(raw)
    if re.fullmatch("[A-E]", truth) and answer != truth:
        letters = _CHOICE.findall(raw.rstrip("."))
        answer = letters[-1] if letters else answer
    if not truth or not answer:
        return Verdict("scored", False, answer or None)
    return Verdict("scored", _equal(answer, truth), answer)


def _found(output: str) -> str:
    """The text of the answer; "" without any."""
    if "final answer is $" in output and "$. I hope" in output:
        found = output.partition("final answer is $")[2].partition("$. I hope")[0]
    elif "boxed" in output:
        found = _in_box(output.rpartition("boxed")[2])
    else:
        phrase = next((phrase for phrase in _PHRASES if phrase in output), None)
        if phrase is not None:
            found = output.rpartition(phrase)[2].partition("\n")[0]
        else:
            numbers = _NUMBER.findall(output.replace(",", ""))
            found = numbers[-1] if numbers else ""
    return found.strip().lstrip(":").rstrip("./").strip()


def _in_box(rest: str) -> str:
    """What stands in the braces at the start of `rest`, to its end where they are not closed; without braces, up to a `$`."""
    if not rest.startswith("{"):
        return rest.partition("$")[0]
    depth = 0
    for position, char in enumerate(rest):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return rest[1:position]
    return rest[1:]


def _plain(raw: str) -> str:
    """`raw` without layout, units, degrees and spaces, with braces around every argument."""
    text = raw.strip().rstrip(".")
    for spelling, same in _SAME.items():
        text = text.replace(spelling, same)
    # Row breaks of matrices are no layout.
    text = "\\\\".join(_LAYOUT.sub("", part) for part in text.split("\\\\")).strip()
    text = _TEXT.sub(r"\1", _TEXT_AT_END.sub("", text))
    text = _WORDS.get(text.lower(), text)
    if without := _LETTER_UNIT_AT_END.sub("", _UNITS.sub("", text)).strip():
        text = without
    text = re.sub(r"^[A-Za-z]{1,2}\s*=\s*(?=[^=]+$)", "", text)
    text = re.sub(r"(^|[\s{,(])\.(?=\d)", r"\g<1>0.", text)
    text = re.sub(r"(\d)\.0+(?=$|\D)", r"\1", text)
    text = re.sub(r"\\sqrt\s*([A-Za-z0-9])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\frac\s*([A-Za-z0-9])", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([A-Za-z0-9])", r"\1{\2}", text)
    text = re.sub(r"\s+and\s+", ",", text)
    if "i" not in text and "j" in text and "\\" not in text:
        text = text.replace("j", "i")
    text = text.replace(" ", "")
    return re.sub(r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}", text)


def _equal(answer: str, gold: str) -> bool:
    if answer.lower() == gold.lower():
        return True
    number, gold_number = _number(answer), _number(gold)
    if number is not None and gold_number is not None:
        return any(_close(number, wanted) for wanted in (gold_number, gold_number / 100, gold_number * 100))
    if _without_brackets(answer) == _without_brackets(gold):
        return True
    parts, gold_parts = _elements(answer), _elements(gold)
    if len(parts) > 1 or len(gold_parts) > 1:
        return len(parts) == len(gold_parts) and all(
            _equal(part, wanted) for part, wanted in zip(parts, gold_parts, strict=True)
        )
    if answer.count("=") == gold.count("=") == 1:
        return algebra_equal(gold, answer)
    for one, other in ((answer, gold), (gold, answer)):
        left, equals, right = one.partition("=")
        if equals and len(left) <= 2 and "=" not in other and "=" not in right:
            return _equal(right, gold) if one is answer else _equal(answer, right)
    return algebra_equal(gold, answer)


def _number(text: str) -> Fraction | None:
    """The value of digits, with thousands separated or not; fractions go through the algebra."""
    digits = text.replace(",", "")
    return Fraction(digits) if re.fullmatch(r"-?(?:\d+\.?\d*|\.\d+)", digits) else None


def _close(left: Fraction, right: Fraction) -> bool:
    return abs(left - right) <= RELATIVE_TOLERANCE * max(abs(left), abs(right))


def _without_brackets(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", "()[]{}"))


def _elements(text: str) -> list[str]:
    """Entries of a matrix, of a tuple or an interval in brackets; otherwise `text` alone."""
    if matrix := _PMATRIX.fullmatch(text):
        return [entry for row in matrix[1].split("\\\\") if row for entry in row.split("&")]
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and "," in text:
        return text[1:-1].split(",")
    return [text]
