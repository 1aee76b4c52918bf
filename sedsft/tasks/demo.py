"""Files of the embedded default: the base model, narrow SFT rows, RL prompts and held-out problems per group."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from sedsft.tasks.countdown import GROUPS, Problem, all_problems, derivation_text
from sedsft.tasks.tiny_model import DEFAULT_RECIPE, Recipe, pretrain_base

SFT_ROWS = 1000
HELD_OUT_ROWS = 100
RL_PROMPTS_PER_GROUP = 1200
EVAL_PROBLEMS_PER_GROUP = 150


def prepare(
    folder: Path,
    cache: Path | None = None,
    recipe: Recipe = DEFAULT_RECIPE,
    threads: int = 1,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> None:
    """Write `base/` and `data/*.jsonl` below `folder`; everything is a function of `recipe`.

    The base model comes from `cache` (default: `folder`/cache), where it is trained first if it is missing; see
    `pretrain_base` for `threads` and `on_progress`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trained = pretrain_base(cache or folder / "cache", recipe, threads, on_progress)
    temporary = folder / f"base.tmp-{os.getpid()}"
    shutil.copytree(trained, temporary)
    shutil.rmtree(folder / "base", ignore_errors=True)
    temporary.rename(folder / "base")
    write_data(folder / "data", recipe.seed)


def write_data(folder: Path, seed: int) -> None:
    """Write sft_narrow, held_out, rl_prompts and eval_3, eval_4, eval_H as .jsonl below `folder`.

    SFT and held-out rows show one canonical derivation of problems that need no `*`; their problems differ. RL prompts are
    a third each of the groups 3, 4 and H. All of these are training problems; the evaluation's are held out.
    """
    rng = random.Random(seed)
    training: dict[str, list[Problem]] = {group: [] for group in GROUPS}
    held_out: dict[str, list[Problem]] = {group: [] for group in GROUPS}
    for problem in all_problems():
        (held_out if problem.held_out else training)[problem.group].append(problem)

    folder.mkdir(parents=True, exist_ok=True)
    narrow = [problem for problem in (*training["3"], *training["4"]) if problem.is_narrow]
    turns = [_solved(problem, rng) for problem in rng.sample(narrow, SFT_ROWS + HELD_OUT_ROWS)]
    _write(folder / "sft_narrow.jsonl", turns[:SFT_ROWS])
    _write(folder / "held_out.jsonl", turns[SFT_ROWS:])

    prompts = [problem for group in GROUPS for problem in rng.sample(training[group], RL_PROMPTS_PER_GROUP)]
    rng.shuffle(prompts)
    _write(folder / "rl_prompts.jsonl", (_asked(problem, rng, "question") for problem in prompts))
    for group in GROUPS:
        problems = rng.sample(held_out[group], EVAL_PROBLEMS_PER_GROUP)
        _write(folder / f"eval_{group}.jsonl", (_asked(problem, rng, "problem") for problem in problems))


def _solved(problem: Problem, rng: random.Random) -> dict[str, object]:
    question = {"role": "user", "content": problem.sample_text(rng)}
    return {"messages": [question, {"role": "assistant", "content": derivation_text(problem.canonical())}]}


def _asked(problem: Problem, rng: random.Random, column: str) -> dict[str, object]:
    text = problem.sample_text(rng)
    return {column: text, "answer": text}


def _write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)
