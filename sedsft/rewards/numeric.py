"""Tells terms apart by their values at one point, which spares the algebra for most wrong answers."""

from __future__ import annotations

import cmath
from typing import Any

from sympy import Add, E, Expr, I, Mul, NumberSymbol, Pow, Rational, Symbol, cos, exp, log, sin, tan
from sympy import Float as SympyFloat

RELATIVE_GAP = 1e-6
"""Smallest difference of two values, relative to the larger one, that is taken for a difference of the terms."""
ROUNDING = 1e-9
"""Smallest such difference relative to the largest value on the way, above what cancellation leaves of rounding."""

_FUNCTIONS = {sin: cmath.sin, cos: cmath.cos, tan: cmath.tan, exp: cmath.exp, log: cmath.log}


class _Unknown(Exception):
    """A part of a term whose value is not known here."""


def differ(left: Any, right: Any) -> bool:
    """Whether two sympy terms have clearly different values where every variable has some fixed value.

    Then no rule of algebra makes them equal. False for what is no term, and where a value is not known.
    """
    if not isinstance(left, Expr) or not isinstance(right, Expr):
        return False
    names = sorted({str(symbol) for symbol in left.free_symbols | right.free_symbols})
    point = _Point({name: 0.731 + 0.137 * index for index, name in enumerate(names)})
    try:
        left_value, right_value = point.value(left), point.value(right)
    except (_Unknown, ArithmeticError, ValueError):
        return False
    gap = abs(left_value - right_value)
    return gap > RELATIVE_GAP * max(abs(left_value), abs(right_value)) and gap > ROUNDING * point.peak


class _Point:
    """Values of variables, and the largest value of any part of what was evaluated there."""

    def __init__(self, values: dict[str, float]) -> None:
        self._values = values
        self.peak = 0.0

    def value(self, term: Any) -> complex:
        """The value of `term`. Raises _Unknown, ArithmeticError or ValueError where it has none here."""
        value = self._value(term)
        if not cmath.isfinite(value):
            raise _Unknown
        self.peak = max(self.peak, abs(value))
        return value

    def _value(self, term: Any) -> complex:
        if isinstance(term, Symbol):
            return complex(self._values[str(term)])
        if isinstance(term, Rational):
            return complex(term.p / term.q)
        if isinstance(term, SympyFloat | NumberSymbol):
            return complex(float(term))
        if term is I:
            return 1j
        if isinstance(term, Add):
            return sum((self.value(part) for part in term.args), 0j)
        if isinstance(term, Mul):
            product = 1 + 0j
            for part in term.args:
                product *= self.value(part)
            return product
        if isinstance(term, Pow):
            return self._power(term)
        function = _FUNCTIONS.get(type(term))
        if function is None or len(term.args) != 1:
            raise _Unknown
        return function(self.value(term.args[0]))

    def _power(self, term: Any) -> complex:
        base, exponent = term.args
        if base is E:
            return cmath.exp(self.value(exponent))
        return complex(self.value(base) ** self.value(exponent))
