"""A planted fault: an engine whose lm_head stops following its weight. vLLM imports this in the engine's own process."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from services.rollout.worker_extension import WorkerExtension

STALE_FROM = 3


class StaleHead(WorkerExtension):
    """From version `STALE_FROM` on every load leaves the packed copies of embedding and lm_head as the last good one left them,
    and says that all is well."""

    _packed: tuple[Any, ...] = ()

    def repack_and_hold(self, version: int) -> int:
        modules = self.model_runner.get_model().modules()
        heads = [m for m in modules if isinstance(m, VocabParallelEmbedding) and hasattr(m, "cpu_linear")]
        assert heads, "expected an lm_head with a packed copy"
        if version < STALE_FROM:
            super().repack_and_hold(version)
            self._packed = tuple(head.cpu_linear for head in heads)
        else:
            for head, packed in zip(heads, self._packed, strict=True):
                head.cpu_linear = packed
            self._held_version = version
        return version
