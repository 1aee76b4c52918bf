"""Problems, splits and the verifier, which no answer without a true derivation may pass."""

import random
from collections import Counter

import pytest

from sedsft.tasks.countdown import Problem, all_problems, countdown_verdict, derivation_text

GOLD = "3 7 2 5>24"


def test_counts_of_problems_and_derivations() -> None:
    problems = all_problems()
    assert Counter(len(problem.numbers) for problem in problems) == {3: 1660, 4: 15309}
    assert sum(len(p.derivations) for p in problems if len(p.numbers) == 3) == 2880
    groups = Counter(problem.group for problem in problems)
    assert groups == {"3": 1660, "4": 2717, "H": 12592}
    held_out = Counter(problem.group for problem in problems if problem.held_out)
    assert all(0.17 < held_out[group] / groups[group] < 0.23 for group in groups)
    assert all(
        (len(p.numbers) == 4 and all("*" in derivation_text(d) for d in p.derivations)) for p in problems if p.group == "H"
    )


def test_derivations_of_a_problem_small_enough_to_list_by_hand() -> None:
    [problem] = [p for p in all_problems() if p.numbers == (1, 1, 2) and p.target == 4]
    assert {derivation_text(steps) for steps in problem.derivations} == {"1+1=2,2+2=4", "1+1=2,2*2=4", "2+1=3,3+1=4"}
    assert derivation_text(problem.canonical()) == "2+1=3,3+1=4"


def test_canonical_prefers_no_product_then_no_difference() -> None:
    for problem in random.Random(0).sample(all_problems(), 300):
        text = derivation_text(problem.canonical())
        texts = [derivation_text(steps) for steps in problem.derivations]
        assert text.count("*") == min(other.count("*") for other in texts)
        fewest = [other for other in texts if other.count("*") == text.count("*")]
        assert text.count("-") == min(other.count("-") for other in fewest)


def test_every_generated_derivation_is_correct_in_any_number_and_operand_order() -> None:
    rng = random.Random(1)
    for problem in rng.sample(all_problems(), 300):
        for steps in (problem.canonical(), problem.sample_derivation(rng), *problem.derivations):
            assert countdown_verdict(problem.sample_text(rng), derivation_text(steps))[0]


@pytest.mark.parametrize(
    "response",
    ["7-3=4,5*4=20,20+2=22", "7+5=12,3-2=1,12*1=12", "24", "", "7*3=21,21+5=26,26-2=24,", "7*3=21,21+5=26,26-2=24.", "=24"],
)
def test_wrong_answers(response: str) -> None:
    assert not countdown_verdict(GOLD, response)[0]


@pytest.mark.parametrize(
    ("response", "why"),
    [
        ("7*3=21,21+5=24", "false arithmetic that ends on the target, with a number left"),
        ("7*3=21,5-2=3,21+3=25", "false arithmetic"),
        ("7*3=21,21+3=24", "number used twice"),
        ("7+5=12,12*2=24", "number left over"),
        ("6*4=24", "operands that are not at hand"),
        ("7*5=35,35*2=70,70-3=67", "value above 60"),
        ("2-3=-1,7*5=35,35-1=34", "negative value"),
        ("3-3=0,7+5=12,12*2=24", "zero"),
        ("7*3=21,5-2=3,21+3=24,24-0=24", "step after the end"),
        ("7*3=21,5-2=3,21+3=24,24", "text after the end"),
        ("so 7*3=21,5-2=3,21+3=24", "text before the start"),
        ("7*3=2 1,5-2=3,21+3=24", "number torn by a space"),
        ("07*3=21,5-2=3,21+3=24", "leading zero"),
        ("٧*3=21,5-2=3,21+3=24", "digits of another script"),
        ("7*3=21,5-2=3,3+3=24", "result not used, sum false"),
        ("7*3=21,21+5-2=24", "two operations in a step"),
        ("9" * 100000, "very long"),
    ],
)
def test_answers_that_try_to_look_right(response: str, why: str) -> None:
    assert not countdown_verdict(GOLD, response)[0], why


def test_the_form_ignores_spaces_and_operand_order_only() -> None:
    spaced = countdown_verdict(GOLD, " 3 * 7 = 21 , 5 - 2 = 3 , 3 + 21 = 24 ")
    assert spaced == (True, "7*3=21,5-2=3,21+3=24")
    assert countdown_verdict(GOLD, "7*3=21,5-2=3,21+3=24\n") == spaced
    assert countdown_verdict(GOLD, "5-2=3,7*3=21,21+3=24") == (True, "5-2=3,7*3=21,21+3=24")
    assert countdown_verdict(GOLD, "3+7=10") == (False, "7+3=10")
    assert countdown_verdict(GOLD, "no") == (False, None)


@pytest.mark.parametrize("gold", ["", "24", "3 7 2 5", "3 7>", "3 10 2>24", "3 7 2 5>24 or so"])
def test_a_gold_that_is_no_problem_is_an_error(gold: str) -> None:
    with pytest.raises(ValueError, match="expected a countdown problem"):
        countdown_verdict(gold, "1+1=2")


def test_the_split_depends_on_numbers_and_target_alone() -> None:
    problem = all_problems()[0]
    assert Problem(problem.numbers, problem.target, ()).held_out == problem.held_out
