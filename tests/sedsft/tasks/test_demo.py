"""The demo's files: what each may contain, nothing held out in training, the same bytes for the same seed."""

import json
from pathlib import Path

import pytest

from sedsft.config import DataConfig
from sedsft.data.sources import read_benchmark, read_prompt_rows, read_sft_rows
from sedsft.tasks.countdown import Problem, all_problems, countdown_verdict
from sedsft.tasks.demo import prepare, write_data
from sedsft.tasks.tiny_model import Recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, seed=0)
    return folder


def problem(text: str) -> Problem:
    numbers, target = text.split(">")
    return BY_KEY[tuple(sorted(map(int, numbers.split()))), int(target)]


BY_KEY = {(p.numbers, p.target): p for p in all_problems()}


def test_narrow_rows_show_one_canonical_derivation_without_products(data: Path) -> None:
    texts = []
    for name, count in (("sft_narrow", 1000), ("held_out", 100)):
        rows = read_sft_rows(DataConfig(path=str(data / f"{name}.jsonl"))).rows
        assert len(rows) == count
        texts += [(row.messages[0]["content"], row.messages[1]["content"]) for row in rows]
    assert all(countdown_verdict(question, answer)[0] and "*" not in answer for question, answer in texts)
    problems = [problem(question) for question, _ in texts]
    assert len(set(problems)) == 1100
    assert not any(p.held_out for p in problems)


def test_prompts_are_thirds_of_training_problems(data: Path) -> None:
    read = read_prompt_rows(DataConfig(path=str(data / "rl_prompts.jsonl")))
    problems = [problem(str(row.answer)) for row in read.rows]
    assert all(row.messages[0]["content"] == row.answer for row in read.rows)
    assert [sum(p.group == group for p in problems) for group in ("3", "4", "H")] == [1200, 1200, 1200]
    assert {p.group for p in problems[:30]} == {"3", "4", "H"}
    assert not any(p.held_out for p in problems)


def test_benchmarks_are_held_out_problems_of_their_group(data: Path) -> None:
    for group in ("3", "4", "H"):
        problems = [problem(str(row.answer)) for row in read_benchmark(str(data / f"eval_{group}.jsonl"))]
        assert len(set(problems)) == 150
        assert all(p.held_out and p.group == group for p in problems)


def test_the_seed_decides_every_byte(data: Path, tmp_path: Path) -> None:
    write_data(tmp_path / "same", seed=0)
    write_data(tmp_path / "other", seed=1)
    for path in data.iterdir():
        assert path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
        assert path.read_bytes() != (tmp_path / "other" / path.name).read_bytes()


def test_prepare_can_be_repeated(tmp_path: Path) -> None:
    recipe = Recipe(steps=2, batch_size=4)
    for _ in range(2):
        prepare(tmp_path / "demo", recipe=recipe)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["base", "cache", "data"]
    assert json.loads((tmp_path / "demo" / "base" / "recipe.json").read_text())["recipe"]["steps"] == 2
