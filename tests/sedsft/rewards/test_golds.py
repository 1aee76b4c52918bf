from __future__ import annotations

import pytest

from sedsft.rewards.golds import countdown_gold_fault, math_gold_fault


@pytest.mark.parametrize(
    ("gold", "kind"),
    [
        ("", "empty_gold"),
        ("  ", "empty_gold"),
        ("{}", "empty_gold"),
        ("$$", "empty_gold"),
        (r"\begin{pmatrix}2\-1\-5\end{pmatrix}", "unparsable_gold"),
        (r"\begin{pmatrix}2\\-1", "unparsable_gold"),
        (r"\frac{1}{2", "unparsable_gold"),
        ("5}", "unparsable_gold"),
        (r"\frac{1}{\sqrt}", "unparsable_gold"),
        ("9" * 20_001, "unparsable_gold"),
        ("</think> 5", "no_self_match"),
        ("{(E)},", "odd_gold"),
        ("{Tuesday}", "odd_gold"),
    ],
)
def test_faults(gold: str, kind: str) -> None:
    fault = math_gold_fault(gold)
    assert fault is not None
    assert fault.kind == kind
    assert fault.fatal == (kind != "odd_gold")


@pytest.mark.parametrize(
    "gold",
    ["0", r"\frac{1}{2}", r"\begin{pmatrix}2\\-1\\-5\end{pmatrix}", "(-1,0]", r"\{1,2\}", r"\left\{x\mid x>0\right\}",
     "{A5}_{11}", r"\text{Tuesday}", "12:00", r"\emptyset", r"\$5", r"50\%", "x = 5", r"\frac12", r"\sqrt 3", "a+b\\cdot c"],
)  # fmt: skip
def test_sound_golds(gold: str) -> None:
    assert math_gold_fault(gold) is None


def test_countdown() -> None:
    assert countdown_gold_fault("3 7 2 5>24") is None
    fault = countdown_gold_fault("3 7 2 5=24")
    assert fault is not None
    assert "expected a countdown problem" in fault.reason
