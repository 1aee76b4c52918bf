"""The Ray actor around one vLLM engine. Importable without vLLM: the engine is loaded when the actor starts it."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sedsft.config import Precision, SamplingConfig
from sedsft.records import Sample
from services.errors import WeightSyncMismatch, WorkerDied
from services.jobspec import RolloutResources

if TYPE_CHECKING:
    from services.rollout.engine import Engine


@dataclass(frozen=True)
class RolloutSetup:
    """What an engine is built from."""

    model_path: str
    dtype: Precision
    resources: RolloutResources


@dataclass(frozen=True)
class GenerateRequest:
    """A chunk of prompts for one engine. Sample g of prompt i is drawn with the seed `seeds[i] + g`."""

    prompts: tuple[tuple[int, ...], ...]
    seeds: tuple[int, ...]
    group_size: int
    sampling: SamplingConfig
    version: int
    sample_timeout_s: float
    """Seconds after which samples that still run end as they are."""


class RolloutWorker:
    """Async actor: several `generate` calls run in the engine's batch at the same time; a weight load needs it idle."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._engine: Engine | None = None
        self._version: int | None = 0
        self._running = 0

    async def start(self, setup: RolloutSetup) -> int:
        """Build the engine at weight version 0; returns the longest prompt plus response it takes, in tokens.

        Raises:
            ModelError: vLLM does not take the model.
        """
        self._engine = importlib.import_module("services.rollout.engine").Engine(setup)
        return self._engine.max_model_len

    async def generate(self, request: GenerateRequest) -> list[tuple[Sample, ...]]:
        """`group_size` samples for each prompt, in order.

        Raises:
            WeightSyncMismatch: the engine is at another weight version than the one asked for.
            WorkerDied: the engine's process ended.
        """
        if request.version != self._version:
            raise WeightSyncMismatch(
                f"expected rollout-{self._index} to sample with weight version {request.version}, it "
                f"{'holds none' if self._version is None else f'is at {self._version}'}; load that version first"
            )
        self._running += 1
        try:
            return await self._started().generate(request)
        finally:
            self._running -= 1

    async def load_weights(self, folder: str, version: int) -> int:
        """Replace the weights by the safetensors in `folder`, the weights `version`; returns the version held then."""
        self._hold_none()
        self._version = await self._started().load_weights(folder, version)
        return self._version

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """Meet trainers that will send weights; `init_info` is that of vLLM's transfer engine."""
        await self._started().init_transfer(init_info)

    async def start_update(self) -> None:
        """Trainers begin to send. Until `held_version` has been asked behind the end, nothing is sampled."""
        self._hold_none()
        await self._started().start_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive what trainers send."""
        await self._started().update_weights(update_info)

    async def finish_update(self, version: int) -> None:
        """Trainers have sent all of `version`."""
        await self._started().finish_update(version)

    async def held_version(self) -> int:
        """Version of the weights that the engine's own processes say they hold; from here on it samples with it."""
        self._version = await self._started().held_version()
        return self._version

    def _hold_none(self) -> None:
        """Hold no version while weights change.

        Raises:
            RuntimeError: it samples just now.
        """
        if self._running:
            raise RuntimeError(
                f"expected an idle engine for a weight load, {self._running} calls are sampling; await them first"
            )
        self._version = None

    async def heartbeat(self) -> None:
        """Answer when the engine's own loop does, between two of its steps.

        Raises:
            WorkerDied: the engine's process ended.
        """
        await self._started().heartbeat()

    async def end(self) -> None:
        """Kill the engine's processes. One that is frozen would not notice that its actor ends."""
        for process in multiprocessing.active_children():
            process.kill()

    async def pid(self) -> int:
        """Process id of the actor."""
        return os.getpid()

    async def engine_pids(self) -> list[int]:
        """Process ids of the engine's own processes."""
        return self._started().pids()

    def _started(self) -> Engine:
        if self._engine is None:
            raise WorkerDied(f"expected rollout-{self._index} to have an engine, it has none; call start first")
        return self._engine
