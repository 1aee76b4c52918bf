"""What an iteration's rollouts are: which prompts and seeds, sampled, scored and recorded, or read from a recording."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from sedsft.config import GRPOConfig, SamplingConfig
from sedsft.data.order import RefillOrder, RowOrder
from sedsft.grpo import collect
from sedsft.records import Prompt, RolloutGroup
from services.loops.engines import Engines
from services.loops.group_counts import GroupCounts, within
from services.loops.policy_update import varies
from services.loops.recording import Recording
from services.loops.timeline import ENGINES, SCORERS, Timeline
from services.rollout.feed import Ask
from services.rollout.fleet import prompt_seed
from services.run import Run

Phase = Callable[[str], None]


def sampling(config: GRPOConfig) -> SamplingConfig:
    """How rollouts are drawn: the whole distribution, since the loss is over it."""
    return SamplingConfig(temperature=config.temperature, max_tokens=config.max_tokens)


def iteration_seed(seed: int, iteration: int, refill: int = 0) -> int:
    """Seed of all samples of an iteration (from 1), so that groups lost on the way are drawn again as they were; those of a
    refill have their own.

    Hashed, since sums of seed and iteration would give two runs with neighbouring seeds the same samples.
    """
    name = f"rollout:{seed}:{iteration}" + (f":{refill}" if refill else "")
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


@dataclass
class Rounds:
    """Rollouts of a stage. The weights behind iteration n have the version `first_version` + n, in every attempt."""

    run: Run
    config: GRPOConfig
    engines: Engines
    prompts: Sequence[Prompt]
    recording: Recording
    first_version: int
    timeline: Timeline
    counts: GroupCounts

    @cached_property
    def order(self) -> RowOrder:
        """Rows of the iterations."""
        config = self.config
        return RowOrder(len(self.prompts), config.prompts_per_iteration, config.seed, steps=config.iterations)

    def version(self, iteration: int) -> int:
        """Version of the trainer's weights that the update of an iteration (from 1) begins with."""
        return self.first_version + iteration - 1

    def ask(self, iteration: int, place: int) -> Ask:
        """The prompt at a place of an iteration, without refills."""
        row = int(self.order.batch(iteration - 1)[place])
        return Ask(self.prompts[row], self.seed(iteration, place))

    def seed(self, iteration: int, place: int) -> int:
        """Seed of the first sample of the prompt at a place of an iteration, without refills."""
        return prompt_seed(iteration_seed(self.config.seed, iteration), place)

    def read(self, iteration: int, max_staleness: int) -> list[RolloutGroup] | None:
        """The recorded groups of an iteration; None where they have to be sampled.

        Raises:
            RecordingInvalid: the recording is that of other settings.
        """
        groups = self.recording.read(iteration)
        if groups is not None and not within(groups, self.version(iteration), max_staleness):
            self.run.event(
                "recording_broken",
                f"rollouts of iteration {iteration} were drawn with other weights than those before version "
                f"{self.version(iteration)}; they are drawn again",
                iteration=iteration,
            )
            return None
        return groups

    def draw(self, iteration: int, phase: Phase) -> list[RolloutGroup]:
        """Sample, score and record the groups of an iteration, refills included, with the weights that the engines hold.

        Any thread may call it; `phase` is told what it does.
        """
        config = self.config
        rows = RefillOrder(self.order, iteration - 1, config.max_refills or 0)

        def draw(refill: int, count: int) -> list[RolloutGroup]:
            if not (drawn := [self.prompts[index] for index in rows.draw(refill, count)]):
                return []
            self.counts.submitted += len(drawn)
            phase("rollout")
            with self.timeline.span("rollout", ENGINES):
                seed = iteration_seed(config.seed, iteration, refill)
                groups = self.engines.sample(drawn, config.group_size, sampling(config), seed)
            phase("reward")
            with self.timeline.span("score", SCORERS):
                return self.engines.score(groups, config.reward.max_error_share)

        teaches = partial(varies, config=config)
        collected = collect(draw, teaches, config.prompts_per_iteration, config.max_refills or 0)
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
        self.recording.write(iteration, collected.drawn)
        return collected.drawn
