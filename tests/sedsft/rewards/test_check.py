from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sedsft.records import Score
from sedsft.rewards.check import Case, CheckError, Tally, main, read_cases, read_golds

REPO = Path(__file__).resolve().parents[3]
DATA = REPO.parent / "shared" / "data"

CASES = [
    {"gold": "1/2", "prediction": r"\boxed{0.5}", "equal": True},
    {"gold": "1/2", "prediction": r"\boxed{0.4}", "equal": True, "id": "half"},
    {"gold": "1/2", "prediction": r"\boxed{0.5}", "equal": False},
    {"gold": "1/2", "prediction": "no box", "equal": False},
    {"gold": "1/2", "prediction": r"\boxed{1}", "equal": True, "policy": True},
]


def written(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_tally_by_hand() -> None:
    cases = [Case(f"c{i}", "g", "p", equal, False) for i, equal in enumerate((True, True, False, False, True))]
    scores = [
        Score(1.0, "scored", correct=True, seconds=0.5),
        Score(1.0, "scored", correct=False, seconds=0.25),
        Score(1.0, "scored", correct=True),
        Score(float("nan"), "timeout", seconds=3.0),
        Score(float("nan"), "crashed"),
    ]
    assert Tally.of(cases, scores) == Tally(n=5, agree=1, false_accept=1, false_reject=1, slowest_s=3.0)
    assert Tally.of([], []) == Tally(0, 0, 0, 0, 0.0)


def test_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "cases.jsonl", list(CASES))
    assert main([path, "--processes", "1"]) == 0
    said = capsys.readouterr().out
    assert "half: rejected; gold '1/2', read '2/5'" in said
    assert "line 3: accepted" in said
    assert "math_verify: 2 of 4 agree (50.0%); 1 falsely accepted, 1 falsely rejected, 0 not scored" in said
    assert "judgement calls: 0 of 1 agree" in said


def test_one_line_of_json(tmp_path: Path) -> None:
    path = written(tmp_path / "cases.jsonl", list(CASES))
    command = [sys.executable, "-m", "sedsft.rewards.check", path, "--json", "--mode", "strict"]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60, check=True)
    [line] = run.stdout.splitlines()
    report = json.loads(line)
    assert list(report) == ["n", "agree", "false_accept", "false_reject", "slowest_s"]
    assert {name: report[name] for name in list(report)[:4]} == {"n": 4, "agree": 2, "false_accept": 0, "false_reject": 2}
    assert 0 <= report["slowest_s"] < 1


def test_golds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golds = ["5", "", r"\begin{pmatrix}1\-2\end{pmatrix}", "{B}", None]
    path = written(tmp_path / "rows.jsonl", [{"problem": "?", "answer": gold} for gold in golds])
    assert main(["--golds", path, "--processes", "1"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"n": 5, "self_match": 3}
    assert [line.partition(":")[0] for line in listed] == ["line 2", "line 3", "line 4", "line 5"]
    assert "does not match itself" in listed[0]
    assert "unparsable_gold" in listed[1]
    assert "odd_gold: outer braces" in listed[2]
    assert main(["--golds", path, "--json", "--processes", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 5, "self_match": 3}


def test_rows_of_other_kinds_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckError, match="line 2: expected gold and prediction"):
        read_cases(written(tmp_path / "a.jsonl", [CASES[0], {"gold": "1", "prediction": "1", "equal": "yes"}]))
    with pytest.raises(CheckError, match="line 1: expected the column answer"):
        read_golds(written(tmp_path / "b.jsonl", [{"gold": "1"}]))
    assert read_golds(written(tmp_path / "c.jsonl", [{"reward_model": {"ground_truth": 7}}])) == [(1, "7")]
    assert main([str(tmp_path / "missing.jsonl")]) == 2
    assert "missing.jsonl" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_hard_cases_and_published_golds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(DATA / "verify_cases.jsonl"), "--json", "--processes", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["n"] == 78
    assert report["agree"] >= 0.97 * report["n"]
    assert report["slowest_s"] < 3
    assert main(["--golds", str(DATA / "train" / "sed_rl_math_2069.parquet"), "--processes", "1"]) == 0
    *listed, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"n": 2069, "self_match": 2068}
    kinds = [next(kind for kind in ("empty_gold", "unparsable_gold", "stray", "outer") if kind in line) for line in listed]
    assert [kinds.count(kind) for kind in ("empty_gold", "unparsable_gold", "stray", "outer")] == [1, 2, 1, 29]
