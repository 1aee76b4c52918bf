from __future__ import annotations

from fractions import Fraction

import pytest

from sedsft.rewards.exact_number import exact_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", Fraction(42)),
        ("-3", Fraction(-3)),
        (".5", Fraction(1, 2)),
        ("18.90", Fraction(189, 10)),
        ("5.", Fraction(5)),
        (r"\frac{-3}{2}", Fraction(-3, 2)),
        (r"-\frac{3}{2}", Fraction(-3, 2)),
        (r"\frac{1}{2^{3}}", Fraction(1, 8)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        (r"-3\frac{1}{2}", Fraction(-7, 2)),
        (r"6.02\cdot10^{23}", Fraction(602 * 10**21)),
        ("2^10", Fraction(1024)),
        ("10^{-3}", Fraction(1, 1000)),
        ("-2^2", Fraction(-4)),
        ("(1+2)*3/4", Fraction(9, 4)),
        ("0^3", Fraction(0)),
    ],
)
def test_value(text: str, value: Fraction) -> None:
    assert exact_number(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "x", "1/0", r"\frac{1}{0}", "0^0", "0^{-1}", "2^{0.5}", "1,2", "1 2", "2(3)", "(1", "1)", "3\\frac{5}{2}", "--", "1+"],
)
def test_no_number(text: str) -> None:
    assert exact_number(text) is None


@pytest.mark.parametrize("text", ["9^{9^{9}}", "2^{100000}", "((9^{99})^{99})^{99}", "*".join(["9^{3000}"] * 9)])
def test_huge_values_are_refused_quickly(text: str) -> None:
    assert exact_number(text) is None
