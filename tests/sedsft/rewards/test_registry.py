from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from sedsft.config import RewardConfig
from sedsft.rewards.registry import SCORERS, load
from sedsft.rewards.verdict import Verdict

REPO = Path(__file__).resolve().parents[3]


def test_every_reward_of_the_job_spec_has_a_scorer() -> None:
    assert set(SCORERS) == set(get_args(RewardConfig.model_fields["name"].annotation))


def test_importing_the_registry_loads_no_algebra() -> None:
    code = "import sys, sedsft.rewards.registry; print([m for m in ('sympy', 'math_verify', 'torch') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=REPO)
    assert run.stdout.strip() == "[]"


def test_loaded_scorers_score() -> None:
    assert load("math")("1/2", r"\boxed{0.5}") == Verdict(1.0, "1/2")
    assert load("countdown")("1 2 3>6", "1+2=3,3+3=6").reward == 1.0


def test_distinct_valid_derivations_are_distinct_answers() -> None:
    score = load("countdown")
    added, multiplied = score("1 2 3>6", "2+1=3,3+3=6"), score("1 2 3>6", "2*1=2,3*2=6")
    assert added.reward == multiplied.reward == 1.0
    assert added.extracted != multiplied.extracted
    assert score("1 2 3>6", "3+3=6").reward == 0.0


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of the scorers math, countdown, got 'maths'"):
        load("maths")
