"""The RL stage: readiness figures, then rounds of sample, score, record, update and verified weight sync.

What the trainers do follows from their checkpoint and the recorded rollouts alone, so that a run that was killed ends with the
bits of one that was not.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sedsft.config import GRPOConfig, SamplingConfig
from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.data.order import RefillOrder, RowOrder
from sedsft.evaluation.metrics import readiness
from sedsft.grpo import GroupAdvantages, collect
from sedsft.records import Prompt, RolloutGroup
from services import checkpoints
from services.actor_group import ActorGroup
from services.checkpoints import CheckpointInfo
from services.jobspec import RLStage
from services.loops.engines import EngineRequest, Engines
from services.loops.policy_update import (
    advantages_of,
    kept_groups,
    rollout_figures,
    trainer_log_probs,
    update_policy,
    varies,
)
from services.loops.ranks import SETUP_TIMEOUT_S, STEP_TIMEOUT_S, spec_sha256, start_ranks, trainer_actors
from services.loops.recording import Recording
from services.loops.resume import policy_identity_of, resume_point
from services.loops.saving import CheckpointSaver
from services.model_card import CardFacts, model_card
from services.placement import actor_groups
from services.reward_check import read_matchable_prompts
from services.rollout.weight_sync import Probe, SyncReport, WeightSync
from services.run import Run, write_json
from services.rundir import attempts_of
from services.scoring.fleet import unknown_sources
from services.training.messages import PolicySetup
from services.training.policy_worker import PolicyWorker

READINESS = "readiness.json"


def run_grpo(run: Run, stage: RLStage, folder: Path, engines: Engines) -> None:
    """Train `stage` and publish its checkpoints; the figures of every iteration go to `run`.

    A later attempt goes on behind the newest good checkpoint of those before it, and reads back what they have recorded.

    Raises:
        JobError: bad rows or model, a dead worker, too many unscored samples, a sampler that disagrees with the trainer,
            checkpoints of which none is good, or a history of other settings.
    """
    config, model_path = stage.grpo, run.model_path(stage.model)
    run.phase("data")
    prompts = _prompts(run, config, model_path)
    identity = policy_identity_of(stage, model_path, prompts)
    info = CheckpointInfo(stage.name, 0, spec_sha256(run), 0, identity=identity)
    point = resume_point(run, stage, identity)
    if point is not None:
        path, info = point
        run.event("resumed", f"going on behind iteration {info.step} of {path}", path=str(path), step=info.step)
        if info.step == config.iterations:
            _keep(folder, path.parent.parent)
            run.published(checkpoints.record_of(path, info))
            return
    run.phase("loading")
    # Before the trainers are reserved, so that engines of another shape make room first; both then load side by side.
    engines.start(EngineRequest(model_path, config.precision, stage.rollout, stage.scorer, config.reward))
    with actor_groups([trainer_actors(stage.trainer, PolicyWorker)], run.job_id) as [trainers]:
        start_policy(trainers, stage, model_path)
        if point is not None:
            trainers.call("resume", path, timeout_s=SETUP_TIMEOUT_S)
        sync = _weight_sync(config, folder, engines, trainers, prompts)
        loop = _Iterations(run, stage, folder, engines, trainers, prompts, sync, info)
        loop.begin()
        while loop.info.step < config.iterations:
            loop.advance()
        loop.finish()


def start_policy(trainers: ActorGroup, stage: RLStage, model_path: Path) -> None:
    """Let the ranks of `stage` meet and open its starting model."""
    config, zero = stage.grpo, stage.trainer.zero_stage
    steps = config.iterations * updates_of(config)
    start_ranks(trainers, stage.trainer, lambda ranks: PolicySetup(ranks, str(model_path), config, zero, steps))


def updates_of(config: GRPOConfig) -> int:
    """Optimizer steps of an iteration."""
    return config.prompts_per_iteration // config.mini_batch_prompts


def train_on(
    trainers: ActorGroup, config: GRPOConfig, iteration: int, groups: Sequence[RolloutGroup]
) -> tuple[GroupAdvantages, dict[str, float]]:
    """The optimizer steps of an iteration (from 1) on its scored groups.

    All that moves the trainers' state, and a function of that state and the groups alone: a replay calls it as the loop does.
    """
    kept = kept_groups(groups, config)
    advantages = advantages_of(groups, config)
    return advantages, update_policy(trainers, config, kept, first_step=(iteration - 1) * updates_of(config) + 1)


def iteration_seed(seed: int, iteration: int, refill: int = 0) -> int:
    """Seed of all samples of an iteration (from 1), so that groups lost on the way are drawn again as they were; those of a
    refill have their own.

    Hashed, since sums of seed and iteration would give two runs with neighbouring seeds the same samples.
    """
    name = f"rollout:{seed}:{iteration}" + (f":{refill}" if refill else "")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass
class _Iterations:
    """The rounds of a stage: sample, score, record, update, save, sync.

    `info` is that of the checkpoint the ranks were resumed from, or of iteration 0, and then follows the iterations.
    """

    run: Run
    stage: RLStage
    folder: Path
    engines: Engines
    trainers: ActorGroup
    prompts: Sequence[Prompt]
    sync: WeightSync
    info: CheckpointInfo

    def __post_init__(self) -> None:
        config = self._config = self.stage.grpo
        assert self.info.identity is not None, "expected the identity that every run begins with"
        self._order = RowOrder(len(self.prompts), config.prompts_per_iteration, config.seed, steps=config.iterations)
        self._recording = Recording(self.run, self.stage.name, self.info.identity)
        self._saver = CheckpointSaver(self.run, self.trainers, self.folder, config.checkpoints.keep)
        self._version = self.engines.next_version(self.info.weight_version or 1)
        self._fitted = False
        self._figures: dict[str, float] = {}

    def begin(self) -> None:
        """Fit the engines and measure what the starting model leaves to explore, unless earlier attempts have begun."""
        if self.info.step or self._recording.holds(1):
            for attempt in attempts_of(self.run.folder)[:-1]:
                _keep(self.folder, attempt / "stages" / self.stage.name)
            return
        self._fit()
        self.run.phase("readiness")
        _readiness(self.run, self._config, self.engines, self.prompts, self.folder)

    def advance(self) -> None:
        """The next iteration."""
        iteration, config, clock = self.info.step + 1, self._config, Clock()
        groups = self._recording.read(iteration)
        if groups is None:
            groups = self._sample(iteration, clock)
            self._recording.write(iteration, groups)
        self.run.phase("train_step", iteration, config.iterations)
        with clock("train"):
            advantages, figures = train_on(self.trainers, config, iteration, groups)
        if not figures:
            self.run.event("no_update", f"iteration {iteration}: no sample counts, the weights stay", iteration=iteration)
        self._version, self._fitted = self.engines.next_version(), False
        num_samples = self.info.consumed_samples + sum(len(group.samples) for group in groups)
        self.info = replace(self.info, step=iteration, consumed_samples=num_samples, weight_version=self._version)
        figures |= rollout_figures(groups, advantages, config)
        every = config.checkpoints.every_steps
        if every is not None and iteration % every == 0 and iteration < config.iterations:
            figures["save_wait_s"] = self._save(figures)
        if not self._recording.holds(iteration + 1):
            self.run.phase("weight_sync", iteration, config.iterations)
            with clock("sync"):
                figures |= _sync_figures(self._fit())
        self.run.metrics(iteration, figures | clock.figures())
        self._figures = figures
        self._saver.poll()

    def finish(self) -> None:
        """Publish the state behind the last iteration."""
        self._save(self._figures)
        self._saver.wait()

    def _sample(self, iteration: int, clock: Clock) -> list[RolloutGroup]:
        """Scored groups of an iteration, refills included, by engines that hold the weights of now."""
        config = self._config
        if not self._fitted:
            self._fit()
        rows = RefillOrder(self._order, iteration - 1, config.max_refills or 0)

        def draw(refill: int, count: int) -> list[RolloutGroup]:
            self.run.phase("rollout", iteration, config.iterations)
            if not (drawn := [self.prompts[index] for index in rows.draw(refill, count)]):
                return []
            with clock("rollout"):
                seed = iteration_seed(config.seed, iteration, refill)
                groups = self.engines.sample(drawn, config.group_size, sampling(config), seed)
            self.run.phase("reward", iteration, config.iterations)
            with clock("score"):
                return self.engines.score(groups, config.reward.max_error_share)

        collected = collect(draw, lambda group: varies(group, config), config.prompts_per_iteration, config.max_refills or 0)
        if config.max_refills is not None and len(collected.kept) < config.prompts_per_iteration:
            self.run.event(
                "groups_missing",
                f"iteration {iteration}: {len(collected.kept)} of {config.prompts_per_iteration} groups vary after "
                f"{collected.refills} refills; the update is over those",
                iteration=iteration,
                kept=len(collected.kept),
                drawn=len(collected.drawn),
                refills=collected.refills,
            )
        return collected.drawn

    def _fit(self) -> SyncReport:
        """Bring the engines to the weights of now and verify them."""
        report = _synced(self.run, self.sync.push(self._version))
        self._fitted = True
        return report

    def _save(self, figures: Mapping[str, float]) -> float:
        """Begin to save the state behind the newest iteration; seconds that training waited."""
        self.run.phase("saving", self.info.step, self._config.iterations)
        return self._saver.begin(self.info, model_card(self.run.spec, self.stage, CardFacts(self.info, dict(figures))))


def _keep(folder: Path, left: Path) -> None:
    """Copy what an earlier attempt measured before the first update into the stage's `folder`."""
    if (left / READINESS).exists():
        shutil.copyfile(left / READINESS, folder / READINESS)


class Clock:
    """Seconds per phase of one iteration."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.monotonic() - started

    def figures(self) -> dict[str, float]:
        """`seconds_<phase>` for each phase."""
        return {f"seconds_{phase}": seconds for phase, seconds in self._seconds.items()}


def sampling(config: GRPOConfig) -> SamplingConfig:
    """How rollouts are drawn: the whole distribution, since the loss is over it."""
    return SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)


def _prompts(run: Run, config: GRPOConfig, model_path: Path) -> list[Prompt]:
    rows = read_matchable_prompts(run.data(config.data), config.reward)
    if rows.skipped:
        run.event("rows_skipped", f"{len(rows.skipped)} rows cannot be used", rows=[asdict(bad) for bad in rows.skipped])
    if unknown := unknown_sources(config.reward, [row.data_source for row in rows.rows]):
        run.event("unknown_data_sources", f"rows of {unknown} fall to the default scorer", rows=unknown)
    encoded = encode_prompts(rows.rows, load_tokenizer(model_path), config.max_prompt_tokens)
    if encoded.dropped:
        run.event("rows_dropped", f"{len(encoded.dropped)} prompts are too long", lines=list(encoded.dropped))
    return list(encoded.prompts)


def _weight_sync(
    config: GRPOConfig, folder: Path, engines: Engines, trainers: ActorGroup, prompts: Sequence[Prompt]
) -> WeightSync:
    """Tie trainers and engines together."""

    def export(target: Path) -> None:
        trainers.call("export_weights", target, timeout_s=STEP_TIMEOUT_S)

    probe = Probe(prompts[: config.probe_prompts], sampling(config), config.seed)
    return WeightSync(
        engines.ready(), export, partial(trainer_log_probs, trainers), folder / "weights", probe, config.max_logprob_gap
    )


def _synced(run: Run, report: SyncReport) -> SyncReport:
    if report.refitted:
        engines = [f"rollout-{engine}" for engine in report.refitted]
        run.event("refitted", f"weights {report.version} had to be loaded twice into {', '.join(engines)}", engines=engines)
    return report


def _sync_figures(report: SyncReport) -> dict[str, float]:
    return {"probe_gap_mean": report.mean_gap, "probe_gap_max": report.max_gap, "weight_version": report.version}


def _readiness(run: Run, config: GRPOConfig, engines: Engines, prompts: Sequence[Prompt], folder: Path) -> None:
    """What the checkpoint leaves for RL to explore, on the first prompts, before any update."""
    if not config.readiness_prompts:
        return
    groups = engines.sample(prompts[: config.readiness_prompts], config.group_size, sampling(config), config.seed)
    figures: dict[str, Any] = readiness(engines.score(groups, config.reward.max_error_share))
    write_json(folder / READINESS, figures)
    run.event("readiness", f"readiness over {len(groups)} prompts: {figures}", **figures)
