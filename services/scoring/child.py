"""A scoring process: reads batches of (gold, response) from stdin, writes one verdict per item to stdout.

    python -m services.scoring.child <scorer> <cpu seconds per item> <memory MiB> <parent pid>

Both ways a message is 4 bytes of length, big-endian, then JSON. The first message out is `null`: ready. Then for every
batch `[[gold, response], ...]` one message per item, in order: `{"reward", "extracted"}` or `{"error"}`. The parent bounds
wall time by killing this process; what a limit of memory or CPU time ends, ends here.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

from sedsft.rewards import registry

MEMORY_EXIT_CODE = 77
HEADER = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1
_CPU_SLACK_S = 5


def encode(message: Any) -> bytes:
    """A message as bytes."""
    body = json.dumps(message).encode()
    return HEADER.pack(len(body)) + body


def _read(stream: BinaryIO) -> Any:
    """The next message. Raises EOFError when the parent closed the pipe."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise EOFError
    return json.loads(stream.read(HEADER.unpack(header)[0]))


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def _limit_cpu(cpu_s: float) -> None:
    """Allow `cpu_s` more seconds of CPU time, in case the parent is stopped and cannot kill."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft_s = math.ceil(usage.ru_utime + usage.ru_stime + cpu_s) + _CPU_SLACK_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, resource.RLIM_INFINITY))


def _verdict(scorer: registry.Scorer, gold: str, response: str) -> dict[str, Any]:
    try:
        verdict = scorer(gold, response)
        reward = float(verdict.reward)
        if not math.isfinite(reward):
            return {"error": f"expected a finite reward, got {reward}"}
        return {"reward": reward, "extracted": None if verdict.extracted is None else str(verdict.extracted)}
    except MemoryError:
        # The heap of a process that ran into its limit is not worth trusting: a fresh one takes over.
        os._exit(MEMORY_EXIT_CODE)
    except Exception as error:  # noqa: BLE001 a scorer may raise anything; it becomes the item's status
        return {"error": f"{type(error).__name__}: {error}"[:500]}


def main(arguments: list[str]) -> None:
    """Serve until the parent closes stdin or dies."""
    name, cpu_s, memory_mb, parent_pid = arguments[0], float(arguments[1]), int(arguments[2]), int(arguments[3])
    _die_with_parent(parent_pid)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mb << 20, memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What a scorer prints must not end up between the messages.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    scorer = registry.load(name)
    out.write(encode(None))
    while True:
        try:
            batch = _read(sys.stdin.buffer)
        except EOFError:
            return
        for gold, response in batch:
            _limit_cpu(cpu_s)
            out.write(encode(_verdict(scorer, gold, response)))


if __name__ == "__main__":
    main(sys.argv[1:])
