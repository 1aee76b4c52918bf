"""Pairs a second that scoring processes compare, in each mode, on ordinary answers to benchmark problems.

    python benchmarks/bench_rewards.py [ROWS ...] [--pairs 10000 --processes 2]

ROWS are files of benchmark rows with `answer`; without any, golds are made up: numbers, fractions, roots, intervals,
polynomials, pairs and words. Of every eight answers to a gold, as in a group of samples, four are right, spelt as it is or
otherwise, three are golds of other problems and one has no box. Start-up of the processes is measured apart. Writes
bench_rewards.json beside it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from sedsft.records import ScoringItem
from sedsft.reward_config import RewardConfig, ScorerName
from sedsft.rewards.check import read_golds
from sedsft.rewards.pool import PoolLimits, ScoringPool, scoring_command

SAMPLES = 8
MODES: tuple[ScorerName, ...] = ("math", "math_strict", "math_qwen")


def made_up_golds(rng: random.Random, count: int = 1_250) -> list[str]:
    """Golds of the kinds that competition problems have, half of them whole numbers."""

    def number() -> int:
        return rng.randint(2, 999)

    kinds = (
        lambda: rf"\frac{{{number()}}}{{{number()}}}",
        lambda: rf"{number()}\sqrt{{{rng.choice((2, 3, 5, 7))}}}",
        lambda: rf"(-\infty,{number()}]",
        lambda: f"x^2+{number()}x+{number()}",
        lambda: f"({number()},{number()})",
        lambda: rng.choice((r"\text{Tuesday}", "C", r"\frac{\pi}{3}", r"30^\circ")),
    )
    return [str(number()) if rng.random() < 0.5 else rng.choice(kinds)() for _ in range(count)]


def pairs(golds: list[str], count: int) -> list[ScoringItem]:
    """`count` ordinary pairs, neighbours being samples of one problem."""
    return [_pair(golds, index // SAMPLES, index % SAMPLES) for index in range(count)]


def _pair(golds: list[str], problem: int, sample: int) -> ScoringItem:
    gold, other = golds[problem % len(golds)], golds[(problem + 1 + sample) % len(golds)]
    boxed = {
        0: gold,
        1: gold.replace(r"\frac", r"\dfrac"),
        2: rf" {gold} ",
        3: gold.replace("+", " + "),
    }.get(sample, other)
    reasoning = "First we rewrite the expression and then simplify it step by step. " * 20
    answer = "I am not sure." if sample == SAMPLES - 1 else rf"The answer is $\boxed{{{boxed}}}$."
    return ScoringItem(gold, reasoning + answer, 300)


def measure(name: ScorerName, items: list[ScoringItem], processes: int) -> dict[str, Any]:
    """Figures of one mode."""
    started = time.perf_counter()
    with ScoringPool(scoring_command(RewardConfig(name=name)), PoolLimits(processes, 3.0, 2048)) as pool:
        ready = time.perf_counter()
        scores = pool.score(items)
        seconds = time.perf_counter() - ready
    return {
        "mode": name,
        "pairs": len(items),
        "processes": processes,
        "pairs_per_s": round(len(items) / seconds),
        "seconds": round(seconds, 2),
        "start_s": round(ready - started, 2),
        "slowest_s": round(max(score.seconds for score in scores), 3),
        "right": sum(score.right for score in scores if score.status == "scored"),
        "statuses": dict(Counter(score.status for score in scores)),
    }


def main() -> None:
    """Measure all modes and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROWS")
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    golds = [gold for path in options.rows for _, gold in read_golds(path) if gold] or made_up_golds(random.Random(0))
    items = pairs(golds, options.pairs)
    results = [measure(name, items, options.processes) for name in MODES]
    for result in results:
        print(result)
    figures = {"machine": platform.processor() or platform.machine(), "golds": len(set(golds)), "results": results}
    Path(__file__).with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
