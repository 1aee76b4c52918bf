from __future__ import annotations

import time

import pytest
from sympy import E, FiniteSet, I, Interval, Symbol, cos, exp, factorial, pi, sin, sqrt

from sedsft.rewards.numeric import differ

x, y = Symbol("x"), Symbol("y")


@pytest.mark.parametrize(
    ("left", "right"),
    [(x, y), (x + 1, x), (2 * sqrt(3), sqrt(11)), (pi / 2, pi / 3), (sin(x), cos(x)), (1 + 2 * I, 1 - 2 * I), (E, exp(2)),
     (sqrt(2), pi), (1 / x, x)],
)  # fmt: skip
def test_different(left: object, right: object) -> None:
    assert differ(left, right)
    assert differ(right, left)
    assert not differ(left, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ((x + 1) ** 2, x**2 + 2 * x + 1),
        (sqrt(12), 2 * sqrt(3)),
        (sin(x) ** 2, 1 - cos(x) ** 2),
        (sqrt(10**16 + 1) - 10**8, 1 / (sqrt(10**16 + 1) + 10**8)),
        (factorial(x), x),
        (FiniteSet(1), FiniteSet(2)),
        (Interval(0, 1), x),
        (x, None),
        (pi ** (10**6), x),
    ],
)
def test_equal_or_not_known(left: object, right: object) -> None:
    """A difference that cancellation hides is no difference; what has no value here is left to the algebra."""
    assert not differ(left, right)


def test_deep_terms_take_no_time() -> None:
    term = x
    for _ in range(60):
        term = 1 / (1 + term)
    started = time.process_time()
    assert differ(term, x + 1)
    assert time.process_time() - started < 1
