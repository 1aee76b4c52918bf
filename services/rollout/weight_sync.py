"""Trainer to engines: export, load, and proof that every engine now computes what the trainer computes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sedsft.config import SamplingConfig
from sedsft.records import Prompt
from services.errors import WeightSyncMismatch
from services.rollout.fleet import RolloutFleet

Pair = tuple[tuple[int, ...], tuple[int, ...]]
TrainerLogProbs = Callable[[list[Pair]], list[npt.NDArray[np.float32]]]

_TIMEOUT_S = 600.0
_PROBE_MAX_TOKENS = 16


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
        """Bring every engine to the trainer's weights and prove it. The exported files are gone when this returns.

        Raises:
            WeightSyncMismatch: an engine's mean gap stays above the bound after a second load.
        """
        folder = self._folder / f"weights-{version}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            self._export(folder)
            self._fleet.load_weights(str(folder), version, timeout_s=_TIMEOUT_S)
            engines = list(range(len(self._fleet)))
            gaps = self._measure(engines)
            refitted = [e for e in engines if not gaps[e].mean() <= self._max_gap]
            if refitted:
                for engine in refitted:
                    self._fleet.load_weights_on(engine, str(folder), version, timeout_s=_TIMEOUT_S)
                gaps |= self._measure(refitted)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        self._refuse(gaps, version)
        joined = np.concatenate([gaps[e] for e in engines])
        return SyncReport(
            version=version,
            mean_gap=float(joined.mean()),
            max_gap=float(joined.max()),
            engine_mean_gaps=tuple(float(gaps[e].mean()) for e in engines),
            refitted=tuple(refitted),
        )

    def _measure(self, engines: list[int]) -> dict[int, npt.NDArray[np.float32]]:
        """Absolute gaps of every probe token, by engine."""
        probe = self._probe
        short = probe.sampling.model_copy(update={"max_tokens": min(_PROBE_MAX_TOKENS, probe.sampling.max_tokens)})
        drawn = self._fleet.generate_on(engines, probe.prompts, short, probe.seed, timeout_s=_TIMEOUT_S)
        pairs = [
            (prompt.prompt_ids, sample.response_ids)
            for samples in drawn
            for prompt, sample in zip(probe.prompts, samples, strict=True)
        ]
        expected = iter(self._trainer_log_probs(pairs))
        return {
            engine: np.concatenate([_gap(sample.log_probs, next(expected)) for sample in samples])
            for engine, samples in zip(engines, drawn, strict=True)
        }

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


def _gap(sampler: Sequence[float], trainer_R: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """|sampler - trainer| for each token of one response."""
    gap_R: npt.NDArray[np.float32] = np.abs(np.asarray(sampler, dtype=np.float32) - trainer_R)
    return gap_R
