"""Exact value of a purely numeric answer in LaTeX, without an algebra system.

    sum     = [+-] product { (+|-) product }          product = power { (\\cdot | * | / | :\\div) power }
    power   = atom [ ^ (digits | {sum}) ]             atom    = number [\\frac] | \\frac{sum}{sum} | (sum) | {sum}

An integer directly before a fraction is a mixed number: 3\\frac{1}{2} = 7/2. Anything else is no number.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_BITS = 10_000
"""Largest size of a numerator or denominator; a bigger one is no number here, which bounds the time."""

_TOKEN = re.compile(r"[0-9]+\.?[0-9]*|\.[0-9]+|\\frac(?![A-Za-z])|\\cdot(?![A-Za-z])|\\div(?![A-Za-z])|[-+*/^(){}]")


class _NotANumber(Exception):
    """The text is not in the grammar, divides by zero or grows too large."""


def exact_number(text: str) -> Fraction | None:
    """The value of `text`, or None when it is not purely numeric. Nesting of `text` must be bounded by the caller."""
    tokens = [match[0] for match in _TOKEN.finditer(text)]
    if not tokens or "".join(tokens) != text:
        return None
    try:
        parser = _Parser(tokens)
        value = parser.sum()
        return value if parser.done() else None
    except _NotANumber:
        return None


class _Parser:
    """Recursive descent over the tokens of one answer."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    def done(self) -> bool:
        return self._next == len(self._tokens)

    def _peek(self) -> str:
        return "" if self.done() else self._tokens[self._next]

    def _take(self, *wanted: str) -> str:
        token = self._peek()
        if token not in wanted:
            return ""
        self._next += 1
        return token

    def _expect(self, token: str) -> None:
        if not self._take(token):
            raise _NotANumber

    def sum(self) -> Fraction:
        sign = -1 if self._take("-", "+") == "-" else 1
        value = sign * self._product()
        while operator := self._take("+", "-"):
            term = self._product()
            value = _bounded(value + term if operator == "+" else value - term)
        return value

    def _product(self) -> Fraction:
        value = self._power()
        while operator := self._take("\\cdot", "*", "/", "\\div"):
            factor = self._power()
            value = _bounded(value * factor if operator in ("\\cdot", "*") else _divide(value, factor))
        return value

    def _power(self) -> Fraction:
        base = self._atom()
        if not self._take("^"):
            return base
        exponent = self._braced() if self._peek() == "{" else self._number()
        size = max(abs(base.numerator), base.denominator).bit_length() * abs(exponent)
        if exponent.denominator != 1 or size > MAX_BITS or (base == 0 and exponent <= 0):
            raise _NotANumber
        return Fraction(base ** int(exponent))

    def _atom(self) -> Fraction:
        if self._peek() == "{":
            return self._braced()
        if self._take("("):
            value = self.sum()
            self._expect(")")
            return value
        if self._take("\\frac"):
            return self._fraction()
        value = self._number()
        if value.denominator == 1 and self._take("\\frac"):
            part = self._fraction()
            if not 0 <= part < 1:
                raise _NotANumber
            return value + part
        return value

    def _fraction(self) -> Fraction:
        numerator = self._braced()
        return _divide(numerator, self._braced())

    def _braced(self) -> Fraction:
        self._expect("{")
        value = self.sum()
        self._expect("}")
        return value

    def _number(self) -> Fraction:
        token = self._peek()
        if not token or not (token[0].isdigit() or token[0] == "."):
            raise _NotANumber
        self._next += 1
        return Fraction(token.removesuffix("."))


def _divide(left: Fraction, right: Fraction) -> Fraction:
    if right == 0:
        raise _NotANumber
    return _bounded(left / right)


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > MAX_BITS:
        raise _NotANumber
    return value
