from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sedsft.rewards.math_answer import math_verdict
from sedsft.rewards.verdict import Verdict

REPO = Path(__file__).resolve().parents[3]
DATA = REPO.parent / "shared" / "data"

pytestmark = pytest.mark.usefixtures("algebra")


def accepts(gold: str, answer: str) -> bool:
    return math_verdict(gold, rf"so $\boxed{{{answer}}}$.").correct is True


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\frac{1}{2}", "1/2"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"x^2+2x+1", "(x+1)^2"),
        ("2,280", "2280"),
        (r"\{1,2,3\}", "3,2,1"),
        ("(-\\infty,3)", "x<3"),
        ("[2,5)", r"2 \le x < 5"),
        ("(2,3)", "x=2, y=3"),
        (r"\pm 2", "2, -2"),
        ("x=5", "5"),
        ("5", "2+3=5"),
        ("60", r"\angle ABC = 60^\circ"),
        (r"9\pi", r"A = \pi r^2 = 9\pi"),
        ("y=2x+3", "3+2x"),
        (r"-\frac{1}{5}-\frac{2i}{5}", r"\frac{-1-2i}{5}"),
        ("C", "(C) 27"),
        ("27", "(C) 27"),
        ("10", r"10\%"),
        ("0.5", r"50\%"),
        (r"8\%", "0.08"),
        ("3.14159", "3.141593"),
        ("Yes", r"\text{yes}"),
        ("3x+4y=5", "6x+8y=10"),
        ("4!", "24"),
        (r"\emptyset", r"\varnothing"),
    ],
)
def test_equal(gold: str, answer: str) -> None:
    assert accepts(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        (r"\frac{1}{3}", "0.333333"),
        (r"\sqrt{2}", "1.4142135"),
        ("3159", "3159.2"),
        ("12.5", "12.6"),
        ("100000.5", "100001"),
        ("5", "500"),
        (r"8\%", "0.8"),
        (r"8\%", r"0.08\%"),
        (r"5\text{ cm}", r"5\text{ m}"),
        ("235", r"1\,234"),
        (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
        (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
        ("101_2", "101_3"),
        ("12:00", "1:00"),
        ("5", "4=5"),
        ("5", "x+1=5"),
        ("x", r"\frac{1}{0}"),
        ("5", "5, 7"),
        ("5", r"5 \text{ or } 7"),
        ("5", "5x"),
        ("x=5", "y=5"),
        ("(1,2)", r"\{1,2\}"),
        ("(1,2)", "(2,1)"),
        ("[2,5)", "[2,5]"),
        (r"\{x|-2\leq x < 1\}", "1"),
        (r"\text{Tuesday}", r"\text{Thursday}"),
        ("A", "a"),
        ("B", "A, B, C, D"),
        ("5", r"\sum_{k=1}^{5} 1"),
        ("5", "9^{9^{9}}"),
        ("5", "1000000!"),
        ("1", "(x+1)^{9999}"),
        ("", ""),
        ("", "5"),
    ],
)
def test_unequal(gold: str, answer: str) -> None:
    assert not accepts(gold, answer)


def test_extracted_form_is_shared_by_equal_answers() -> None:
    assert math_verdict("3", r"\boxed{0.50}") == math_verdict("3", r"\boxed{\dfrac{1}{2}}") == Verdict("scored", False, "1/2")
    assert math_verdict(r"2\sqrt{3}", r"\boxed{\sqrt{12}}") == Verdict("scored", True, r"2\sqrt{3}")


def test_no_box_is_no_answer() -> None:
    assert math_verdict("5", "the answer is 5") == math_verdict("5", r"\boxed{ }") == Verdict("no_answer", False, None)


def test_long_and_deep_answers_go_by_text_only() -> None:
    deep = "(" * 200 + "5" + ")" * 200
    assert math_verdict("5", rf"\boxed{{{deep}}}").correct is False
    verdict = math_verdict("5", rf"\boxed{{{'5' * 100_000}}}")
    assert verdict.correct is False
    assert verdict.extracted is not None
    assert len(verdict.extracted) == 512
    long_gold = "+".join(f"x_{{{i}}}" for i in range(200))
    assert accepts(long_gold, long_gold)


@pytest.mark.parametrize(
    "answer",
    ["(x+1)^{9999}", "(x+y+z)^{300}", r"\sin^{9999}x", "((x+y)^{99})^{99}", "x^{x^{x}}", "500!!", "9**9**9", r"\frac{1}{" * 45],
)
def test_costly_answers_are_wrong_at_once(answer: str) -> None:
    """Guards refuse them before the algebra, so they are a definite 0 and not a time-out."""
    answer += "x" + "}" * 45 if answer.endswith("{") else ""
    started = time.process_time()
    assert not accepts("x+1", answer)
    assert time.process_time() - started < 2


def test_model_output_is_not_executed(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    for code in (f"__import__('pathlib').Path('{target}').touch()", f"\\pi;__import__('pathlib').Path('{target}').touch()"):
        assert not accepts("5", code)
        assert not accepts("x+1", code)
    assert not target.exists()


def test_algebra_outside_the_main_thread_is_refused() -> None:
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="expected the main thread"):
        pool.submit(math_verdict, "x+1", r"\boxed{1+x}").result()


@pytest.mark.parametrize("benchmark", ["aime24", "gsm8k", "math500", "olympiadbench"])
def test_golds_match_themselves(benchmark: str) -> None:
    path = DATA / "benchmarks" / f"{benchmark}.jsonl"
    if not path.exists():
        pytest.skip(f"needs ../shared/data/benchmarks/{benchmark}.jsonl")
    golds = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert [gold for gold in golds if not accepts(gold, gold)] == []
