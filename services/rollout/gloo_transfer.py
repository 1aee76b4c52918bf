"""A weight-transfer engine of vLLM's for CPUs, where its own, NCCL and CUDA IPC, do not run: broadcasts over gloo.

It keeps to the interface and to the order of calls of vLLM's NCCL engine, so what drives the one drives the other. Importing
this module registers both ends under the name `gloo`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch._C._distributed_c10d import ProcessGroupGloo, TCPStore
from vllm.distributed.weight_transfer import (
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from services.buckets import fill_buckets

BACKEND = "gloo"


@dataclass
class GlooInit(WeightTransferInitInfo):  # type: ignore[misc]
    """Where an engine's ranks meet the trainer, which is rank 0."""

    address: str
    port: int
    rank_offset: int
    """Rank of the engine's first process."""
    world_size: int
    bucket_bytes: int
    timeout_s: float


@dataclass
class GlooUpdate(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What will be broadcast, in order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInit(TrainerInitInfo):  # type: ignore[misc]
    """The trainer's end, and the address where it is met."""

    backend: ClassVar[str] = BACKEND

    address: str
    world_size: int
    bucket_bytes: int
    timeout_s: float


class _Group:
    """Processes that rank 0 broadcasts to. A peer that is gone ends a broadcast with an error; so does the time limit."""

    def __init__(self, store: TCPStore, rank: int, world_size: int, timeout_s: float) -> None:
        self._group = ProcessGroupGloo(store, rank, world_size, timedelta(seconds=timeout_s))

    def broadcast(self, bytes_N: torch.Tensor) -> None:
        """Fill `bytes_N` with rank 0's."""
        self._group.broadcast(bytes_N, 0).wait()  # type: ignore[attr-defined]


def _num_bytes(shapes: Sequence[Sequence[int]], dtypes: Sequence[torch.dtype]) -> list[int]:
    return [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]


class GlooReceiver(WeightTransferEngine[GlooInit, GlooUpdate]):  # type: ignore[misc]
    """The end in a vLLM worker: whole tensors in, which the model's own loader splits and names."""

    init_info_cls = GlooInit
    update_info_cls = GlooUpdate

    _group: _Group | None = None
    _bucket_bytes = 0

    def init_transfer_engine(self, init_info: GlooInit) -> None:
        """Meet the others."""
        timeout = timedelta(seconds=init_info.timeout_s)
        store = TCPStore(init_info.address, init_info.port, is_master=False, timeout=timeout)
        rank = init_info.rank_offset + self.parallel_config.rank
        self._group = _Group(store, rank, init_info.world_size, init_info.timeout_s)
        self._bucket_bytes = init_info.bucket_bytes

    def start_weight_update(self) -> None:
        """Let layers take weights in the format of files again."""
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Bring layers back into the format that they compute in."""
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load; on CPU there is no device to wait for."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdate) -> None:
        """Load bucket after bucket. Each has memory of its own, since layers keep their parts until all of them are there."""
        if self._group is None:
            raise RuntimeError("expected init_transfer_engine before an update")
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = _num_bytes(update_info.shapes, dtypes)
        for bucket in fill_buckets(sizes, self._bucket_bytes):
            bytes_N = torch.empty(sum(sizes[index] for index in bucket), dtype=torch.uint8)
            self._group.broadcast(bytes_N)
            parts = torch.split(bytes_N, [sizes[index] for index in bucket])
            # A part may begin where its dtype may not: a copy is aligned.
            self.model.load_weights(
                (update_info.names[index], part.clone().view(dtypes[index]).view(update_info.shapes[index]))
                for index, part in zip(bucket, parts, strict=True)
            )

    def shutdown(self) -> None:
        """Leave the others."""
        self._group = None


class GlooSender(TrainerWeightTransferEngine[GlooTrainerInit]):  # type: ignore[misc]
    """The end in the trainer rank that sends."""

    init_info_cls = GlooTrainerInit

    source: WeightSource

    def __init__(self, init_info: GlooTrainerInit, client: VLLMWeightSyncClient, source: WeightSource) -> None:
        super().__init__(client=client, source=source)
        self._init = init_info
        self._group: _Group | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInit, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Meet the engines."""
        if source is None:
            raise ValueError("expected a source of weights, got None")
        sender = cls(init_info, client, source)
        sender._meet()
        return sender

    def _meet(self) -> None:
        init, timeout = self._init, timedelta(seconds=self._init.timeout_s)
        store = TCPStore(init.address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        theirs = GlooInit(init.address, store.port, 1, init.world_size, init.bucket_bytes, init.timeout_s)
        # The engines answer when all have met, this rank included.
        with ThreadPoolExecutor(max_workers=1) as other:
            answered = other.submit(self.client.init_weight_transfer_engine, asdict(theirs))
            self._group = _Group(store, 0, init.world_size, init.timeout_s)
            answered.result()

    def send_weights(self) -> None:
        """One update, from its start to its end."""
        assert self._group is not None
        metas = self.source.metadata()
        update = GlooUpdate(
            [meta.name for meta in metas],
            [str(meta.dtype).removeprefix("torch.") for meta in metas],
            [list(meta.shape) for meta in metas],
        )
        self.client.start_weight_update()
        # The engines answer when all is received. After a failure here nobody waits for them: they may never answer.
        other = ThreadPoolExecutor(max_workers=1)
        try:
            answered = other.submit(self.client.update_weights, asdict(update))
            weights = iter(self.source)
            for bucket in fill_buckets(_num_bytes(update.shapes, [meta.dtype for meta in metas]), self._init.bucket_bytes):
                parts = [next(weights)[1].contiguous().view(-1).view(torch.uint8) for _ in bucket]
                self._group.broadcast(torch.cat(parts))
            # To the end of the source, which gives back there what it gathered.
            if left := [name for name, _ in weights]:
                raise RuntimeError(f"expected the weights that were announced, got more: {', '.join(left[:5])}")
            answered.result()
        finally:
            other.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Leave the engines; those that still receive get an error."""
        self._group = None


WeightTransferEngineFactory.register_engine(BACKEND, GlooReceiver)
WeightTransferTrainerFactory.register_engine(BACKEND, GlooSender)
