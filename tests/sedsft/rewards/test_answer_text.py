from __future__ import annotations

import time

import pytest

from sedsft.rewards.answer_text import last_box, read_answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{3}. No: \boxed{4}", "4"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed 5", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{x = \boxed{5} + 1}", r"x = \boxed{5} + 1"),
        (r"<think>\boxed{3}</think> it is \boxed{4}", "4"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{4", None),
        (r"<think>\boxed{3}</think> done", None),
        ("the answer is 5", None),
        (r"\boxed{}", ""),
    ],
)
def test_last_balanced_box(response: str, answer: str | None) -> None:
    assert last_box(response) == answer


def test_extraction_is_linear() -> None:
    started = time.perf_counter()
    assert last_box("\\boxed{" * 100_000) is None
    assert last_box("\\boxed{" * 50_000 + "5" + "}" * 50_000) is not None
    assert last_box("$" * 500_000 + r"\boxed{5}") == "5"
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\frac{270}7", r"\frac{270}{7}"),
        (r"10,\!080", "10080"),
        (r"1{,}234.5", "1234.5"),
        (r"1\,234", "1234"),
        ("2500,7500", "2500,7500"),
        ("3 1/2", r"3\frac{1}{2}"),
        (r"45^{\circ}", "45"),
        (r"\$18.90", "18.90"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"2\pi r", r"2\pi r"),
        ("５", "5"),
        ("3½", r"3\frac{1}{2}"),
        ("x²", "x^2"),
        ("√2", r"\sqrt{2}"),
        ("−1", "-1"),
        (r"\text{(C)}", "C"),
        ("{B}", "B"),
        ("(D)", "D"),
        (r"x=2 \text{ or } x=3", "x=2,x=3"),
        (r"\log_2 8", r"\log_{2}8"),
        ("p - q", "p-q"),
        (r"\boxed{5}", "5"),
        ("15.", "15"),
    ],
)
def test_spelling(raw: str, text: str) -> None:
    assert read_answer(raw).text == text


@pytest.mark.parametrize(
    ("raw", "text", "unit"),
    [
        (r"12\text{ cm}^2", "12", "cm^2"),
        ("12 square centimeters", "12", "cm^2"),
        (r"5\,\mathrm{km/h}", "5", "km h"),
        (r"480 + 480\sqrt{3}\text{ feet}", r"480+480\sqrt{3}", "ft"),
        (r"5.4 \text{ cents}", "5.4", "cent"),
        ("5 apples", "5", "apples"),
        (r"5\text{ million}", "5million", ""),
        ("5m", "5m", ""),
    ],
)
def test_units(raw: str, text: str, unit: str) -> None:
    answer = read_answer(raw)
    assert (answer.text, answer.unit) == (text, unit)


def test_words_lose_case_and_single_letters_keep_it() -> None:
    assert read_answer(r"\text{Tuesday}").text == read_answer("tuesday.").text == "tuesday"
    assert read_answer("Yes").is_words
    assert read_answer("n").text != read_answer("N").text
    assert not read_answer("ab").is_words


def test_percent_is_noted() -> None:
    answer = read_answer(r"8 \%")
    assert (answer.text, answer.percent) == ("8", True)
