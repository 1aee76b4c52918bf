from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sedsft.rewards.verdict import Verdict
from sedsft.rewards.verifier import Mode, strict_verdict, verify

pytestmark = pytest.mark.usefixtures("algebra")


@pytest.mark.parametrize(
    ("gold", "output", "verdict"),
    [
        (r"\frac{1}{2}", r"so \boxed{\frac{1}{2}}", Verdict("scored", True, r"\frac{1}{2}")),
        (r"\frac{1}{2}", r"so \boxed{\dfrac{1}{2}}", Verdict("scored", False, r"\dfrac{1}{2}")),
        ("5", r"\boxed{5 }", Verdict("scored", False, "5 ")),
        ("5", r"\boxed{\boxed{5}}", Verdict("scored", True, "5")),
        ("4", r"\boxed{3} and \boxed{4}", Verdict("scored", True, "4")),
        ("5", r"\boxed{5", Verdict("no_answer", False, None)),
        ("5", r"\fbox{5}", Verdict("no_answer", False, None)),
        ("5", "5", Verdict("no_answer", False, None)),
        ("5", r"\boxed{5}" + " " * 91, Verdict("scored", True, "5")),
        ("5", r"\boxed{5}" + " " * 92, Verdict("no_answer", False, None)),
        ("", r"\boxed{}", Verdict("scored", False, "")),
    ],
)
def test_strict(gold: str, output: str, verdict: Verdict) -> None:
    """`\\boxed{5}` has 9 characters, so 91 more leave it within the last 100."""
    assert strict_verdict(gold, output) == verify(gold, output, "strict") == verdict


def test_modes_differ() -> None:
    output = r"The answer is $\boxed{\dfrac12}$."
    assert [verify(r"\frac{1}{2}", output, mode).correct for mode in ("math_verify", "strict", "qwen")] == [True, False, True]
    assert verify("3159", r"\boxed{3159.2}").correct is False
    assert verify("3159", r"\boxed{3159.2}", "qwen").correct is True
    with pytest.raises(ValueError, match="expected one of the modes math_verify, strict, qwen, got 'loose'"):
        verify("1", "1", "loose")  # type: ignore[arg-type]


def test_what_cannot_be_compared_is_not_wrong() -> None:
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(verify, "x+1", r"\boxed{1+x}").result() == Verdict("error", None, None)
        assert pool.submit(verify, "1", r"\boxed{1}").result().correct is True


FRAGMENTS = st.sampled_from(
    [
        "\\boxed{", "}", "{", "(", ")", "[", "]", "\\{", "\\}", "^", "_", "!", "9", "99", "1000000", "10^", "x", "i",
        "e", "\\frac", "\\frac{1}", "\\sqrt", "\\sum_{k=1}^{1000000000}", "\\int_0^{\\infty}", "\\lim",
        "\\binom{1000}{500}", "\\pi", "\\cdot", "\\begin{pmatrix}", "\\end{pmatrix}", "\\\\", "&", "\\text{",
        "\\mathrm{", "\\le", "<", "=", ",", ";", ":", "|", "\\cup", "\\infty", "\\pm", "%", "$", "\\", "\x00",
        "\ud800", "½", "²", "√", "٣", "∞", "</think>", "__import__('os')", "eval(", "**", "9**9**9", "and", "or",
        "he answer is", "final answer is $", "$. I hope", "boxed", "#### ", "\n", " ", ".", "-", "+", "/", "0.000",
        "1e999", "\\log", "\\sin^{9999}", "(x+1)^{9999}", "factorial(10**9)", "\\mod", "\\overline{", "\\left",
        "\\right",
    ]
)  # fmt: skip
HOSTILE = st.lists(st.one_of(FRAGMENTS, st.text(max_size=6)), max_size=24).map("".join)


@settings(max_examples=250, deadline=None)
@given(gold=HOSTILE, answer=HOSTILE, in_box=st.booleans(), mode=st.sampled_from(["math_verify", "strict", "qwen"]))
def test_every_output_gets_a_verdict_in_time(gold: str, answer: str, in_box: bool, mode: Mode) -> None:
    started = time.monotonic()
    verdict = verify(gold, rf"so \boxed{{{answer}}}" if in_box else answer, mode)
    assert time.monotonic() - started < 8
    assert (verdict.correct is None) == (verdict.status in ("timeout", "error"))
    assert verdict.status != "no_answer" or (verdict.correct is False and verdict.extracted is None)


@pytest.mark.parametrize("mode", ["math_verify", "strict", "qwen"])
@pytest.mark.parametrize(
    "output",
    [
        "\\boxed{" * 20_000, "{" * 100_000, "\\boxed{5}" * 20_000, "$" * 100_000, "answer " * 20_000, "he answer is " * 20_000,
        "9" * 300_000, r"\boxed{" + "9" * 100_000 + "}", r"\boxed{" + "(" * 40 + "^" * 400 + "}", "-." * 100_000,
        r"\boxed{" + "a," * 250 + "}", r"\boxed{" + r"\text{ " * 50 + "}" * 50 + "}", r"\boxed{" + "1 " * 250 + "}",
        r"\boxed{" + "1,000" * 100 + "}", r"\boxed{" + "meter " * 80 + "}", r"\boxed{" + " " * 500 + "}", "#### " * 20_000,
    ],
)  # fmt: skip
def test_long_outputs_take_no_time(output: str, mode: Mode) -> None:
    started = time.process_time()
    verify("x+1", output, mode)
    assert time.process_time() - started < 2
