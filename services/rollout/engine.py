"""One vLLM `AsyncLLM`: token ids in, token ids and log-probabilities out, weights replaced in place.

The actor's environment is set by `services.rollout.fleet.rollout_spec`, since vLLM reads it while it is imported.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import vllm.outputs
from vllm import AsyncEngineArgs, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from sedsft.records import Sample
from services.errors import ModelError, WeightSyncMismatch, WorkerDied
from services.rollout.worker import GenerateRequest, RolloutSetup
from services.rollout.worker_extension import OWNER_PID_VARIABLE

_MIN_BATCHED_TOKENS = 8192

ResultT = TypeVar("ResultT")


def _engine_args(setup: RolloutSetup) -> AsyncEngineArgs:
    """Engine arguments of a setup.

    Log-probabilities are "processed": those of the distribution that tokens are drawn from, after temperature and top-p.
    On CPU prompts are not split over steps: vLLM then rewinds the generator of a seeded request, which CPU generators refuse.
    """
    resources = setup.resources
    on_cpu = resources.gpus_per_worker == 0
    backend = resources.transfer_backend
    model = json.loads((Path(setup.model_path) / "config.json").read_text(encoding="utf-8"))
    max_model_len = min(resources.max_model_len, model.get("max_position_embeddings", resources.max_model_len))
    return AsyncEngineArgs(
        model=setup.model_path,
        dtype="bfloat16" if setup.dtype == "bf16" else "float32",
        max_model_len=max_model_len,
        max_num_seqs=resources.max_num_seqs,
        max_num_batched_tokens=max(_MIN_BATCHED_TOKENS, max_model_len, resources.max_num_seqs),
        enable_chunked_prefill=not on_cpu,
        tensor_parallel_size=resources.tensor_parallel,
        gpu_memory_utilization=resources.gpu_memory_utilization,
        kv_cache_memory_bytes=resources.cpu_kv_cache_gb << 30 if on_cpu else None,
        enforce_eager=on_cpu,
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        disable_log_stats=True,
        worker_extension_cls="services.rollout.worker_extension.WorkerExtension",
        weight_transfer_config=None if backend is None else WeightTransferConfig(backend=backend),
    )


class Engine:
    """An engine with its processes. Build and use it on one event loop."""

    def __init__(self, setup: RolloutSetup) -> None:
        os.environ[OWNER_PID_VARIABLE] = str(os.getpid())
        try:
            args = _engine_args(setup)
            self._llm = AsyncLLM.from_engine_args(args)
        except (OSError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"expected vLLM to start on {setup.model_path}, got {type(error).__name__}: {error}. Look at the engine's "
                "lines in the job's log (unsupported architecture or head size, too little memory)"
            ) from error
        self.max_model_len: int = self._llm.model_config.max_model_len
        self._tokenizer = self._llm.get_tokenizer()
        self._request_ids = itertools.count()
        self._cuts: set[asyncio.Future[None]] = set()
        self._processes = multiprocessing.active_children()
        self._death: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for process in self._processes:
            asyncio.get_running_loop().add_reader(process.sentinel, self._on_death, process.sentinel)

    def _on_death(self, sentinel: int) -> None:
        asyncio.get_running_loop().remove_reader(sentinel)
        if not self._death.done():
            self._death.set_result(None)

    async def _unless_dead(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        """Result of `work`, or WorkerDied as soon as a process of the engine has ended.

        vLLM alone is not enough: calls in flight, weight loads above all, can wait forever for an engine that was killed.
        """
        task = asyncio.ensure_future(work)
        watched: set[asyncio.Future[Any]] = {task, self._death}
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        cause: Exception | None = None
        if task.done():
            try:
                return task.result()
            except (EngineDeadError, EngineGenerateError) as error:
                cause = error
        task.cancel()
        raise WorkerDied(
            "expected the vLLM engine process to live, it ended or failed; its last lines in the job's log say why "
            "(memory limit, signal, unsupported operation). Then submit the job again"
        ) from cause

    async def generate(self, request: GenerateRequest) -> list[tuple[Sample, ...]]:
        """`group_size` samples for each prompt, in order."""
        outputs = await self._unless_dead(self._outputs(request))
        texts = iter(self._tokenizer.batch_decode([c.token_ids for o in outputs for c in o.outputs], skip_special_tokens=True))
        return [tuple(_sample(c, next(texts), request.version) for c in output.outputs) for output in outputs]

    async def _outputs(self, request: GenerateRequest) -> list[vllm.outputs.RequestOutput]:
        return await asyncio.gather(
            *(self._output(ids, seed, request) for ids, seed in zip(request.prompts, request.seeds, strict=True))
        )

    async def _output(self, prompt_ids: tuple[int, ...], seed: int, request: GenerateRequest) -> vllm.outputs.RequestOutput:
        params = SamplingParams(
            n=request.group_size,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            max_tokens=request.sampling.max_tokens,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request_id = str(next(self._request_ids))
        loop = asyncio.get_running_loop()
        cap = loop.call_later(request.sample_timeout_s, self._cut, request_id)
        try:
            stream = self._llm.generate(tokens_input(list(prompt_ids)), params, request_id=request_id)
            return [output async for output in stream][-1]
        finally:
            cap.cancel()

    def _cut(self, request_id: str) -> None:
        """End a request's samples as they are: an aborted request still yields what it has."""
        task = asyncio.ensure_future(self._llm.abort(request_id))
        self._cuts.add(task)
        task.add_done_callback(self._cuts.discard)

    async def load_weights(self, folder: str, version: int) -> int:
        """Replace the weights in place by those of files; returns the version that the engine holds then."""
        await self._unless_dead(self._llm.collective_rpc("reload_and_repack", args=(folder, version)))
        return await self.held_version()

    async def init_transfer(self, init_info: dict[str, Any]) -> None:
        """Meet the trainers, instead of those that were met before."""
        await self._unless_dead(self._llm.shutdown_weight_transfer_engine())
        await self._unless_dead(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    async def start_update(self) -> None:
        """Begin to replace the weights by those that the trainers send."""
        await self._unless_dead(self._llm.collective_rpc("hold_no_version"))
        await self._unless_dead(self._llm.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights and load them."""
        await self._unless_dead(self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))

    async def finish_update(self, version: int) -> None:
        """All weights of `version` have come."""
        await self._unless_dead(self._llm.collective_rpc("finish_and_repack", args=(version,)))

    async def held_version(self) -> int:
        """Version that all of the engine's processes hold; nothing is left of the keys and values that older weights made."""
        held: list[int | None] = await self._unless_dead(self._llm.collective_rpc("held_version"))
        await self._forget()
        if None in held or len(set(held)) != 1:
            raise WeightSyncMismatch(
                f"expected all processes of the engine to hold one version of the weights, got {held}; look at their lines in "
                "the job's log"
            )
        return int(held[0] or 0)

    async def _forget(self) -> None:
        """Forget the keys and values that the old weights made."""
        if not await self._unless_dead(self._llm.reset_prefix_cache()):
            raise WeightSyncMismatch(
                "expected the engine to forget the old weights' keys and values, it still uses some; load weights only after "
                "every generate call has ended"
            )

    async def heartbeat(self) -> None:
        """Return when the engine's loop has answered; a frozen one does not, though vLLM's own health check calls it well.

        Raises:
            WorkerDied: a process of the engine ended.
        """
        await self._unless_dead(self._llm.is_sleeping())

    def pids(self) -> list[int]:
        """Process ids of the engine's processes."""
        return [process.pid for process in self._processes if process.pid is not None]


def _sample(completion: vllm.outputs.CompletionOutput, text: str, version: int) -> Sample:
    """A completion as a record. With `logprobs=0` there is one log-probability a token, the drawn token's."""
    return Sample(
        response_ids=tuple(completion.token_ids),
        log_probs=tuple(completion.logprobs.logprobs),
        text=text,
        truncated=completion.finish_reason in ("length", "abort"),
        weight_version=version,
        timed_out=completion.finish_reason == "abort",
    )
