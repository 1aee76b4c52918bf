"""Finds the answer in a response and brings it into one spelling, by text alone."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*(?P<open>\{)|\s*(?P<bare>-?\d[\d.]*|[A-Za-z])(?![A-Za-z\d]))|\\.|[{}]", re.DOTALL)

_SYMBOLS = {
    "−": "-", "–": "-", "⁄": "/", "×": r"\cdot ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "º": r"^\circ ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "√": r"\sqrt ",
}  # fmt: skip
_SYMBOL = re.compile("|".join(map(re.escape, _SYMBOLS)))
_RAISED = re.compile(r"[⁰¹²³⁴-⁾]+")
_LOWERED = re.compile(r"[₀-₎]+")

_SAME_MACRO = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "leqslant": "le", "geq": "ge", "geqslant": "ge",
    "neq": "ne", "times": "cdot", "varnothing": "emptyset", "lbrace": "{", "rbrace": "}", "infin": "infty",
}  # fmt: skip
_MACRO = re.compile(r"\\(" + "|".join(_SAME_MACRO) + r")(?![A-Za-z])")
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])\.?|\\!\s*|\\(?:boxed|fbox)\s*(?=\{)|\\?\$"
)
_SPACING = re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![A-Za-z])|~")
_DEGREES = re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\circ\s*$")
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|[mhf]box|rm)\s*\{([^{}]*)\}")
_CONNECTIVE = re.compile(r"\s*,?\s*(?:\\text\{\s*(?:or|and)\s*\}|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z]))\s*,?\s*")
_POWER = r"(?:\s*\^\s*(?:\{\s*(?P<{0}a>[23])\s*\}|(?P<{0}b>[23])))?"

_UNIT_NAMES = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "km": "kilometer kilometre", "m": "meter metre", "in": "inch",
    "ft": "foot feet", "yd": "yard", "mi": "mile", "g": "gram", "kg": "kilogram", "mg": "milligram", "lb": "pound",
    "oz": "ounce", "s": "second sec", "min": "minute", "h": "hour hr", "day": "", "week": "", "month": "", "year": "yr",
    "degree": "deg", "dollar": "usd", "cent": "", "percent": "", "unit": "",
    "l": "liter litre", "ml": "milliliter millilitre", "mph": "", "radian": "rad",
    "people": "person", "student": "", "way": "", "point": "", "gallon": "gal", "square": "sq", "cubic": "",
}  # fmt: skip
_UNIT_OF = {
    spelling: unit
    for unit, others in _UNIT_NAMES.items()
    for name in (unit, *others.split())
    for spelling in (name, f"{name}s", f"{name}es")
}
_PLAIN_UNIT = "|".join(sorted((name for name in _UNIT_OF if len(name) > 1), key=len, reverse=True))
_UNIT_TEXT = re.compile(r"(?<=.)\\text\{(?P<unit>[^{}]*)\}" + _POWER.replace("{0}", "t") + r"$")
_UNIT_WORD = re.compile(
    rf"(?<=[\d)}}\s])\s*(?P<unit>(?:(?:{_PLAIN_UNIT})(?![A-Za-z])[\s/]*)+)" + _POWER.replace("{0}", "w") + r"$", re.IGNORECASE
)
_COUNTED = re.compile(r"(?<=\d)\s+(?P<unit>[a-z]{3,}(?:\s+[a-z]+)*)$")
_NO_UNIT = {
    "hundred", "thousand", "million", "billion", "trillion", "dozen", "squared", "cubed", "factorial", "over", "mod", "half",
    "times", "plus", "minus",
}  # fmt: skip
_PHRASE = re.compile(r"[A-Za-z]{4,}|[A-Za-z]+(?:(?:\s+|-)[A-Za-z]{2,})+")
_SHORT_WORDS = frozenset(("yes", "no", "odd", "all", "one", "two", "six", "ten"))
_SPACE = re.compile(r"(?P<before>\\[A-Za-z]+|[0-9])?\s+(?=(?P<after>.)?)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer in one spelling.

    `text` has no spaces but those that LaTeX or digits need, `unit` is what followed the value ("" without), `percent` tells
    that a percent sign was dropped from `text`, and `is_words` that the whole answer is a word or a phrase.
    """

    text: str
    unit: str = ""
    percent: bool = False
    is_words: bool = False


def last_box(response: str) -> str | None:
    r"""Content of the last balanced \boxed{} or \fbox{} (or a bare `\boxed 5`) after the last </think>; None without one.

    A box that is never closed, as in a truncated response, is no answer. Of nested boxes the outermost counts. One pass.
    """
    found = boxes(response.rpartition("</think>")[2])
    return found[-1] if found else None


def boxes(text: str) -> list[str]:
    """Contents of all balanced boxes in the order of their ends, without boxes inside others. One pass."""
    open_boxes: list[int] = []  # where the content of each open brace's box begins; -1 for a brace that is no box
    spans: list[tuple[int, int]] = []
    for match in _BOX.finditer(text):
        if match["open"]:
            open_boxes.append(match.end())
        elif match["bare"]:
            spans.append(match.span("bare"))
        elif match[0] == "{":
            open_boxes.append(-1)
        elif match[0] == "}" and open_boxes and (start := open_boxes.pop()) >= 0:
            while spans and spans[-1][0] >= start:
                spans.pop()
            spans.append((start, match.start()))
    return [text[start:end] for start, end in spans]


def read_answer(raw: str) -> Answer:
    """`raw`, an answer without its box, in one spelling. Bound the length of model output before."""
    text = _in_ascii(raw)
    text = _LAYOUT.sub("", _MACRO.sub(lambda m: "\\" + _SAME_MACRO[m[1]], text))
    text = _TEXT.sub(r"\\text{\1}", _SPACING.sub(" ", text))
    text = re.sub(r"\\begin\{[bBvV]?matrix\}", r"\\begin{pmatrix}", re.sub(r"\\end\{[bB]?matrix\}", r"\\end{pmatrix}", text))
    text = _CONNECTIVE.sub(",", text) if re.search(r"\d", text) else text
    text = _unwrapped(text)
    percent = "%" in text
    text = _DEGREES.sub("", re.sub(r"\\?%", "", text)).strip()
    if whole := re.fullmatch(r"\\text\{([^{}]*)\}", text):
        return _words(whole[1], percent)
    if _PHRASE.fullmatch(text) or text.lower() in _SHORT_WORDS:
        return _words(text, percent)
    text, unit = _split_unit(text)
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    text = _braced_arguments(_one_number(text))
    text = _unwrapped(_SPACE.sub(_needed_space, text))
    text = re.sub(r"([_^])\{([A-Za-z0-9])\}(?![0-9])", r"\1\2", text)
    text = re.sub(r"^\{([0-9A-Z]+)\}(?=_)", r"\1", text)
    if choice := re.fullmatch(r"\(?([A-Z])\)?", text):
        text = choice[1]
    return Answer(text, unit, percent)


def _in_ascii(raw: str) -> str:
    r"""Unicode signs as LaTeX: ½ as \frac{1}{2}, x² as x^{2}, √2 as \sqrt 2, full-width digits as digits."""
    if raw.isascii():
        return raw
    text = _RAISED.sub(lambda m: "^{" + unicodedata.normalize("NFKC", m[0]).replace("−", "-") + "}", raw)
    text = _LOWERED.sub(lambda m: "_{" + unicodedata.normalize("NFKC", m[0]) + "}", text)
    parts = []
    for char in text:
        numerator, slash, denominator = unicodedata.normalize("NFKC", char).partition("⁄")
        parts.append(rf"\frac{{{numerator}}}{{{denominator}}}" if slash and char != "⁄" else char)
    text = _SYMBOL.sub(lambda m: _SYMBOLS[m[0]], "".join(parts))
    text = re.sub(r"\\sqrt\s*(\d+|\([^()]*\))", lambda m: rf"\sqrt{{{m[1].strip('()')}}}", text)
    return unicodedata.normalize("NFKC", text)


def _words(text: str, percent: bool) -> Answer:
    """A phrase, without case, outer punctuation and repeated spaces; a single letter stays as it is (a choice, a variable)."""
    phrase = " ".join(re.sub(r"^[\s(]+|[\s).,:;]+$", "", text).split())
    return Answer(phrase if len(phrase) == 1 else phrase.lower(), percent=percent, is_words=len(phrase) > 1)


def _unwrapped(text: str) -> str:
    """`text` without outer spaces, outer braces around the whole and a full stop at the end."""
    text = text.strip().rstrip(".,;").strip()
    while text.startswith("{") and closing_brace(text) == len(text) - 1:
        text = text[1:-1].strip()
    return text


def closing_brace(text: str) -> int:
    """Position of the brace that closes the first one; -1 without it."""
    depth = 0
    for position, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return position
    return -1


def _split_unit(text: str) -> tuple[str, str]:
    r"""Value and unit: `12\text{ cm}^2` is `12` and `cm^2`. A lone letter counts as a unit only inside \text."""
    match = _UNIT_TEXT.search(text) or _UNIT_WORD.search(text) or _COUNTED.search(text)
    if match is None or not text[: match.start()].strip():
        return text, ""
    groups = match.groupdict()
    words = re.findall(r"[A-Za-z]+", groups["unit"])
    if not words or _NO_UNIT.intersection(words) or (len(words[0]) == 1 and len(words) == 1 and words[0] not in _UNIT_OF):
        return text, ""
    power = next((groups[name] for name in ("ta", "tb", "wa", "wb") if groups.get(name)), "")
    units = [_UNIT_OF.get(word.lower(), word.lower()) for word in words]
    if "square" in units or "cubic" in units:
        power = "2" if "square" in units else "3"
        units = [unit for unit in units if unit not in ("square", "cubic")]
    return text[: match.start()].strip(), " ".join(units) + (f"^{power}" if power else "")


def _one_number(text: str) -> str:
    r"""Digits grouped by `,`, `{,}` or a space as one number; `3 1/2` as the mixed number 3\frac{1}{2}."""
    text = text.replace("{,}", ",")
    if re.fullmatch(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        return text.replace(",", "")
    text = re.sub(r"(?<![\d,.])\d{1,3}(?: \d{3})+(?!\s*[\d/])", lambda m: m[0].replace(" ", ""), text)
    return re.sub(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}", text)


def _braced_arguments(text: str) -> str:
    r"""\frac12, \frac 1{72}, \frac{270}7, \sqrt3 and \log_2 8 with braces around every argument."""
    text = re.sub(r"\\frac\s*([A-Za-z0-9])", r"\\frac{\1}", text)
    text = re.sub(r"([_^])([0-9])\s+(?=[0-9])", r"\1{\2}", text)
    text = re.sub(r"(\\frac\s*\{[^{}]*\})\s*([A-Za-z0-9])", r"\1{\2}", text)
    return re.sub(r"\\sqrt\s*([A-Za-z0-9])", r"\\sqrt{\1}", text)


def _needed_space(match: re.Match[str]) -> str:
    r"""Spaces go, except between a macro and a letter (\pi r) and between digits, which no rule above has joined."""
    before, after = match["before"] or "", match["after"] or ""
    keep = (before.startswith("\\") and after.isalpha()) or (before.isdigit() and after.isdigit())
    return before + (" " if keep else "")
