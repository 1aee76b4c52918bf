"""Leaks that are planted are found, phrases of twelve words are not, and memory is the benchmarks'."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from sedsft.data.overlap import LISTED_ROWS, OverlappingRow, OverlapScan, ngrams_of, words_of

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
LETTERS = [f"w{i}" for i in range(100)]
LONG = " ".join(LETTERS[:15])


def problems(name: str) -> list[str]:
    path = SHARED / "benchmarks" / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path.relative_to(SHARED.parent)}")
    return [json.loads(line)["problem"] for line in path.open(encoding="utf-8")]


def training() -> list[dict[str, str]]:
    path = SHARED / "train" / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path.relative_to(SHARED.parent)}")
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def test_words_are_one_form_and_case_without_signs() -> None:
    assert words_of("Ｗhat is $x_1 + 2$?\n  It's “5”") == ("what", "is", "x", "1", "2", "it", "s", "5")
    assert words_of("++ ?") == ()


def test_ngrams_are_runs_of_thirteen_or_the_whole() -> None:
    assert list(ngrams_of(tuple("abc"))) == [("a", "b", "c")]
    assert [run[0] for run in ngrams_of(tuple(LETTERS[:15]))] == ["w0", "w1", "w2"]
    assert list(ngrams_of(())) == []


@pytest.mark.parametrize(
    ("text", "exact", "ngram"),
    [
        (f"Question: {LONG.upper()}?", 1, 1),
        (" ".join(LETTERS[1:14]), 0, 1),
        (" ".join(LETTERS[1:13]), 0, 0),
        (" ".join([*LETTERS[:7], "other", *LETTERS[7:15]]), 0, 0),
    ],
    ids=["whole", "thirteen words", "twelve words", "a word between"],
)
def test_a_long_problem(text: str, exact: int, ngram: int) -> None:
    scan = OverlapScan({"b": [LONG]})
    scan.add(text, 3, "part.jsonl")
    [result] = scan.result()
    assert (result.problems, result.exact, result.ngram, result.rows) == (1, exact, ngram, ngram)
    assert [(row.file, row.line, row.problem) for row in result.listed] == [("part.jsonl", 3, 1)] * ngram


@pytest.mark.parametrize(
    ("text", "exact", "ngram"),
    [
        ("so what is 3+4, tell me", 1, 1),
        ("So what is\n 3 + 4", 1, 1),
        ("what is 3-4", 0, 1),
        ("what is 33+4", 0, 0),
        ("what is 3", 0, 0),
    ],
)
def test_a_short_problem_counts_with_all_its_words(text: str, exact: int, ngram: int) -> None:
    scan = OverlapScan({"b": ["What is $3+4$?"]})
    scan.add(text, 1)
    [result] = scan.result()
    assert (result.exact, result.ngram) == (exact, ngram)


def test_counts_are_of_problems_and_of_rows_by_benchmark() -> None:
    scan = OverlapScan({"a": ["one two three", "four five", "?!"], "b": ["four five"]})
    for line in range(1, 9):
        scan.add("one two three four five" if line % 2 else "nothing", line)
    a, b = scan.result()
    assert (a.benchmark, a.problems, a.exact, a.ngram, a.rows, a.unchecked, a.share) == ("a", 3, 2, 2, 4, 1, 2 / 3)
    assert (b.benchmark, b.problems, b.exact, b.ngram, b.rows, b.unchecked, b.share) == ("b", 1, 1, 1, 4, 0, 1.0)
    assert len(a.listed) == LISTED_ROWS
    assert a.listed[:2] == (OverlappingRow("", 1, 1, True, "one two three"), OverlappingRow("", 1, 2, True, "four five"))
    assert [row.line for row in b.listed] == [1, 3, 5, 7]


def test_gsm8k_train_against_test_is_what_a_plain_search_finds() -> None:
    tests, rows = problems("gsm8k"), training()
    scan = OverlapScan({"gsm8k": tests})
    texts = [row["problem"] + "\n" + row["solution"] for row in rows]
    for line, text in enumerate(texts, start=1):
        scan.add(text, line)
    [result] = scan.result()
    assert [(row.line, row.problem, row.exact) for row in result.listed] == [
        (21, 633, False),
        (407, 582, False),
        (1315, 603, False),
        (5163, 603, False),
    ]
    assert (result.problems, result.exact, result.ngram, result.rows) == (1319, 0, 3, 4)
    plain = [set(zip(*(words_of(test)[i:] for i in range(13)), strict=False)) for test in tests]
    wanted = set().union(*plain)
    found = {
        (line, number)
        for line, text in enumerate(texts, start=1)
        if (shared := wanted & set(zip(*(words_of(text)[i:] for i in range(13)), strict=False)))
        for number, own in enumerate(plain, start=1)
        if own & shared
    }
    assert {(row.line, row.problem) for row in result.listed} == found
    for row in result.listed:
        for text in (texts[row.line - 1], tests[row.problem - 1]):
            assert f" {row.words} " in f" {' '.join(words_of(text))} "
        assert len(row.words.split()) == 13


def test_a_planted_leak_is_found_in_real_rows() -> None:
    tests, rows = problems("gsm8k"), training()[:200]
    scan = OverlapScan({"gsm8k": tests, "math500": problems("math500")})
    for line, row in enumerate(rows, start=1):
        leak = f"<|user|>{tests[7].upper()}  <|assistant|>" if line == 150 else ""
        scan.add(row["problem"] + leak + row["solution"], line)
    gsm8k, math500 = scan.result()
    assert (gsm8k.exact, math500.ngram) == (1, 0)
    assert [(row.line, row.problem) for row in gsm8k.listed if row.exact] == [(150, 8)]


def test_memory_is_the_benchmarks_whatever_the_rows() -> None:
    scan = OverlapScan({"b": [f"{LONG} {i}" for i in range(50)]})
    before = scan.num_ngrams
    # Three runs that all share, and the last one of each.
    assert before == 3 + 50
    scan.add(LONG, 0)
    tracemalloc.start()
    for line in range(1, 301):
        scan.add(f"{LONG} {line} " + f"word{line} " * 100, line)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scan.num_ngrams == before
    assert kept < 50_000
    assert peak < 500_000
    assert scan.result()[0].rows == 301
