"""The ledger over a run of real ranks: what it notes, that it changes nothing, and that a killed run goes on with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sedsft.config import DataConfig, GRPOConfig
from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services.loops.ledger import LEDGER, SPENT, Ledger
from services.rundir import read_lines
from tests.services.loops.test_grpo_kill import finish, kill_in, make_rl_spec, new_job
from tests.services.loops.test_sft import sha256

PROMPTS = [Prompt((1,), "one", "1", 1), Prompt((2,), "two", "2", 2)]


class Probed:
    """Stands where engines stand: probe by probe, the entropy of the samples and whether they are right."""

    def __init__(self, entropies: list[float], right: list[bool]) -> None:
        self._plan = list(zip(entropies, right, strict=True))
        self.seeds: set[int] = set()

    def sample(self, prompts: Any, group_size: int, sampling: Any, seed: int) -> list[RolloutGroup]:
        self.seeds.add(seed)
        entropy, self._right = self._plan.pop(0)
        sample = Sample((3, 4), (-entropy, -entropy), "w3 w4", False, 7)
        return [RolloutGroup(prompt, (sample,) * group_size) for prompt in prompts]

    def score(self, groups: list[RolloutGroup], max_error_share: float) -> list[RolloutGroup]:
        scores = (Score(float(self._right), "scored", "3"),) * len(groups[0].samples)
        return [RolloutGroup(group.prompt, group.samples, scores) for group in groups]


class Attempt:
    """As much of a run as the ledger asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "stages" / "rl").mkdir(parents=True)
        self.events: list[tuple[str, Any]] = []
        self.figures: list[tuple[int, dict[str, float]]] = []

    def event(self, kind: str, message: str, /, **data: Any) -> None:
        self.events.append((kind, data["iteration"]))

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.figures.append((step, values))

    def phase(self, phase: str, step: int = 0, steps: int = 0) -> None:
        pass


def ledger_of(run: Attempt, engines: Probed) -> Ledger:
    settings = {"prompts": 2, "samples": 2, "pass_k": 2, "every_iterations": 2, "smoothing_probes": 1}
    config = GRPOConfig(data=DataConfig(path="rl.jsonl"), iterations=7, ledger=settings)  # type: ignore[arg-type]
    return Ledger(run, config, run.folder / "stages" / "rl", engines, PROMPTS)  # type: ignore[arg-type]


def test_probes_alarm_once_and_go_on_in_a_later_attempt(tmp_path: Path) -> None:
    engines = Probed([1.0, 0.4, 0.3, 0.2, 0.1], [False, False, False, True, False])
    first = Attempt(tmp_path / "attempt-1")
    ledger = ledger_of(first, engines)
    for iteration in range(4):
        ledger.probe(iteration)
    assert [step for step, _ in first.figures] == [0, 2]
    assert first.figures[1][1] == {
        "ledger_pass@1": 0.0,
        "ledger_pass@2": 0.0,
        "ledger_token_entropy": pytest.approx(0.4),
        "ledger_distinct_answers": 1.0,
    }
    assert first.events == [(SPENT, 2)]
    # Killed while it wrote a line, and gone back to a checkpoint.
    path = first.folder / "stages" / "rl" / LEDGER
    path.write_text(path.read_text() + '{"iteration": 4, "pa')
    second = Attempt(tmp_path / "attempt-2")
    ledger = ledger_of(second, engines)
    assert [iteration for iteration in range(9) if ledger.due(iteration)] == [4, 6, 7, 8]
    for iteration in range(1, 8):
        ledger.probe(iteration)
    # Spent goes on at 4, is over at 6 with reward, and comes back at the last iteration.
    assert second.events == [(SPENT, 7)]
    entries = [entry for entry, _ in read_lines(second.folder / "stages" / "rl" / LEDGER)]
    assert [entry["iteration"] for entry in entries] == [0, 2, 4, 6, 7]
    assert [entry["pass@1"] for entry in entries] == [0.0, 0.0, 0.0, 1.0, 0.0]
    assert entries[0] == {
        "iteration": 0, "weight_versions": [7], "prompts": 2, "samples": 4, "scored": 4, "pass@1": 0.0, "pass@2": 0.0,
        "token_entropy": pytest.approx(1.0), "distinct_answers": 1.0,
    }  # fmt: skip
    assert len(engines.seeds) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_with_its_ledger_and_ends_with_the_bits_of_a_run_without(tmp_path: Path) -> None:
    ledger = {"prompts": 3, "samples": 2, "pass_k": 2, "every_iterations": 2}
    settings: dict[str, Any] = {"iterations": 3, "checkpoints": {"every_steps": 1, "keep": 9}}
    plain = new_job(tmp_path / "plain", make_rl_spec(tmp_path, **settings))
    without = finish(plain, 1)
    killed = new_job(tmp_path / "killed", make_rl_spec(tmp_path, **settings, ledger=ledger))
    kill_in(killed, 1, "rollout", 3)
    other = finish(killed, 2)
    assert sha256(without / "model.safetensors") == sha256(other / "model.safetensors")
    assert not (plain / "attempt-1" / "stages" / "rl" / LEDGER).exists()
    entries = [json.loads(line) for line in (killed / "attempt-2" / "stages" / "rl" / LEDGER).read_text().splitlines()]
    assert [(entry["iteration"], entry["weight_versions"]) for entry in entries] == [(0, [1]), (2, [3]), (3, [4])]
    assert all(entry["samples"] == entry["scored"] == 6 for entry in entries)
    figures = [(line["step"], line["values"]) for line, _ in read_lines(killed / "attempt-2" / "metrics.jsonl")]
    assert [step for step, values in figures if "ledger_pass@1" in values] == [3]
