"""One attempt of an RL stage in a process of its own: grpo_main <job folder> <attempt> [<phase> <iteration>].

Trainer ranks, loop, recording and checkpoints are real. Instead of vLLM, transformers samples in this process from the weights
that the ranks export, so that two runs of one seed draw the same tokens. A checkpoint is published in the iteration that saves
it. In the middle of the phase it touches `<job>/stuck` and waits to be killed. Ranks die as `dying_workers` says.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Never

import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sedsft.config import SamplingConfig
from sedsft.records import Prompt, RolloutGroup, Sample, Score
from services.driver import insist
from services.jobspec import JOB_SPEC, RLStage
from services.loops import grpo
from services.loops.saving import CheckpointSaver
from services.rollout.feed import Feed
from services.rollout.fleet import prompt_seed
from services.rollout.weight_sync import SyncReport
from services.run import Run
from tests.services.loops.dying_workers import DyingPolicyWorker

UPDATES = 2
"""Optimizer steps of an iteration of the test's stage."""


def wait_for_the_end(job: Path) -> Never:
    (job / "stuck").touch()
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    # The test was killed itself.
    os.killpg(0, signal.SIGKILL)
    raise SystemExit


class StuckWorker(DyingPolicyWorker):
    """Rank 1 does not come back from the optimizer step that the file `stuck_step` beside the model names."""

    def setup(self, setup: Any) -> None:
        self._job = Path(setup.model_path).parent / "killed"
        super().setup(setup)

    def update(self, rows: Any, denominator: int, step: int) -> dict[str, float]:
        plan = self._job / "stuck_step"
        if self.index == 1 and plan.exists() and plan.read_text() == str(step):
            wait_for_the_end(self._job)
        return super().update(rows, denominator, step)


class LocalEngines:
    """Stands where `Engines` stands."""

    def __init__(self, job: Path, stuck_in: tuple[str, int] | None) -> None:
        self._job, self._stuck_in = job, stuck_in
        self._version = 0
        self._asked = 0
        self.iteration = 0

    def start(self, request: Any) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(request.model_path)

    def next_version(self) -> int:
        self._version += 1
        return self._version

    def use_version(self, version: int) -> None:
        self._version = max(self._version, version)

    def pause(self, phase: str) -> None:
        if self._stuck_in is not None and self._stuck_in[0] == phase and self.iteration >= self._stuck_in[1]:
            wait_for_the_end(self._job)

    def load(self, folder: Path, version: int) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self._loaded = version

    def sample(self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, seed: int) -> list[RolloutGroup]:
        groups = []
        for index, prompt in enumerate(prompts):
            first = prompt_seed(seed, index)
            samples = tuple(self._draw(prompt, first + g, sampling.max_tokens) for g in range(group_size))
            groups.append(RolloutGroup(prompt, samples, seed=first))
            self.pause("rollout")
        return groups

    def stream(self, feed: Feed, group_size: int, sampling: SamplingConfig) -> None:
        ended = False
        while not ended:
            ended = feed.ended
            for ask in feed.take():
                feed.put(ask, tuple(self._draw(ask.prompt, ask.seed + g, sampling.max_tokens) for g in range(group_size)))
                self.pause("rollout")
            time.sleep(0.01)

    def halted(self) -> AbstractContextManager[None]:
        return nullcontext()

    @torch.no_grad()
    def _draw(self, prompt: Prompt, seed: int, max_tokens: int) -> Sample:
        generator = torch.Generator().manual_seed(seed)
        ids, log_probs = list(prompt.prompt_ids), []
        for _ in range(max_tokens):
            log_prob_V = self._model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
            token = int(torch.multinomial(log_prob_V.exp(), 1, generator=generator))
            ids.append(token)
            log_probs.append(float(log_prob_V[token]))
        drawn = tuple(ids[len(prompt.prompt_ids) :])
        return Sample(drawn, tuple(log_probs), self._tokenizer.decode(drawn), True, self._loaded)

    def score(self, groups: Sequence[RolloutGroup], max_error_share: float) -> list[RolloutGroup]:
        return self.scored(groups)

    def scored(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        scored = []
        for group in groups:
            verdicts = [sum(sample.response_ids) % 3 for sample in group.samples]
            scored.append(replace(group, scores=tuple(Score(float(v == 0), "scored", str(v)) for v in verdicts)))
            self.pause("score")
        return scored


class LocalSync:
    """Stands where `WeightSync` stands: the engine holds what the ranks export."""

    def __init__(self, engines: LocalEngines, trainers: Any, folder: Path) -> None:
        self._engines, self._trainers, self._folder = engines, trainers, folder

    def push(self, version: int) -> SyncReport:
        target = self._folder / "weights"
        self._trainers.call("export_weights", target, timeout_s=60)
        self._engines.pause("sync")
        self._engines.load(target, version)
        return SyncReport(version, 0.0, 0.0, (), ())


class CountingRun(Run):
    """Tells the engines which iteration it is."""

    engines: LocalEngines | None = None

    def phase(self, phase: str, step: int = 0, steps: int = 0) -> None:
        if self.engines is not None:
            self.engines.iteration = step
        super().phase(phase, step, steps)


def main(job: Path, number: int, stuck_in: tuple[str, int] | None) -> None:
    """Run the attempt to its end, unless it is stuck on the way."""
    stage = JOB_SPEC.validate_json((job / "spec.json").read_text())
    assert isinstance(stage, RLStage)
    engines = LocalEngines(job, stuck_in)
    if stuck_in is not None and stuck_in[0] == "update":
        # In the second of the iteration's steps.
        (job / "stuck_step").write_text(str(stuck_in[1] * UPDATES))
    CheckpointSaver.poll = CheckpointSaver.wait  # type: ignore[method-assign]
    grpo.PolicyWorker = StuckWorker  # type: ignore[misc]
    grpo._weight_sync = lambda stage, folder, engines, trainers, prompts: LocalSync(engines, trainers, folder)  # type: ignore
    with tempfile.TemporaryDirectory(prefix="gk", dir="/tmp", ignore_cleanup_errors=True) as temporary:
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=temporary, log_to_driver=False)
        run = CountingRun(job / f"attempt-{number}", stage)
        run.engines = engines
        with run.stage(0, stage.name) as folder:
            insist(run, partial(grpo.run_grpo, run, stage, folder, engines), lambda failure: None)  # type: ignore[arg-type]
        run.finish("succeeded", None)
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), (sys.argv[3], int(sys.argv[4])) if len(sys.argv) > 3 else None)
