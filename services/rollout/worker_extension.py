"""Code that runs inside vLLM's own worker processes, injected by `worker_extension_cls`.

vLLM imports this module when it builds a worker; from then on the process dies with the actor that owns it.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from typing import Any

from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

# Imported for its effect: vLLM then knows the transfer engine `gloo`.
import services.rollout.gloo_transfer  # noqa: F401

OWNER_PID_VARIABLE = "SEDSFT_ENGINE_OWNER_PID"


def _die_with(owner_pid: int) -> None:
    """Kill this process as soon as process `owner_pid` has ended.

    An engine whose actor got SIGKILL would otherwise wait for requests forever and keep its memory. A parent-death signal
    does not do: it fires when the spawning *thread* ends, and with tensor parallelism the actor is the grandparent.
    """
    try:
        owner = os.pidfd_open(owner_pid)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    select.select([owner], [], [])
    os.kill(os.getpid(), signal.SIGKILL)


if OWNER_PID_VARIABLE in os.environ:
    threading.Thread(target=_die_with, args=(int(os.environ[OWNER_PID_VARIABLE]),), name="owner-watch", daemon=True).start()


class WorkerExtension:
    """Methods that `collective_rpc` can call on a vLLM worker."""

    model_runner: Any
    finish_weight_update: Any
    """vLLM's own."""

    _held_version: int | None = None

    def reload_and_repack(self, folder: str, version: int) -> int:
        """Load the safetensors of `folder` in place, as `version`, and rebuild the copies of them that vLLM forgets."""
        self.hold_no_version()
        self.model_runner.reload_weights(weights_path=folder)
        return self.repack_and_hold(version)

    def finish_and_repack(self, version: int) -> int:
        """End an update that was sent, as `version`."""
        self.finish_weight_update()
        return self.repack_and_hold(version)

    def repack_and_hold(self, version: int) -> int:
        """Rebuild what new weights leave behind; from here on the process vouches for `version`.

        CPU linear layers multiply by a prepacked copy of their weight. vLLM rebuilds it for all but the embedding and the
        lm_head: without this loop the engine is neither the old model nor the new one.
        """
        for module in self.model_runner.get_model().modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        self._held_version = version
        return version

    def hold_no_version(self) -> None:
        """Weights are about to change."""
        self._held_version = None

    def held_version(self) -> int | None:
        """Version that was loaded last, None from the begin of a load to its end and before the first."""
        return self._held_version
