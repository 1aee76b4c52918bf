"""Trainer to engines: export, load, and proof that every engine now computes what the trainer computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedsft.config import SamplingConfig
from sedsft.records import Prompt, Sample
from services.errors import WeightSyncMismatch
from services.rollout.fleet import RolloutFleet
from services.rollout.keeper import Refit

Pair = tuple[tuple[int, ...], tuple[int, ...]]
Scored = tuple[tuple[int, ...], npt.NDArray[np.float32]]
"""A response and the trainer's log-probability of each of its tokens."""
TrainerLogProbs = Callable[[list[Pair]], list[npt.NDArray[np.float32]]]

_TIMEOUT_S = 600.0
_PROBE_MAX_TOKENS = 16
_LEAST_SHARED = 0.5
"""Share of the probe's tokens that an engine refitted without the trainer must have in common with those judged before."""


@dataclass(frozen=True)
class Probe:
    """What engines sample after a sync to be compared; `sampling` is the run's, its `max_tokens` cut to 16."""

    prompts: Sequence[Prompt]
    sampling: SamplingConfig
    seed: int


@dataclass(frozen=True)
class SyncReport:
    """One sync. Gaps are |log p(sampler) - log p(trainer)| over the probe's tokens, in nats."""

    version: int
    mean_gap: float
    max_gap: float
    engine_mean_gaps: tuple[float, ...]
    refitted: tuple[int, ...]
    """Engines that needed a second load."""


class WeightSync:
    """Pushes weights and refuses to go on with an engine that disagrees with the trainer.

    `export(folder)` writes the trainer's weights as Hugging Face safetensors. `trainer_log_probs(pairs)` gives, for each
    (prompt ids, response ids), the log-probability of each response token at the probe's temperature.
    """

    def __init__(
        self,
        fleet: RolloutFleet,
        export: Callable[[Path], None],
        trainer_log_probs: TrainerLogProbs,
        folder: Path,
        probe: Probe,
        max_gap: float,
    ) -> None:
        self._fleet = fleet
        self._export = export
        self._trainer_log_probs = trainer_log_probs
        self._folder = folder
        self._probe = probe
        self._max_gap = max_gap

    def push(self, version: int) -> SyncReport:
        """Bring every engine that lives to the trainer's weights and prove it; they serve when this returns.

        Engines that die on the way leave the sync and are mended by the fleet, which keeps the exported files for them until
        the next sync.

        Raises:
            WeightSyncMismatch: an engine's mean gap stays above the bound after a second load.
            WorkerDied: no engine is left.
        """
        folder = self._folder / f"weights-{version}"
        with self._fleet.exclusive():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                self._export(folder)
                report, known = self._load_and_probe(str(folder), version)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            request = self._fleet.probe_request(self._probe.prompts, self._probe_sampling(), self._probe.seed)
            self._fleet.keep(Refit(str(folder), version, request, partial(_mismatch, known, self._max_gap)))
        return report

    def _load_and_probe(self, folder: str, version: int) -> tuple[SyncReport, list[list[Scored]]]:
        fleet = self._fleet
        known: list[list[Scored]] = [[] for _ in self._probe.prompts]
        gaps: dict[int, npt.NDArray[np.float32]] = {}
        refitted: list[int] = []
        while not gaps:
            gaps = self._measure(fleet.load_weights(folder, version, timeout_s=_TIMEOUT_S), known)
            refitted = [engine for engine, gap in gaps.items() if not gap.mean() <= self._max_gap]
            for engine in refitted:
                fleet.judge(engine, agrees=False)
            again = fleet.load_weights_on(refitted, folder, version, timeout_s=_TIMEOUT_S)
            gaps = {engine: gap for engine, gap in gaps.items() if engine not in refitted} | self._measure(again, known)
        self._refuse(gaps, version)
        for engine in gaps:
            fleet.judge(engine, agrees=True)
        joined = np.concatenate(list(gaps.values()))
        means = tuple(float(gaps[engine].mean()) for engine in sorted(gaps))
        return SyncReport(version, float(joined.mean()), float(joined.max()), means, tuple(refitted)), known

    def _probe_sampling(self) -> SamplingConfig:
        short = min(_PROBE_MAX_TOKENS, self._probe.sampling.max_tokens)
        return self._probe.sampling.model_copy(update={"max_tokens": short})

    def _measure(self, engines: list[int], known: list[list[Scored]]) -> dict[int, npt.NDArray[np.float32]]:
        """Absolute gaps of every probe token, by engine; what the trainer says of each prompt's responses goes to `known`."""
        probe = self._probe
        drawn = self._fleet.generate_on(engines, probe.prompts, self._probe_sampling(), probe.seed, timeout_s=_TIMEOUT_S)
        if not drawn:
            return {}
        pairs = [
            (prompt.prompt_ids, sample.response_ids)
            for samples in drawn.values()
            for prompt, sample in zip(probe.prompts, samples, strict=True)
        ]
        expected = iter(self._trainer_log_probs(pairs))
        gaps: dict[int, npt.NDArray[np.float32]] = {}
        for engine, samples in drawn.items():
            scored = [(sample.response_ids, next(expected)) for sample in samples]
            gaps[engine] = np.concatenate(
                [_gap(s.log_probs, log_probs) for s, (_, log_probs) in zip(samples, scored, strict=True)]
            )
            for responses, one in zip(known, scored, strict=True):
                responses.append(one)
        return gaps

    def _refuse(self, gaps: dict[int, npt.NDArray[np.float32]], version: int) -> None:
        # Written so that a gap that is not a number is refused too.
        wrong = {engine: gap for engine, gap in gaps.items() if not gap.mean() <= self._max_gap}
        if wrong:
            figures = "; ".join(
                f"rollout-{engine} mean {gap.mean():.4f}, largest {gap.max():.4f} over {gap.size} tokens"
                for engine, gap in sorted(wrong.items())
            )
            raise WeightSyncMismatch(
                f"expected sampler and trainer log-probabilities of weight version {version} to differ by at most "
                f"{self._max_gap} on average, got {figures}, also after a second load; the engine would sample from another "
                "model than the one trained. Check that precision and temperature agree, then raise max_logprob_gap only if "
                "the gap is rounding"
            )


def _mismatch(known: list[list[Scored]], max_gap: float, groups: list[tuple[Sample, ...]]) -> str | None:
    """What is wrong with an engine that drew `groups` of the probe, judged without the trainer; None when nothing is.

    The same seeds and weights draw the same tokens but for rounding, and a token's log-probability depends only on those before
    it: so each response is compared up to where it leaves the known one that it follows longest.
    """
    gaps: list[npt.NDArray[np.float32]] = []
    tokens = 0
    for responses, (sample,) in zip(known, groups, strict=True):
        tokens += len(sample.response_ids)
        shared, log_probs_R = max(
            ((_shared(sample.response_ids, ids), scored_R) for ids, scored_R in responses), key=lambda p: p[0]
        )
        gaps.append(_gap(sample.log_probs[:shared], log_probs_R[:shared]))
    gap = np.concatenate(gaps)
    if gap.size < _LEAST_SHARED * tokens:
        return f"only {gap.size} of {tokens} probe tokens are those that the others drew with the same seeds"
    # Written so that a gap that is not a number is refused too.
    return (
        None if gap.mean() <= max_gap else f"mean gap {gap.mean():.4f} over {gap.size} probe tokens, at most {max_gap} expected"
    )


def _shared(ids: Sequence[int], known: Sequence[int]) -> int:
    """Number of tokens at the start that agree."""
    return next((i for i, (a, b) in enumerate(zip(ids, known, strict=False)) if a != b), min(len(ids), len(known)))


def _gap(sampler: Sequence[float], trainer_R: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """|sampler - trainer| for each token of one response."""
    gap_R: npt.NDArray[np.float32] = np.abs(np.asarray(sampler, dtype=np.float32) - trainer_R)
    return gap_R
