"""The SFT stage: calibrate tau on the starting model, train, publish verified checkpoints.

A step whose loss or gradient is not finite is skipped; `services.loops.skips` says when training goes back or ends. All that
steps depend on is part of the checkpoint, so that a run that was killed ends with the bits of one that was not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePath

from sedsft.config import SEDObjective, SFTConfig
from sedsft.data.chat import load_tokenizer
from sedsft.data.order import RowOrder
from sedsft.data.store import ExampleStore
from sedsft.early_warnings import EarlyWarnings
from sedsft.records import Example
from sedsft.tau import TauController
from services import checkpoints
from services.actor_group import ActorGroup
from services.checkpoints import CheckpointInfo
from services.errors import CheckpointInvalid, TrainingDiverged
from services.jobspec import SFTStage
from services.loops.ranks import SETUP_TIMEOUT_S, spec_sha256, start_ranks, trainer_actors
from services.loops.resume import identity_of, resume_point
from services.loops.saving import CheckpointSaver
from services.loops.sft_data import sft_examples
from services.loops.sft_steps import calibrate, coloured_rows, evaluate, train_step
from services.loops.skips import SKIPS_IN_A_ROW, Skips
from services.model_card import CardFacts, model_card
from services.placement import actor_groups
from services.run import Run, write_json
from services.training.messages import SFTSetup
from services.training.sft_worker import SFTWorker

INSPECTED_ROWS = 6
CALIBRATION, DATA_REPORT, TOKENS = "calibration.json", "data_report.json", "tokens.json"


def run_sft(run: Run, stage: SFTStage, folder: Path) -> None:
    """Train `stage` and publish its checkpoints; the figures of every step go to `run`.

    A later attempt goes on behind the newest good checkpoint of those before it.

    Raises:
        JobError: bad rows or model, a dead rank, training that diverged, checkpoints of which none is good.
    """
    config, model_path = stage.sft, run.model_path(stage.model)
    run.phase("data")
    training, held_out = sft_examples(run, config, folder, model_path)
    order = RowOrder(len(training), config.batch_size, config.seed, epochs=config.epochs, steps=config.steps)
    identity = identity_of(stage, model_path, training, held_out)
    point = resume_point(run, stage, identity)
    if point is not None:
        path, info = point
        run.event("resumed", f"going on behind step {info.step} of {path}", path=str(path), step=info.step)
        if info.step == order.num_steps and path.is_relative_to(run.folder.parent):
            _keep_finished(run, folder, path, info)
            return
    with actor_groups([trainer_actors(stage.trainer, SFTWorker)], run.job_id) as [trainers]:
        run.phase("loading")
        zero = stage.trainer.zero_stage
        start_ranks(trainers, stage.trainer, lambda ranks: SFTSetup(ranks, str(model_path), config, zero, order.num_steps))
        if point is not None:
            trainers.call("resume", path, timeout_s=SETUP_TIMEOUT_S)
        else:
            run.phase("calibrating")
            tau, calibration = calibrate(run, trainers, config, held_out)
            state = tau.state() if tau else None
            info = CheckpointInfo(
                stage.name, 0, spec_sha256(run), 0, tau.tau if tau else None, calibration, tau_state=state, identity=identity
            )
        if info.calibration is not None:
            write_json(folder / CALIBRATION, info.calibration)
        loop = _Training(run, stage, folder, trainers, training, held_out, order, info)
        while loop.info.step < order.num_steps:
            loop.advance()
        tokenizer = load_tokenizer(model_path)
        write_json(folder / TOKENS, coloured_rows(trainers, config, training[:INSPECTED_ROWS], loop.tau_value, tokenizer))
        loop.finish()


def _keep_finished(run: Run, folder: Path, path: Path, info: CheckpointInfo) -> None:
    """The last step was saved at `path` before, so nothing is left to train: what an earlier attempt left is this one's too."""
    if path.is_relative_to(folder):
        return
    for name in (CALIBRATION, TOKENS):
        if (left := path.parent.parent / name).exists():
            shutil.copyfile(left, folder / name)
    run.published(checkpoints.record_of(path, info))


@dataclass
class _State:
    """What moves from step to step beside the ranks' own state."""

    tau: TauController | None
    warnings: EarlyWarnings
    skips: Skips

    @classmethod
    def of(cls, config: SFTConfig, info: CheckpointInfo) -> _State:
        """The state behind the step that `info` was saved at."""
        objective, tau, ratio = config.objective, None, None
        if isinstance(objective, SEDObjective) and info.tau_state is not None:
            tau = TauController.from_state(objective, info.tau_state)
            # A fixed tau and the authors' calibration ask for no particular share.
            ratio = objective.mask_ratio if tau.mode in ("initial", "running") else None
        warnings = EarlyWarnings.from_state(ratio, info.warnings) if info.warnings else EarlyWarnings(ratio)
        return cls(tau, warnings, Skips(**info.skips) if info.skips else Skips())


@dataclass
class _Training:
    """The steps of a stage and what follows on each: figures, warnings, evaluation, checkpoints, ways back.

    `info` is that of the checkpoint the ranks were resumed from, or of step 0, and then follows the steps.
    """

    run: Run
    stage: SFTStage
    folder: Path
    trainers: ActorGroup
    rows: ExampleStore
    held_out: ExampleStore
    order: RowOrder
    info: CheckpointInfo

    def __post_init__(self) -> None:
        self._config = self.stage.sft
        self._begin = self.info
        self._state = _State.of(self._config, self.info)
        self._saver = CheckpointSaver(self.run, self.trainers, self.folder, self._config.checkpoints.keep)
        self._save_owed = False
        self._figures: dict[str, float] = {}

    @property
    def tau_value(self) -> float | None:
        """tau of the next step, None where there is none."""
        return self._state.tau.tau if self._state.tau else None

    def advance(self) -> None:
        """Train the next step, and do whatever is due behind it.

        Raises:
            TrainingDiverged: skipped steps in a row, again after going back.
        """
        step, state = self.info.step + 1, self._state
        self.run.phase("training", step, self.order.num_steps)
        batch = [self.rows[int(index)] for index in self.order.batch(step - 1)]
        outcome = train_step(self.trainers, self._config, batch, state.tau, step)
        figures = outcome.figures
        if outcome.fault is None:
            state.skips = state.skips.trained()
            self._warn(step, figures)
        else:
            state.skips = state.skips.skipped()
            self._tell_skipped(step, outcome.fault, batch)
        figures["skipped_steps"] = state.skips.total
        if (verdict := state.skips.verdict(step)) != "go on":
            self.run.metrics(step, figures)
            self._go_back(step) if verdict == "go back" else self._give_up(step)
            return
        self._note(step, len(batch))
        last = step == self.order.num_steps
        if last or _is_due(step, self._config.evaluate_every):
            figures |= evaluate(self.trainers, self._config, self.held_out, self.tau_value)
        self._figures = dict(figures)
        self._save_owed |= _is_due(step, self._config.checkpoints.every_steps)
        # Where training goes back to lies before the first of the steps that were skipped; `finish` saves the last one.
        if self._save_owed and not state.skips.in_a_row and not last:
            figures["save_wait_s"] = self._save()
        self.run.metrics(step, figures)
        self._saver.poll()

    def finish(self) -> None:
        """Publish the state behind the last step."""
        self._save()
        self._saver.wait()

    def _note(self, step: int, num_rows: int) -> None:
        state = self._state
        self.info = replace(
            self.info,
            step=step,
            consumed_samples=self.info.consumed_samples + num_rows,
            tau=self.tau_value,
            tau_state=state.tau.state() if state.tau else None,
            skips=asdict(state.skips),
            warnings=state.warnings.state(),
        )

    def _save(self) -> float:
        """Begin to save the state behind the newest step; seconds that training waited."""
        self.run.phase("saving", self.info.step, self.order.num_steps)
        self._save_owed = False
        report = self.folder / DATA_REPORT
        data = json.loads(report.read_text(encoding="utf-8"))["training"] if report.exists() else None
        facts = CardFacts(self.info, self._figures, data)
        return self._saver.begin(self.info, model_card(self.run.spec, self.stage, facts))

    def _warn(self, step: int, figures: Mapping[str, float]) -> None:
        for warning in self._state.warnings.observe(figures):
            message = f"step {step}: {warning.message}; {warning.advice}"
            seen, advice = warning.figures, warning.advice
            self.run.event("warning", message, kind=warning.kind, step=step, figures=seen, advice=advice)

    def _tell_skipped(self, step: int, fault: str, batch: Sequence[Example]) -> None:
        name = PurePath(self._config.data.path).name
        rows = [f"{example.file or name}:{example.line}" for example in batch]
        message = f"step {step} skipped, its {fault} is not finite; the weights are unchanged"
        skips = self._state.skips
        self.run.event("step_skipped", message, step=step, fault=fault, rows=rows, in_a_row=skips.in_a_row, total=skips.total)

    def _go_back(self, step: int) -> None:
        """Put everything back to the newest good checkpoint, or to the starting model where there is none."""
        self.run.phase("going back", step, self.order.num_steps)
        self._saver.wait()
        assert self.info.identity is not None, "expected the identity that every run begins with"
        point = resume_point(self.run, self.stage, self.info.identity)
        if point is None and self._begin.step:
            raise CheckpointInvalid(
                f"expected the checkpoint of step {self._begin.step} that training had gone on from, it is gone; restore it"
            )
        if point is None:
            self.trainers.call("restart", timeout_s=SETUP_TIMEOUT_S)
        else:
            self.trainers.call("resume", point[0], timeout_s=SETUP_TIMEOUT_S)
        skips = self._state.skips.gone_back(step)
        self.info = self._begin if point is None else point[1]
        self._state = _State.of(self._config, self.info)
        self._state.skips = skips
        self._save_owed = False
        source = "the starting model" if point is None else f"step {self.info.step} ({point[0]})"
        message = f"{SKIPS_IN_A_ROW} steps in a row were skipped up to step {step}; training goes on from {source}"
        self.run.event("rolled_back", message, step=step, to_step=self.info.step, path=str(point[0]) if point else None)

    def _give_up(self, step: int) -> None:
        self._saver.wait()
        raise TrainingDiverged(
            f"expected a finite loss and gradient, got {SKIPS_IN_A_ROW} steps in a row up to step {step} without, again after "
            f"training had gone back from step {self._state.skips.gone_back_from}; lower the learning rate, lengthen the "
            "warm-up, or look at the rows that the events step_skipped name"
        )


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
