"""The driver's view of all rollout engines: start, stream prompts to them, load weights, come and go."""

from __future__ import annotations

import hashlib
import logging
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from sedsft.config import Precision, SamplingConfig
from sedsft.records import Prompt, Sample
from services.actor_group import ActorGroup, ActorSpec, tend_while_waiting
from services.errors import DataError, NoneLeft, PhaseTimeout, WeightSendFailed, WorkerDied
from services.jobspec import RolloutResources, SyncSettings
from services.rollout.dispatch import Dispatcher, Life, Load
from services.rollout.feed import Ask, Batch, Feed
from services.rollout.health import Event, HealthLimits, State
from services.rollout.keeper import EventSink, Keeper, Refit
from services.rollout.transport import WeightLoad
from services.rollout.worker import GenerateRequest, RolloutSetup, RolloutWorker

log = logging.getLogger("sedsft.rollout")

_FEED_S = 0.05
"""Longest wait until a feed is asked for more."""
_SPARE_CALLS = 16
"""Calls of an engine beside those that sample, heartbeats above all: they must not queue behind them."""


def rollout_spec(resources: RolloutResources) -> ActorSpec:
    """How the engines' actors are spawned. vLLM reads this environment while it is imported."""
    threads = str(max(1, int(resources.cpus_per_worker)))
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if resources.gpus_per_worker == 0:
        # One process less per engine, and no kernel compiled at the first sample: 2x faster start, 0.6 GB less memory.
        env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    return ActorSpec(
        role="rollout",
        worker=RolloutWorker,
        count=resources.workers,
        cpus=resources.cpus_per_worker,
        gpus=resources.gpus_per_worker,
        env=env,
        max_concurrency=_samples_held(resources) + _SPARE_CALLS,
        elastic=True,
    )


def _samples_held(resources: RolloutResources) -> int:
    """Samples that an engine is given at a time: those it decodes, and as many that wait for a place in its batch."""
    return 2 * resources.max_num_seqs


def health_limits(resources: RolloutResources) -> HealthLimits:
    """How long an engine may be silent, and how often it may come back."""
    owed_s = resources.heartbeat_timeout_s
    # Sending and then being asked are both part of a load, each with a deadline of its own; this one is for refits.
    sync_s = max(2 * resources.sync.load_timeout_s, resources.sync.probe_timeout_s)
    return HealthLimits(
        heartbeat_s=min(2.0, owed_s / 8),
        suspect_after_s=owed_s / 4,
        dead_after_s=owed_s,
        sync_timeout_s=sync_s,
        restarts=resources.restarts,
    )


def _logged(kind: str, message: str, /, **_: Any) -> None:
    log.info("%s: %s", kind, message)


def prompt_seed(seed: int, index: int) -> int:
    """Seed of a prompt's first sample, equal for every number of engines; sample g of the prompt gets this plus g."""
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2


def _asks(prompts: Sequence[Prompt], seed: int) -> list[Ask]:
    return [Ask(prompt, prompt_seed(seed, index)) for index, prompt in enumerate(prompts)]


class Halted(Exception):
    """Sampling was broken off by `RolloutFleet.halted`."""


class RolloutFleet:
    """All engines. Those that serve are at the same weight version, which a probe has shown; the others are mended meanwhile.

    Calls exclude each other, so a weight sync waits for a `generate` in another thread and the other way round. While no call
    runs, engines are mended whenever this process waits for another group's work.
    """

    def __init__(self, group: ActorGroup, resources: RolloutResources, event: EventSink = _logged) -> None:
        self._group = group
        self._resources = resources
        self._event = event
        self._keeper: Keeper | None = None
        self._lock = threading.RLock()
        self._halted = threading.Event()
        self._version = 0
        self._counts: Counter[str] = Counter()
        self._end_tending: Callable[[], None] | None = None

    @property
    def sync_settings(self) -> SyncSettings:
        """How weights are to come into the engines."""
        return self._resources.sync

    def __len__(self) -> int:
        return len(self._kept().engines()) if self._keeper else len(self._group)

    def start(self, model_path: str, dtype: Precision) -> None:
        """Begin to build every engine on the model folder; `ready` waits for them."""
        setup = RolloutSetup(model_path, dtype, self._resources)
        self._keeper = Keeper(self._group, setup, health_limits(self._resources), self._event)
        self._end_tending = tend_while_waiting(self._tend)

    def ready(self, *, timeout_s: float) -> None:
        """Wait until every engine is built, or died as often as it may. None serves before a weight sync.

        Raises:
            ModelError: vLLM does not take the model.
            NoneLeft: no engine is left.
            PhaseTimeout: not within `timeout_s` seconds.
        """
        keeper, deadline = self._kept(), time.monotonic() + timeout_s
        with self._lock:
            while late := [life for life in keeper.coming() if life not in keeper.lives(State.STALE, State.READY)]:
                if time.monotonic() > deadline:
                    raise PhaseTimeout(
                        f"expected {', '.join(map(str, late))} to be built within {timeout_s:.0f} s; look at their lines in "
                        "the job's log, or whether the cluster has room for them"
                    )
                keeper.pump(deadline - time.monotonic())
            if not keeper.lives(State.STALE, State.READY):
                raise _nobody_left(keeper)

    def states(self) -> dict[int, State]:
        """State of every engine, by index."""
        return self._kept().states()

    def counts(self) -> dict[str, int]:
        """Since the start: prompts `redispatched`, answers dropped as `late` or `wrong_version`, samples `timed_out`."""
        return {name: self._counts[name] for name in ("redispatched", "late", "wrong_version", "timed_out")}

    def resize(self, workers: int) -> None:
        """Have so many engines. Any thread may call it, also while others sample: a removed engine's prompts go to others, a
        new one serves once it has been built and holds the current weights; nobody waits for it. The event `engine_refused`
        says when the cluster does not hold one more.
        """
        self.want(workers)
        self._tend()

    def want(self, workers: int) -> None:
        """The same, done by the next thread that samples or waits; for callers who must not be told of deaths."""
        if workers < 1:
            raise ValueError(f"expected at least 1 rollout worker, got {workers}; end the job to stop all")
        self._kept().resize(workers)

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingConfig, seed: int, *, timeout_s: float
    ) -> list[tuple[Sample, ...]]:
        """`group_size` samples for each prompt, in the prompts' order, each drawn with the current weights.

        Prompts go one by one to the engine with the fewest samples; those of an engine that is lost go to another, once. Same
        prompts, `seed` and weights give the same seeds whatever the number of engines; tokens can still differ where rounding
        depends on the batch.

        Raises:
            DataError: a prompt leaves too little room for the response.
            NoneLeft: no engine is left.
            WorkerDied: a prompt lost two engines, or a member of another group died.
            PhaseTimeout: not one group was finished for `timeout_s` seconds.
        """
        batch = Batch(_asks(prompts, seed))
        self.stream(batch, group_size, sampling, timeout_s=timeout_s)
        return batch.groups()

    def stream(self, feed: Feed, group_size: int, sampling: SamplingConfig, *, timeout_s: float) -> None:
        """`generate` for prompts that come and groups that go one by one, until the feed has ended and all it gave is answered.

        Raises:
            Halted: by `halted` in another thread.
            JobError: as `generate` does.
        """
        keeper, asks, deadline = self._kept(), list[Ask](), time.monotonic() + timeout_s
        with self._lock:
            load = Load(0, group_size, self._version, _samples_held(self._resources))
            work: Dispatcher[Sample] = Dispatcher(load)

            def answered(life: Life, index: int, groups: list[tuple[Sample, ...]]) -> None:
                nonlocal deadline
                if self._answered(work, life, index, groups):
                    feed.put(asks[index], groups[0])
                    deadline = time.monotonic() + timeout_s

            with keeper.losses_to(lambda life, blame: self._counts.update(redispatched=work.lost(life, blame=blame))):
                deadline = time.monotonic() + timeout_s
                while True:
                    # Asked before `take`: what comes in between is taken in the next round.
                    ended = feed.ended
                    if not (taken := feed.take()) and work.done:
                        if ended:
                            break
                        deadline = time.monotonic() + timeout_s
                    self._check_lengths([ask.prompt for ask in taken], sampling.max_tokens)
                    asks += taken
                    work.add(len(taken))
                    for life, index in work.assign(keeper.lives(State.READY)):
                        request = self._request([asks[index]], group_size, sampling)
                        keeper.call(life, "generate", request, done=partial(answered, life, index), late_too=True)
                    left_s = max(0.0, deadline - time.monotonic())
                    keeper.pump(left_s if ended else min(_FEED_S, left_s))
                    self._check_progress(work, load, deadline, timeout_s)
        self._tell_cut(work)

    @contextmanager
    def halted(self) -> Iterator[None]:
        """Calls in other threads that sample end with `Halted` within about a second, whatever is under way."""
        self._halted.set()
        try:
            yield
        finally:
            self._halted.clear()

    def _request(self, asks: Sequence[Ask], group_size: int, sampling: SamplingConfig) -> GenerateRequest:
        return GenerateRequest(
            prompts=tuple(ask.prompt.prompt_ids for ask in asks),
            seeds=tuple(ask.seed for ask in asks),
            group_size=group_size,
            sampling=sampling,
            version=self._version,
            sample_timeout_s=self._resources.sample_timeout_s,
        )

    def _answered(self, work: Dispatcher[Sample], life: Life, index: int, groups: list[tuple[Sample, ...]]) -> bool:
        """Whether the answer counts."""
        verdict = work.answer(life, index, groups[0])
        if verdict != "taken":
            self._counts[verdict] += 1
        if verdict == "wrong_version":
            self._kept().lose(life, f"answered with other weights than version {self._version}")
        return verdict == "taken"

    def _check_progress(self, work: Dispatcher[Sample], load: Load, deadline: float, timeout_s: float) -> None:
        keeper = self._kept()
        if self._halted.is_set():
            raise Halted
        if work.done:
            return
        if not keeper.lives(State.READY) and not keeper.coming():
            if stale := keeper.lives(State.STALE):
                raise WorkerDied(
                    f"expected an engine that serves, no engine holds verified weights: {', '.join(map(str, stale))} wait for "
                    "the next sync. With rollout.sync.transport 'files' engines that come late get theirs in between"
                )
            raise _nobody_left(keeper)
        if time.monotonic() > deadline:
            late = ", ".join(f"{life} still samples {count}" for life, count in sorted(work.running().items()))
            raise PhaseTimeout(
                f"expected {work.missing} prompts x {load.group_size} samples within {timeout_s:.0f} s, {late or 'none serves'}"
                "; add rollout workers, lower max_tokens or prompts_per_iteration"
            )

    def _tell_cut(self, work: Dispatcher[Sample]) -> None:
        """Count and report the samples that ended at their wall time."""
        cut = sum(sample.timed_out for samples in work.results() for sample in samples)
        if cut:
            self._counts["timed_out"] += cut
            limit_s = self._resources.sample_timeout_s
            self._event(
                "samples_timed_out", f"{cut} samples ran longer than {limit_s:g} s and end where they were", samples=cut
            )

    # ------------------------------------------------------------------------------------------- weight sync

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Nobody else samples and no engine is refitted inside the block: for a weight sync from export to verdict. The weights
        kept for refits are gone from here on.
        """
        keeper = self._kept()
        with self._lock:
            keeper.held = True
            try:
                keeper.confirm()
                self._forget()
                yield
            finally:
                keeper.drop_unjudged()
                keeper.held = False

    def load_weights(self, load: WeightLoad, *, timeout_s: float) -> dict[int, int]:
        """Load weights into every engine that lives; inside `exclusive`. Returns the version that each holds which did it in
        time, at least one; `judge` lets them serve.

        Raises:
            NoneLeft: no engine is left.
            PhaseTimeout: the trainers did not send them in time.
        """
        keeper = self._kept()
        self._version = load.version
        while True:
            held = self._load(keeper.lives(State.STALE, State.READY), load, timeout_s)
            if held:
                return held
            if not keeper.coming():
                raise _nobody_left(keeper)
            keeper.pump(timeout_s)

    def load_weights_on(self, engines: Sequence[int], load: WeightLoad, *, timeout_s: float) -> dict[int, int]:
        """The same for some engines; empty when all of them are gone."""
        lives = [life for life in self._kept().lives(State.STALE, State.READY) if life.engine in engines]
        return self._load(lives, load, timeout_s)

    def _load(self, lives: list[Life], load: WeightLoad, timeout_s: float) -> dict[int, int]:
        keeper = self._kept()
        for life in lives:
            keeper.begin_load(life)
        if lives and load.send is not None:
            try:
                load.send([keeper.target(life) for life in lives])
            except WeightSendFailed as error:
                # Whatever the others hold now is unknown too, and one that still receives would not hear of the end.
                for life in lives:
                    keeper.lose(life, error.message, Event.SYNC_FAILED)
                return {}
        held: dict[Life, int] = {}
        for life in lives:
            keeper.load(life, load, partial(held.__setitem__, life))
        deadline = time.monotonic() + timeout_s
        while missing := [life for life in lives if life not in held and keeper.alive(life)]:
            keeper.pump(max(0.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                for life in missing:
                    cause = f"phase load: weights {load.version} were not there within {timeout_s:g} s"
                    keeper.lose(life, cause, Event.SYNC_FAILED)
        return {life.engine: held[life] for life in lives if keeper.alive(life)}

    def generate_on(
        self, engines: Sequence[int], prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int, *, timeout_s: float
    ) -> dict[int, list[Sample]]:
        """One sample for each prompt from each of `engines`, which all get the same seeds; without those lost meanwhile."""
        self._check_lengths(prompts, sampling.max_tokens)
        keeper, deadline = self._kept(), time.monotonic() + timeout_s
        request = self.probe_request(prompts, sampling, seed)
        drawn: dict[int, list[Sample]] = {}

        def answered(engine: int, groups: list[tuple[Sample, ...]]) -> None:
            drawn[engine] = [samples[0] for samples in groups]

        lives = [life for life in keeper.lives(State.SYNCING, State.READY) if life.engine in engines]
        for life in lives:
            keeper.call(life, "generate", request, done=partial(answered, life.engine))
        while missing := [life for life in lives if life.engine not in drawn and keeper.alive(life)]:
            keeper.pump(max(0.0, deadline - time.monotonic()))
            if time.monotonic() > deadline:
                for life in missing:
                    keeper.lose(life, f"phase probe: it was not sampled within {timeout_s:g} s")
        return {engine: samples for engine, samples in drawn.items() if keeper.states().get(engine) is State.SYNCING}

    def probe_request(self, prompts: Sequence[Prompt], sampling: SamplingConfig, seed: int) -> GenerateRequest:
        """The request that `generate_on` makes."""
        return self._request(_asks(prompts, seed), 1, sampling)

    def judge(self, engine: int, *, agrees: bool) -> None:
        """Say how the probe of an engine with loaded weights went: it serves, or waits for another load, unless it has died."""
        for life in self._kept().lives(State.SYNCING):
            if life.engine == engine:
                self._kept().judge(life, agrees=agrees)

    def keep(self, refit: Refit) -> None:
        """How engines that come late are brought to the current weights, from a folder that the fleet removes in its time."""
        self._kept().refit = refit

    def close(self) -> None:
        """Mend no more and remove the kept weights; the engines' processes end with their group."""
        if self._end_tending is not None:
            self._end_tending()
            self._end_tending = None
        self._forget()

    # -------------------------------------------------------------------------------------------------- below

    def _forget(self) -> None:
        keeper = self._keeper
        if keeper is not None and keeper.refit is not None:
            assert keeper.refit.load.folder is not None
            shutil.rmtree(keeper.refit.load.folder, ignore_errors=True)
            keeper.refit = None

    def _tend(self) -> None:
        """Mend engines without waiting, unless a call is running: that one does."""
        if self._keeper is not None and self._lock.acquire(blocking=False):
            try:
                if not self._keeper.held:
                    self._keeper.pump(0.0)
            finally:
                self._lock.release()

    def _kept(self) -> Keeper:
        if self._keeper is None:
            raise RuntimeError("expected the engines to have been started; call start first")
        return self._keeper

    def _check_lengths(self, prompts: Sequence[Prompt], max_tokens: int) -> None:
        longest = self._kept().max_model_len
        room = longest - max_tokens
        long = [f"line {p.line}: {len(p.prompt_ids)} tokens" for p in prompts if len(p.prompt_ids) > room]
        if long:
            raise DataError(
                f"expected prompts of at most {room} tokens (model length {longest} less max_tokens {max_tokens}), "
                f"got {len(long)} longer: {'; '.join(long[:5])}. Lower max_tokens, drop the rows or raise rollout.max_model_len"
            )


def _nobody_left(keeper: Keeper) -> NoneLeft:
    return NoneLeft(
        f"expected an engine that serves, none does and none can come back: {keeper.causes()}. Look at the engines' lines in "
        "the job's log, then raise rollout.restarts only if the cause is gone"
    )
