"""The trainers' end of a transfer to engines, through vLLM's weight-transfer engines. Loads vLLM."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from vllm.distributed.weight_transfer import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import TrainerInitInfo, WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from services.buckets import WeightStream
from services.errors import WeightSendFailed
from services.jobspec import Backend
from services.rollout.gloo_transfer import GlooTrainerInit
from services.rollout.transport import SenderSetup, Target


class StreamSource(WeightSource):  # type: ignore[misc]
    """A `WeightStream` as vLLM's engines read one. `renew` before each update."""

    def __init__(self, weights: WeightStream) -> None:
        self._weights = weights
        self._left: Iterator[tuple[str, torch.Tensor]] = iter(())
        self._metas = [ParamMeta(spec.name, getattr(torch, spec.dtype), spec.shape) for spec in weights.specs()]

    def metadata(self) -> list[ParamMeta]:
        """What iteration will yield."""
        return self._metas

    def renew(self) -> None:
        """Begin a pass over the weights of now."""
        self._left = self._weights.stream()

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._left

    def drain(self) -> None:
        """Go through what is left of the pass: the other ranks gather with this one and would wait forever."""
        for _ in self._left:
            pass


class EngineClient:
    """vLLM's calls, made to engines that know nothing of each other."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self.version = 0
        """Of the weights that are sent next."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every engine join; their processes get ranks one after the other, where vLLM counts on a single engine."""
        first = init_info["rank_offset"]
        infos = []
        for target in self._targets:
            infos.append(init_info | {"rank_offset": first})
            first += target.ranks
        self._ask("init_transfer", lambda index: (infos[index],))

    def start_weight_update(self) -> None:
        """From here on the engines hold no version."""
        self._ask("start_update", lambda _: ())

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        """Receive and load what this end sends meanwhile."""
        self._ask("update_weights", lambda _: (update_info,))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """From here on the engines hold the version."""
        self._ask("finish_update", lambda _: (self.version,))

    def _ask(self, method: str, args: Callable[[int], tuple[Any, ...]]) -> None:
        refs = [getattr(target.actor, method).remote(*args(index)) for index, target in enumerate(self._targets)]
        failed = []
        for target, ref in zip(self._targets, refs, strict=True):
            try:
                ray.get(ref)
            except RayError as error:
                failed.append(f"{target.name}: {str(error).strip().splitlines()[-1]}")
        if failed:
            raise WeightSendFailed(f"expected engines to answer {method}, {len(failed)} did not: {'; '.join(failed)}")


class Sender:
    """The end on the rank that sends, connected to the engines of the last transfer."""

    def __init__(self, setup: SenderSetup, weights: WeightStream) -> None:
        self._setup = setup
        self._source = StreamSource(weights)
        self._targets: tuple[Target, ...] = ()
        self._client = EngineClient(())
        self._engine: TrainerWeightTransferEngine[Any] | None = None

    def send(self, targets: tuple[Target, ...], version: int) -> None:
        """Send the weights of now to `targets`, which are met first unless they are those of the last time. Collective.

        Raises:
            WeightSendFailed: an engine or the connection failed. Nothing is known of what any of `targets` holds.
        """
        self._source.renew()
        try:
            engine = self._connected(targets)
            self._client.version = version
            if torch.cuda.is_available():
                # vLLM sends from streams of its own, which do not wait for what training does on the default one.
                torch.cuda.synchronize()
            engine.send_weights()
        except (RuntimeError, WeightSendFailed) as error:
            self._disconnect()
            self._source.drain()
            raise WeightSendFailed(
                f"expected {', '.join(target.name for target in targets)} to receive weights {version} over "
                f"{self._setup.backend}, got {type(error).__name__}: {error}"
            ) from error

    def _connected(self, targets: tuple[Target, ...]) -> TrainerWeightTransferEngine[Any]:
        if self._engine is None or targets != self._targets:
            self._disconnect()
            self._client = EngineClient(targets)
            init = trainer_init(self._setup, 1 + sum(target.ranks for target in targets))
            self._engine = WeightTransferTrainerFactory.trainer_init(init, client=self._client, source=self._source)
            self._targets = targets
        return self._engine

    def _disconnect(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None


def trainer_init(setup: SenderSetup, world_size: int) -> TrainerInitInfo:
    """What vLLM's engine of the backend is opened with: this process is rank 0 and met on its own node."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    openers: dict[Backend, Callable[[], TrainerInitInfo]] = {
        "gloo": lambda: GlooTrainerInit(
            address=address, world_size=world_size, bucket_bytes=setup.bucket_bytes, timeout_s=setup.timeout_s, rank=0
        ),
        "nccl": lambda: NCCLTrainerInitInfo(
            master_address=address,
            master_port=_free_port(address),
            world_size=world_size,
            packed=True,
            packed_buffer_size_bytes=setup.bucket_bytes,
            rank=0,
        ),
    }
    return openers[setup.backend]()


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
