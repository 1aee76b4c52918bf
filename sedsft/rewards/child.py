"""A scoring process: reads batches of items from stdin, writes one reward per item to stdout.

    python -m sedsft.rewards.child <RewardConfig as JSON> <cpu seconds per item> <memory MiB> <parent pid>

Both ways a message is 4 bytes of length, big-endian, then JSON. The first message out is `null`: ready. Then for every
batch `[[gold, response, response tokens, data source], ...]` one message per item, in order: the fields of `Reward` and
`seconds`, or `{"error", "seconds"}`. The parent bounds wall time by killing this process; what a limit of memory or CPU time
ends, ends here.
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
import time
from dataclasses import dataclass
from typing import Any, BinaryIO

from sedsft.records import ScoringItem
from sedsft.reward_config import RewardConfig
from sedsft.rewards import registry
from sedsft.rewards.verdict import Reward

MEMORY_EXIT_CODE = 77
HEADER = struct.Struct(">I")
_PR_SET_PDEATHSIG = 1
_CPU_SLACK_S = 5


@dataclass(frozen=True)
class ChildLimits:
    """What a scoring process may use, and whose death ends it."""

    cpu_s: float
    memory_mb: int
    parent_pid: int

    @classmethod
    def of(cls, arguments: list[str]) -> ChildLimits:
        """From the last three arguments of the command line."""
        return cls(float(arguments[0]), int(arguments[1]), int(arguments[2]))


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


def limit_process(limits: ChildLimits) -> None:
    """Bind this process to its parent's life and to the limit of memory."""
    _die_with_parent(limits.parent_pid)
    resource.setrlimit(resource.RLIMIT_AS, (limits.memory_mb << 20, limits.memory_mb << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_cpu(cpu_s: float) -> None:
    """Allow `cpu_s` more seconds of CPU time, in case the parent is stopped and cannot kill."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft_s = math.ceil(usage.ru_utime + usage.ru_stime + cpu_s) + _CPU_SLACK_S
    resource.setrlimit(resource.RLIMIT_CPU, (soft_s, resource.RLIM_INFINITY))


def _answer(scorer: registry.Scorer, item: ScoringItem) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        message = _checked(scorer(item))
    except MemoryError:
        # The heap of a process that ran into its limit is not worth trusting: a fresh one takes over.
        os._exit(MEMORY_EXIT_CODE)
    except Exception as error:  # noqa: BLE001 a scorer may raise anything; it becomes the item's status
        message = {"error": f"{type(error).__name__}: {error}"[:500]}
    return message | {"seconds": time.perf_counter() - started}


def _checked(reward: Reward) -> dict[str, Any]:
    value = float(reward.reward)
    if not math.isfinite(value):
        return {"error": f"expected a finite reward, got {value}"}
    return {
        "reward": value,
        "extracted": None if reward.extracted is None else str(reward.extracted),
        "correct": None if reward.correct is None else bool(reward.correct),
        "parts": {str(name): float(part) for name, part in reward.parts.items()},
    }


def serve(scorer: registry.Scorer, cpu_s: float, out: BinaryIO) -> None:
    """Answer until the parent closes stdin or dies."""
    out.write(encode(None))
    while True:
        try:
            batch = _read(sys.stdin.buffer)
        except EOFError:
            return
        for item in batch:
            _limit_cpu(cpu_s)
            out.write(encode(_answer(scorer, ScoringItem(*item))))


def take_stdout() -> BinaryIO:
    """The pipe to the parent; what anything prints from now on goes to stderr, not between the messages."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return out


def main(arguments: list[str]) -> None:
    """Load the scorer and serve."""
    limits = ChildLimits.of(arguments[1:])
    limit_process(limits)
    out = take_stdout()
    serve(registry.load(RewardConfig.model_validate_json(arguments[0])), limits.cpu_s, out)


if __name__ == "__main__":
    main(sys.argv[1:])
