"""The RL stage: readiness figures, then iterations of sample, score, record, update and verified weight sync.

Whether engines sample while trainers train is up to the stage's overlap (services.loops.overlap); the loop is the same. What
the trainers do follows from their checkpoint and the recorded rollouts alone, so that a run that was killed ends with the bits
of one that was not.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sedsft.config import AsyncOverlap, GRPOConfig, OneStepOffOverlap, SyncOverlap
from sedsft.data.chat import encode_prompts, load_tokenizer
from sedsft.evaluation.metrics import readiness
from sedsft.grpo import GroupAdvantages
from sedsft.records import Prompt, RolloutGroup
from services import checkpoints
from services.actor_group import ActorGroup
from services.checkpoints import CheckpointInfo
from services.jobspec import RLStage
from services.loops.engines import EngineRequest, Engines
from services.loops.group_counts import GroupCounts, check_staleness, staleness_figures
from services.loops.ledger import Ledger, ledger_prompts
from services.loops.overlap import Fit, OneStepOff, Overlap, Sync
from services.loops.overlap_async import Async
from services.loops.policy_update import advantages_of, kept_groups, rollout_figures, update_policy
from services.loops.ranks import SETUP_TIMEOUT_S, spec_sha256, start_ranks, trainer_actors
from services.loops.recording import Recording
from services.loops.resume import policy_identity_of, resume_point
from services.loops.rounds import Rounds, sampling
from services.loops.saving import CheckpointSaver
from services.loops.syncing import policy_sync
from services.loops.timeline import ENGINES, FILE, TRAINERS, Timeline
from services.model_card import CardFacts, model_card
from services.placement import actor_groups
from services.reward_check import read_matchable_prompts
from services.rollout.weight_sync import WeightSync
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
    ledger = Ledger(run, config, folder, engines, ledger_prompts(run, config, model_path, prompts))
    # Before the trainers are reserved, so that engines of another shape make room first; both then load side by side.
    engines.start(EngineRequest(model_path, config.precision, stage.rollout, stage.scorer, config.reward))
    with actor_groups([trainer_actors(stage.trainer, PolicyWorker)], run.job_id) as [trainers]:
        start_policy(trainers, stage, model_path)
        if point is not None:
            trainers.call("resume", path, timeout_s=SETUP_TIMEOUT_S)
        sync = policy_sync(stage, folder, engines.ready(), trainers, prompts)
        loop = _Iterations(run, stage, folder, engines, trainers, prompts, sync, info, ledger)
        try:
            loop.begin()
            while loop.info.step < config.iterations:
                loop.advance()
            loop.finish()
        finally:
            loop.close()


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


def overlap_of(rounds: Rounds, fit: Fit) -> Overlap:
    """The mode that the stage's settings name."""
    match rounds.config.overlap:
        case SyncOverlap():
            return Sync(rounds, fit)
        case OneStepOffOverlap():
            return OneStepOff(rounds, fit)
        case AsyncOverlap(max_staleness=max_staleness):
            return Async(rounds, fit, max_staleness)


@dataclass
class _Iterations:
    """The iterations of a stage. `info` is that of the checkpoint the ranks were resumed from, or of iteration 0, and then
    follows the iterations."""

    run: Run
    stage: RLStage
    folder: Path
    engines: Engines
    trainers: ActorGroup
    prompts: Sequence[Prompt]
    sync: WeightSync
    info: CheckpointInfo
    ledger: Ledger

    def __post_init__(self) -> None:
        config = self._config = self.stage.grpo
        assert self.info.identity is not None, "expected the identity that every run begins with"
        self._recording = Recording(self.run, self.stage.name, self.info.identity)
        self._saver = CheckpointSaver(self.run, self.trainers, self.folder, config.checkpoints.keep)
        self._timeline, self._counts = Timeline(), GroupCounts()
        first = self._first_version()
        self._rounds = Rounds(
            self.run, config, self.engines, self.prompts, self._recording, first, self._timeline, self._counts
        )
        self._mode = overlap_of(self._rounds, self._fit)
        self._fitted: int | None = None
        self._sync_figures: dict[str, float] = {}
        self._figures: dict[str, float] = {}

    def begin(self) -> None:
        """Measure what the starting model leaves to explore, unless earlier attempts have begun."""
        if self.info.step or self._recording.holds(1):
            for attempt in attempts_of(self.run.folder)[:-1]:
                _keep(self.folder, attempt / "stages" / self.stage.name)
        elif self._config.readiness_prompts:
            self._fit()
            self.run.phase("readiness")
            _readiness(self.run, self._config, self.engines, self.prompts, self.folder)
        self._probe()
        self._timeline.cut()

    def advance(self) -> None:
        """The next iteration."""
        iteration, config = self.info.step + 1, self._config
        version = self._rounds.version(iteration)
        groups = self._mode.groups(iteration)
        self._mode.check()
        check_staleness(groups, version, self._mode.max_staleness, iteration)
        self._mode.begin_next(iteration)
        self.run.phase("train_step", iteration, config.iterations)
        with self._timeline.span("train", TRAINERS):
            advantages, figures = train_on(self.trainers, config, iteration, groups)
        if not figures:
            self.run.event("no_update", f"iteration {iteration}: no sample counts, the weights stay", iteration=iteration)
        self.engines.use_version(version + 1)
        num_samples = sum(len(group.samples) for group in groups)
        consumed = self.info.consumed_samples + num_samples
        self.info = replace(self.info, step=iteration, consumed_samples=consumed, weight_version=version + 1)
        figures |= rollout_figures(groups, advantages, config) | staleness_figures(groups, version)
        self._mode.settle(iteration)
        every = config.checkpoints.every_steps
        if every is not None and iteration % every == 0 and iteration < config.iterations:
            figures["save_wait_s"] = self._save(figures)
        if self._mode.wants_weights(iteration):
            self._fit()
        self._probe()
        running = self._mode.check()
        window = self._timeline.cut()
        window.append_to(self.folder / FILE, iteration)
        figures |= self._sync_figures | self._counts.figures(running) | window.figures()
        self._sync_figures = {}
        self.run.metrics(iteration, figures | {"samples_per_s": num_samples / figures["iteration_s"]})
        self._figures = figures
        self._saver.poll()

    def finish(self) -> None:
        """Publish the state behind the last iteration."""
        self._save(self._figures)
        self._saver.wait()

    def close(self) -> None:
        """End what the mode runs beside the loop."""
        self._mode.close()

    def _first_version(self) -> int:
        """Version of the starting weights: that of earlier attempts, where they have left anything."""
        if self.info.weight_version is not None:
            first: int | None = self.info.weight_version - self.info.step
        else:
            first = self._recording.first_version()
        if first is None:
            return self.engines.next_version()
        self.engines.use_version(first + self.info.step)
        return first

    def _fit(self) -> None:
        """Bring the engines to the weights of now and verify them, unless they hold them."""
        version = self._rounds.version(self.info.step + 1)
        if self._fitted == version:
            return
        self.run.phase("weight_sync", self.info.step, self._config.iterations)
        with self._timeline.span("sync", ENGINES, TRAINERS):
            report = self.sync.push(version)
        if report.refitted:
            engines = [f"rollout-{engine}" for engine in report.refitted]
            self.run.event("refitted", f"weights {version} had to be loaded twice into {', '.join(engines)}", engines=engines)
        self._fitted, self._sync_figures = version, report.figures()

    def _probe(self) -> None:
        """Note in the ledger what is left to explore, when it is due."""
        if self.ledger.due(self.info.step):
            self._fit()
            with self._timeline.span("ledger", ENGINES):
                self.ledger.probe(self.info.step)

    def _save(self, figures: Mapping[str, float]) -> float:
        """Begin to save the state behind the newest iteration; seconds that training waited."""
        self.run.phase("saving", self.info.step, self._config.iterations)
        return self._saver.begin(self.info, model_card(self.run.spec, self.stage, CardFacts(self.info, dict(figures))))


def _keep(folder: Path, left: Path) -> None:
    """Copy what an earlier attempt measured before the first update into the stage's `folder`."""
    if (left / READINESS).exists():
        shutil.copyfile(left / READINESS, folder / READINESS)


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


def _readiness(run: Run, config: GRPOConfig, engines: Engines, prompts: Sequence[Prompt], folder: Path) -> None:
    """What the checkpoint leaves for RL to explore, on the first prompts, before any update."""
    groups = engines.sample(prompts[: config.readiness_prompts], config.group_size, sampling(config), config.seed)
    figures: dict[str, Any] = readiness(engines.score(groups, config.reward.max_error_share))
    write_json(folder / READINESS, figures)
    run.event("readiness", f"readiness over {len(groups)} prompts: {figures}", **figures)
