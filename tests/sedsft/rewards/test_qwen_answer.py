from __future__ import annotations

from pathlib import Path

import pytest

from sedsft.rewards.qwen_answer import qwen_verdict
from sedsft.rewards.verdict import Verdict

pytestmark = pytest.mark.usefixtures("algebra")


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("5", "The final answer is $5$. I hope it is correct."),
        ("5", r"\boxed{4} then \boxed{5}"),
        ("5", r"\boxed{5"),
        ("5", "so the answer is 5."),
        ("5", "答案是 5"),
        ("12", "we get 11 and then 12 apples"),
        ("1234", "it costs 1,234"),
        ("C", r"\boxed{(C) 27}"),
        ("10", r"\boxed{10\%}"),
        ("0.1", r"\boxed{10\%}"),
        ("5", r"\boxed{500}"),
        ("3159", r"\boxed{3159.3}"),
        ("45^\\circ", r"\boxed{45}"),
        ("12", r"\boxed{12\text{ cm}^2}"),
        ("5", r"\boxed{5 \text{ meters}}"),
        ("5", r"\boxed{5 m}"),
        ("(1,2)", r"\boxed{[1,2]}"),
        (r"\frac{1}{2}", r"\boxed{1/2}"),
        ("7", r"\boxed{x=7}"),
        ("seven", r"\boxed{7}"),
        ("x^2+2x+1", r"\boxed{(x+1)^2}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{bmatrix}1\\ 2\end{bmatrix}}"),
    ],
)
def test_accepted(gold: str, output: str) -> None:
    assert qwen_verdict(gold, output).correct is True


@pytest.mark.parametrize(
    ("gold", "output"),
    [
        ("5", r"\boxed{6}"),
        ("3159", r"\boxed{3160}"),  # 1 / 3160 is above 1e-4
        ("B", r"\boxed{A}"),
        ("(1,2)", r"\boxed{(2,1)}"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\boxed{\begin{pmatrix}2\\1\end{pmatrix}}"),
        (r"\frac{5a^2+7a-3}{9a^2}", r"\boxed{\frac{5b^2+7b-3}{9b^2}}"),
        ("", r"\boxed{anything}"),
        ("east", r"\boxed{west}"),
        ("5", ""),
    ],
)
def test_rejected(gold: str, output: str) -> None:
    assert qwen_verdict(gold, output).correct is False


def test_no_number_is_no_answer() -> None:
    assert qwen_verdict("5", "I do not know") == Verdict("no_answer", False, None)


def test_nothing_is_executed(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    code = f"__import__('pathlib').Path('{target}').touch()"
    for output in (rf"\boxed{{{code}}}", rf"\boxed{{\pi;{code}}}", f"the answer is {code}"):
        qwen_verdict("x+1", output)
    assert not target.exists()
