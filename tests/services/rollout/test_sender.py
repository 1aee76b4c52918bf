"""The trainers' end of a transfer: vLLM's handshake and real gloo broadcasts, with stand-ins for the engines behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer import VLLMWeightSyncClient
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine

from services.buckets import TensorSpec
from services.errors import WeightSendFailed
from services.rollout import sender as sender_module
from services.rollout.gloo_transfer import GlooReceiver
from services.rollout.sender import EngineClient, Sender, StreamSource, trainer_init
from services.rollout.transport import SenderSetup, Target

# Importing vLLM.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SETUP = SenderSetup("gloo", bucket_bytes=64, timeout_s=10)


class Weights:
    """A `WeightStream` of odd sizes: a part of a bucket may begin anywhere. `scale` is the training."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.yielded: list[str] = []

    def tensors(self) -> dict[str, torch.Tensor]:
        half, single = torch.arange(1, 4).bfloat16(), torch.arange(30.0).view(5, 6)
        return {
            name: tensor * self.scale
            for name, tensor in {"a": half, "b": single, "c": single[0, :3], "d": half[:1], "e": single.T}.items()
        }

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape), t.itemsize)
            for name, t in self.tensors().items()
        ]

    def stream(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.tensors().items():
            self.yielded.append(name)
            yield name, tensor


class Engine(GlooReceiver):
    """The receiving end of an engine whose model is a dictionary."""

    def __init__(self, fails_at: str | None = None) -> None:
        self.parallel_config = SimpleNamespace(rank=0)
        self.model = SimpleNamespace(load_weights=self.load)
        self.held: dict[str, torch.Tensor] = {}
        self.buckets: list[list[str]] = []
        self.fails_at = fails_at
        self.version: int | None = 0
        self.met = 0

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        bucket = dict(weights)
        if self.fails_at in bucket:
            self.shutdown()
            raise ValueError("no room")
        self.buckets.append(list(bucket))
        self.held |= bucket

    def init_transfer(self, info: dict[str, Any]) -> None:
        self.met += 1
        self.init_transfer_engine(self.parse_init_info(info))

    def start_update(self) -> None:
        self.version, self.held, self.buckets = None, {}, []

    def finish_update(self, version: int) -> None:
        self.version = version


class LocalClient(EngineClient):
    """Calls engines of this process, all at once, as actors would be."""

    def _ask(self, method: str, args: Callable[[int], tuple[Any, ...]]) -> None:
        with ThreadPoolExecutor(max_workers=8) as threads:
            answers = [threads.submit(getattr(t.actor, method), *args(i)) for i, t in enumerate(self._targets)]
        failed = [str(answer.exception()) for answer in answers if answer.exception() is not None]
        if failed:
            raise WeightSendFailed(f"{method}: {failed[0]}")


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "EngineClient", LocalClient)
    monkeypatch.setattr(sender_module.ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def targets(*engines: Engine) -> tuple[Target, ...]:
    return tuple(Target(f"rollout-{index}", engine, 1) for index, engine in enumerate(engines))


def assert_holds(engine: Engine, weights: Weights, version: int) -> None:
    expected = weights.tensors()
    assert engine.version == version
    assert list(engine.held) == list(expected)
    for name, tensor in expected.items():
        assert engine.held[name].dtype == tensor.dtype
        assert torch.equal(engine.held[name], tensor)


def test_every_engine_gets_every_tensor_and_is_met_once() -> None:
    weights, engines = Weights(), [Engine(), Engine(), Engine()]
    sender = SETUP.open(0, weights)
    assert isinstance(sender, Sender)
    for version in (1, 2):
        weights.scale = float(version)
        sender.send(targets(*engines), version)
        for engine in engines:
            assert_holds(engine, weights, version)
            # 6, 120, 12 + 2 and 120 bytes in buckets of 64.
            assert engine.buckets == [["a"], ["b"], ["c", "d"], ["e"]]
            assert engine.met == 1
    # Others to send to, one of them known: all are met anew.
    newcomer = Engine()
    sender.send(targets(engines[0], newcomer), 3)
    assert_holds(engines[0], weights, 3)
    assert_holds(newcomer, weights, 3)
    assert (engines[0].met, engines[1].version) == (2, 2)


def test_an_engine_that_fails_ends_the_sending_but_not_the_gathering() -> None:
    weights, bad = Weights(), Engine(fails_at="c")
    sender = Sender(SETUP, weights)
    with pytest.raises(WeightSendFailed, match=r"expected rollout-0, rollout-1 to receive weights 1 over gloo, got "):
        sender.send(targets(Engine(), bad), 1)
    assert weights.yielded == list(weights.tensors())
    assert bad.version is None
    fresh = Engine()
    sender.send(targets(fresh), 2)
    assert_holds(fresh, weights, 2)


def test_ranks_that_do_not_send_go_through_the_source() -> None:
    weights = Weights()
    SETUP.open(1, weights).send((), 1)
    assert weights.yielded == list(weights.tensors())


def test_engines_get_ranks_one_after_the_other() -> None:
    asked: list[tuple[str, int]] = []

    class Ranks(EngineClient):
        def _ask(self, method: str, args: Callable[[int], tuple[Any, ...]]) -> None:
            asked.extend((method, args(index)[0]["rank_offset"]) for index in range(3))

    sized = [Target(f"rollout-{index}", None, ranks) for index, ranks in enumerate((2, 4, 1))]
    client: VLLMWeightSyncClient = Ranks(sized)
    client.init_weight_transfer_engine({"rank_offset": 1})
    assert asked == [("init_transfer", 1), ("init_transfer", 3), ("init_transfer", 7)]


def test_nccl_is_opened_with_what_vllm_takes() -> None:
    init = trainer_init(SenderSetup("nccl", bucket_bytes=1 << 20, timeout_s=5), world_size=5)
    assert isinstance(init, NCCLTrainerInitInfo)
    assert (init.backend, init.is_sender, init.world_size, init.packed_buffer_size_bytes) == ("nccl", True, 5, 1 << 20)
    # What the engine's worker will be told, as vLLM builds it.
    told = {"master_address": init.master_address, "master_port": init.master_port, "rank_offset": 3, "world_size": 5}
    info = NCCLWeightTransferEngine.init_info_cls(**told, packed=True, packed_buffer_size_bytes=1 << 20, packed_num_buffers=2)
    assert info.rank_offset == 3


def test_what_is_announced_is_what_comes() -> None:
    source = StreamSource(Weights())
    source.renew()
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [(n, t.dtype, tuple(t.shape)) for n, t in source]
