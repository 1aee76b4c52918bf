"""Trainer to engines: export, load, and proof that every engine now computes what the trainer computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from sedsft.config import SamplingConfig
from sedsft.records import Prompt, Sample
from services.errors import PhaseTimeout, WeightSyncMismatch
from services.rollout.fleet import RolloutFleet
from services.rollout.keeper import Refit
from services.rollout.transport import Transport, WeightLoad

Pair = tuple[tuple[int, ...], tuple[int, ...]]
Scored = tuple[tuple[int, ...], npt.NDArray[np.float32]]
"""A response and the trainer's log-probability of each of its tokens."""
TrainerLogProbs = Callable[[list[Pair]], list[npt.NDArray[np.float32]]]
Gaps = dict[int, npt.NDArray[np.float32]]
"""|log p(sampler) - log p(trainer)| of every probe token, by engine."""

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
class EngineGap:
    """What the probe said of one engine, in nats."""

    engine: int
    mean: float
    largest: float


@dataclass(frozen=True)
class SyncReport:
    """One sync. Gaps are |log p(sampler) - log p(trainer)| over the probe's tokens, in nats."""

    version: int
    mean_gap: float
    max_gap: float
    engines: tuple[EngineGap, ...]
    """Every engine that serves now."""
    refitted: tuple[int, ...]
    """Engines that needed a second load."""
    stale: tuple[int, ...] = ()
    """Those of them that said after the first that they hold another version."""

    def figures(self) -> dict[str, float]:
        """All of it by name, for the metrics of a step."""
        overall = {"probe_gap_mean": self.mean_gap, "probe_gap_max": self.max_gap, "weight_version": float(self.version)}
        means = {f"probe_gap_mean_engine_{gap.engine}": gap.mean for gap in self.engines}
        largest = {f"probe_gap_max_engine_{gap.engine}": gap.largest for gap in self.engines}
        counts = {"engines_refitted": float(len(self.refitted)), "engines_stale": float(len(self.stale))}
        return overall | means | largest | counts


class WeightSync:
    """Pushes weights and refuses to go on with an engine that disagrees with the trainer.

    `trainer_log_probs(pairs)` gives, for each (prompt ids, response ids), the log-probability of each response token at the
    probe's temperature.
    """

    def __init__(
        self,
        fleet: RolloutFleet,
        transport: Transport,
        trainer_log_probs: TrainerLogProbs,
        probe: Probe,
        max_gap: float,
    ) -> None:
        self._fleet = fleet
        self._transport = transport
        self._trainer_log_probs = trainer_log_probs
        self._probe = probe
        self._max_gap = max_gap
        self._settings = fleet.sync_settings

    def push(self, version: int) -> SyncReport:
        """Bring every engine that lives to the trainer's weights and prove it; they serve when this returns.

        Engines that die on the way leave the sync and are mended by the fleet. Exported files are kept for them until the next
        sync; where weights are sent instead, they wait for it.

        Raises:
            WeightSyncMismatch: an engine holds another version, or its mean gap is above the bound, also after a second load.
            PhaseTimeout: a phase missed its deadline; the message begins with its name.
            NoneLeft: no engine is left.
        """
        with self._fleet.exclusive():
            with _phase("export", version):
                load = self._transport.export(version)
            try:
                report, known = self._load_and_probe(load)
            except BaseException:
                self._transport.discard(load)
                raise
            if load.folder is not None:
                request = self._fleet.probe_request(self._probe.prompts, self._probe_sampling(), self._probe.seed)
                self._fleet.keep(Refit(load, request, partial(_mismatch, known, self._max_gap)))
        return report

    def _load_and_probe(self, load: WeightLoad) -> tuple[SyncReport, list[list[Scored]]]:
        fleet, timeout_s = self._fleet, self._settings.load_timeout_s
        known: list[list[Scored]] = [[] for _ in self._probe.prompts]
        gaps: Gaps = {}
        refitted: list[int] = []
        stale: list[int] = []
        while not gaps:
            with _phase("load", load.version):
                held = fleet.load_weights(load, timeout_s=timeout_s)
            stale = [engine for engine, version in held.items() if version != load.version]
            gaps = self._measure([engine for engine in held if engine not in stale], known, load.version)
            refitted = sorted([*stale, *self._beyond(gaps)])
            for engine in refitted:
                fleet.judge(engine, agrees=False)
            with _phase("load", load.version):
                again = fleet.load_weights_on(refitted, load, timeout_s=timeout_s)
            _refuse_stale(again, load.version)
            gaps = {engine: gap for engine, gap in gaps.items() if engine not in refitted}
            gaps |= self._measure(list(again), known, load.version)
        self._refuse(gaps, load.version)
        for engine in gaps:
            fleet.judge(engine, agrees=True)
        joined = np.concatenate(list(gaps.values()))
        engines = tuple(EngineGap(engine, float(gap.mean()), float(gap.max())) for engine, gap in sorted(gaps.items()))
        report = SyncReport(load.version, float(joined.mean()), float(joined.max()), engines, tuple(refitted), tuple(stale))
        return report, known

    def _probe_sampling(self) -> SamplingConfig:
        short = min(_PROBE_MAX_TOKENS, self._probe.sampling.max_tokens)
        return self._probe.sampling.model_copy(update={"max_tokens": short})

    def _beyond(self, gaps: Gaps) -> list[int]:
        # Written so that a gap that is not a number is beyond too.
        return [engine for engine, gap in gaps.items() if not gap.mean() <= self._max_gap]

    def _measure(self, engines: list[int], known: list[list[Scored]], version: int) -> Gaps:
        """Gaps of those of `engines` that live; what the trainer says of each prompt's responses goes to `known`."""
        probe, timeout_s = self._probe, self._settings.probe_timeout_s
        drawn = self._fleet.generate_on(engines, probe.prompts, self._probe_sampling(), probe.seed, timeout_s=timeout_s)
        if not drawn:
            return {}
        pairs = [
            (prompt.prompt_ids, sample.response_ids)
            for samples in drawn.values()
            for prompt, sample in zip(probe.prompts, samples, strict=True)
        ]
        with _phase("probe", version):
            expected = iter(self._trainer_log_probs(pairs))
        gaps: Gaps = {}
        for engine, samples in drawn.items():
            scored = [(sample.response_ids, next(expected)) for sample in samples]
            gaps[engine] = np.concatenate(
                [_gap(s.log_probs, log_probs) for s, (_, log_probs) in zip(samples, scored, strict=True)]
            )
            for responses, one in zip(known, scored, strict=True):
                responses.append(one)
        return gaps

    def _refuse(self, gaps: Gaps, version: int) -> None:
        if wrong := self._beyond(gaps):
            figures = "; ".join(
                f"rollout-{engine} mean {gaps[engine].mean():.4f}, largest {gaps[engine].max():.4f} over "
                f"{gaps[engine].size} tokens"
                for engine in sorted(wrong)
            )
            raise WeightSyncMismatch(
                f"expected sampler and trainer log-probabilities of weight version {version} to differ by at most "
                f"{self._max_gap} on average, got {figures}, also after a second load; the engine would sample from another "
                "model than the one trained. Check that precision and temperature agree, then raise max_logprob_gap only if "
                "the gap is rounding"
            )


@contextmanager
def _phase(name: str, version: int) -> Iterator[None]:
    """Say in which phase of the sync a deadline was missed."""
    try:
        yield
    except PhaseTimeout as error:
        raise PhaseTimeout(
            f"phase {name} of the sync of weights {version}: {error.message}. Its limit is rollout.sync.{name}_timeout_s"
        ) from error


def _refuse_stale(held: Mapping[int, int], version: int) -> None:
    if stale := {engine: other for engine, other in sorted(held.items()) if other != version}:
        raise WeightSyncMismatch(
            f"expected engines to hold weight version {version} after two loads, got "
            f"{', '.join(f'rollout-{engine} at {other}' for engine, other in stale.items())}; look at their lines in the "
            "job's log"
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
