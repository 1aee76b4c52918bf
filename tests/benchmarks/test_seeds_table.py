"""The seeds' table: its jobs are valid, alike but for seed and data, and its sums are right."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.seeds_page import page, picture
from benchmarks.seeds_table import FIGURES, OBJECTIVES, job, mean_and_error, summary
from services.jobspec import JOB_SPEC, stages_of
from services.preflight import plan

OPTIONS = Namespace(sft_steps=60, rl_iterations=30, problems=None)


def test_jobs_are_valid_fit_on_a_core_and_differ_by_seed_and_data_alone() -> None:
    first, second = (job(Path("/data"), seed, OPTIONS) for seed in (1, 2))
    spec = JOB_SPEC.validate_python(first)
    assert [stage.name for stage in stages_of(spec)] == [
        *(f"{name}-sft" for name in OBJECTIVES),
        *(f"{name}-rl" for name in OBJECTIVES),
        "eval",
    ]
    assert plan(spec).peak_cpus <= 1.0
    objectives = [stage["sft"].pop("objective")["type"] for stage in first["stages"][:5]]
    assert objectives == ["ce", "gem", "dft", "sed", "sed"]
    assert all(stage["sft"] == first["stages"][0]["sft"] for stage in first["stages"][:5])
    assert all(stage["grpo"] == first["stages"][5]["grpo"] for stage in first["stages"][5:10])
    assert second["stages"][5]["grpo"]["seed"] == 2
    assert "/data/data-2/" in second["stages"][5]["grpo"]["data"]["path"]
    assert first["stages"][10]["eval"]["benchmarks"] == second["stages"][10]["eval"]["benchmarks"]


def test_mean_and_standard_error_by_hand() -> None:
    # Variance 1 with n - 1 = 2, over the square root of 3.
    assert mean_and_error([1.0, 2.0, 3.0]) == (2.0, pytest.approx(3**-0.5))
    assert mean_and_error([0.5]) == (0.5, None)


def entry(shift: float) -> dict[str, Any]:
    def figures(value: float) -> dict[str, Any]:
        return {"mean": dict.fromkeys(FIGURES, value + shift)}

    models = {f"{name}-{stage}": figures(0.25) for stage in ("sft", "rl") for name in OBJECTIVES}
    return {"stage_seconds": {"eval": 60.0}, "models": {"base": figures(0.1), **models, "sed-rl": figures(0.5 + shift)}}


def test_differences_are_taken_on_the_same_seed() -> None:
    report: dict[str, Any] = {"job": job(Path(), 0, OPTIONS), "seeds": {"1": entry(0.0), "2": entry(0.5)}}
    report["summary"] = summary(report["seeds"])
    assert report["summary"]["models"]["ce-rl"]["avg"] == {"mean": 0.5, "standard_error": 0.25, "above_zero": 2}
    # 0.25 on the first seed and 0.75 on the second.
    assert report["summary"]["less_ce"]["sed-rl"]["avg"] == {"mean": 0.5, "standard_error": 0.25, "above_zero": 2}
    assert report["summary"]["less_ce"]["gem-rl"]["avg"]["above_zero"] == 0
    text = page(report, tuple(OBJECTIVES))
    assert "from 2 seeds" in text
    assert "| base model | 0.350 ± 0.250 |" in text
    assert "| SED, after RL | +0.500 ± 0.250 (2/2) |" in text
    assert picture(report["summary"], tuple(OBJECTIVES)).count("<circle") == 4 * 5 * 2 + 2
