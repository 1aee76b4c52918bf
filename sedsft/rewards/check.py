"""How the comparison of answers does on a file of cases, or a data set's golds on themselves. Every row is scored in a process
that is killed when it takes too long.

    python -m sedsft.rewards.check CASES [--mode math_verify|strict|qwen] [--json]
    python -m sedsft.rewards.check --golds ROWS [--mode ...] [--json]

CASES is .jsonl with `gold`, `prediction`, `equal` and, optional, `id` and `policy`. Rows with `policy: true` are judgement
calls and counted apart. `--json` prints one line, without them: `{"n", "agree", "false_accept", "false_reject", "slowest_s"}`;
cases that could not be scored are in `n` alone.

ROWS is .jsonl, .json or .parquet with `answer`, or verl's `reward_model.ground_truth`. Lists golds that do not match
themselves or have another fault, and prints `{"n", "self_match"}`; with `--json` nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from sedsft.data import DataFileError
from sedsft.data.files import Placed, read_values
from sedsft.records import Score, ScoringItem
from sedsft.reward_config import RewardConfig, ScorerName
from sedsft.rewards.golds import GOLD_COMMAND
from sedsft.rewards.pool import PoolLimits, ScoringPool, scoring_command
from sedsft.rewards.verifier import Mode

TIMEOUT_S = 2.5
MEMORY_MB = 2048
_SCORERS: dict[Mode, ScorerName] = {"math_verify": "math", "strict": "math_strict", "qwen": "math_qwen"}


@dataclass(frozen=True)
class Case:
    """A pair of gold and output, and whether they should be equal."""

    name: str
    gold: str
    prediction: str
    equal: bool
    policy: bool


@dataclass(frozen=True)
class Tally:
    """How scores compare with what they should be."""

    n: int
    agree: int
    false_accept: int
    false_reject: int
    slowest_s: float

    @classmethod
    def of(cls, cases: Sequence[Case], scores: Sequence[Score]) -> Tally:
        """Over the given cases; a case without a score neither agrees nor is falsely accepted or rejected."""
        pairs = [(case, score.right) for case, score in zip(cases, scores, strict=True) if score.status == "scored"]
        return cls(
            n=len(cases),
            agree=sum(right == case.equal for case, right in pairs),
            false_accept=sum(right and not case.equal for case, right in pairs),
            false_reject=sum(case.equal and not right for case, right in pairs),
            slowest_s=round(max((score.seconds for score in scores), default=0.0), 3),
        )

    def line(self) -> str:
        """For people."""
        share = f"{self.agree / self.n:.1%}" if self.n else "-"
        unscored = self.n - self.agree - self.false_accept - self.false_reject
        return (
            f"{self.agree} of {self.n} agree ({share}); {self.false_accept} falsely accepted, {self.false_reject} falsely "
            f"rejected, {unscored} not scored; slowest {self.slowest_s:.3f} s"
        )


class CheckError(ValueError):
    """A file that holds no cases or no golds."""


def read_cases(path: str) -> list[Case]:
    """The cases of a file.

    Raises:
        CheckError: a row without the columns it needs.
    """
    return [_case(placed) for placed in read_values(path, None)]


def _case(placed: Placed) -> Case:
    row = placed.value
    wanted = {"gold": str, "prediction": str, "equal": bool}
    if not isinstance(row, dict) or any(not isinstance(row.get(name), kind) for name, kind in wanted.items()):
        raise CheckError(
            f"line {placed.line}: expected gold and prediction (texts) and equal (true or false), got {row!r:.200}"
        )
    name = str(row.get("id") or f"line {placed.line}")
    return Case(name, row["gold"], row["prediction"], row["equal"], row.get("policy") is True)


def read_golds(path: str) -> list[tuple[int, str]]:
    """Line and gold of every row; a missing gold is "".

    Raises:
        CheckError: a row that has no place for a gold.
    """
    return [(placed.line, _gold(placed)) for placed in read_values(path, None)]


def _gold(placed: Placed) -> str:
    row: Any = placed.value
    if isinstance(row, dict) and isinstance(row.get("reward_model"), dict):
        row = {"answer": row["reward_model"].get("ground_truth")}
    if not isinstance(row, dict) or "answer" not in row:
        raise CheckError(f"line {placed.line}: expected the column answer, or reward_model.ground_truth, got {row!r:.200}")
    return "" if row["answer"] is None else str(row["answer"])


def score_cases(cases: Sequence[Case], mode: Mode, processes: int) -> list[Score]:
    """Scores of the cases, in order."""
    return _scored([ScoringItem(case.gold, case.prediction) for case in cases], mode, processes)


def self_matches(golds: Sequence[str], mode: Mode, processes: int) -> list[Score]:
    """Scores of the golds as answers to themselves, in order."""
    return _scored([ScoringItem(gold, rf"\boxed{{{gold}}}") for gold in golds], mode, processes)


def _scored(items: Sequence[ScoringItem], mode: Mode, processes: int) -> list[Score]:
    command = scoring_command(RewardConfig(name=_SCORERS[mode]))
    with ScoringPool(command, PoolLimits(processes, TIMEOUT_S, MEMORY_MB)) as pool:
        return pool.score(items)


def gold_faults(golds: Sequence[str], processes: int) -> list[str]:
    """What is wrong with each gold by its text, "" where nothing is."""
    with ScoringPool(GOLD_COMMAND, PoolLimits(processes, TIMEOUT_S, MEMORY_MB)) as pool:
        return [score.extracted or score.detail for score in pool.score([ScoringItem(gold, "") for gold in golds])]


def _check_cases(path: str, mode: Mode, processes: int, as_json: bool) -> None:
    cases = read_cases(path)
    scores = score_cases(cases, mode, processes)
    plain = [index for index, case in enumerate(cases) if not case.policy]
    policy = [index for index, case in enumerate(cases) if case.policy]
    tally = Tally.of([cases[i] for i in plain], [scores[i] for i in plain])
    if as_json:
        _say(json.dumps(vars(tally)))
        return
    for case, score in zip(cases, scores, strict=True):
        if score.status != "scored":
            _say(f"{case.name}: {score.status}, {score.detail}")
        elif score.right != case.equal:
            verdict = "accepted" if score.right else "rejected"
            kind = "judgement call, " if case.policy else ""
            _say(f"{case.name}: {kind}{verdict}; gold {case.gold!r:.80}, read {score.extracted!r:.80}")
    _say(f"{mode}: {tally.line()}")
    if policy:
        _say(f"judgement calls: {Tally.of([cases[i] for i in policy], [scores[i] for i in policy]).line()}")


def _check_golds(path: str, mode: Mode, processes: int, as_json: bool) -> None:
    rows = read_golds(path)
    golds = [gold for _, gold in rows]
    scores = self_matches(golds, mode, processes)
    if not as_json:
        for (line, gold), score, fault in zip(rows, scores, gold_faults(golds, processes), strict=True):
            if score.status != "scored" or not score.right:
                why = score.detail or f"read {score.extracted!r:.80}"
                _say(f"line {line}: does not match itself, {why}; gold {gold!r:.200}{'; ' if fault else ''}{fault}")
            elif fault:
                _say(f"line {line}: {fault}")
    _say(json.dumps({"n": len(rows), "self_match": sum(score.status == "scored" and score.right for score in scores)}))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main(arguments: Sequence[str]) -> int:
    """Run the check that the command line asks for; exit code 2 for a file that cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m sedsft.rewards.check", description=(__doc__ or "").partition("\n\n")[0])
    files = parser.add_mutually_exclusive_group(required=True)
    files.add_argument("cases", nargs="?", metavar="CASES", help="file of cases")
    files.add_argument("--golds", metavar="ROWS", help="file of rows whose golds are compared with themselves")
    parser.add_argument("--mode", choices=get_args(Mode), default="math_verify", help="how answers are compared")
    parser.add_argument("--processes", type=int, choices=range(1, 65), default=2, metavar="N", help="scoring processes")
    parser.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    options = parser.parse_args(arguments)
    try:
        if options.golds is not None:
            _check_golds(options.golds, options.mode, options.processes, options.json)
        else:
            _check_cases(options.cases, options.mode, options.processes, options.json)
    except (CheckError, DataFileError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
