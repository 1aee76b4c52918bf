"""The Ray actor that owns scoring processes: feeds them, kills what is late, replaces what died."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import services
from sedsft.records import Score, ScoreStatus
from services.errors import RewardFailure
from services.scoring.child import HEADER, MEMORY_EXIT_CODE, encode

_BATCH_ITEMS = 64
# Below the capacity of a pipe even when every character is escaped: writing to an idle process does not block.
_BATCH_CHARACTERS = 8_000
_START_TIMEOUT_S = 60.0
_PIPE_READ_BYTES = 1 << 16
_PACKAGE_ROOT = Path(services.__file__).parent.parent


def unscored(status: ScoreStatus, detail: str) -> Score:
    """A score without reward: not a number, so that nothing can take it for a 0."""
    return Score(reward=math.nan, status=status, detail=detail)


class _Child:
    """One scoring process with the items it was given. `items[0]` is the one it works on."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_PACKAGE_ROOT,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.items: deque[int] = deque()
        self.deadline = time.monotonic() + _START_TIMEOUT_S
        self._buffer = b""

    @property
    def idle(self) -> bool:
        return self.ready and not self.items

    def read(self) -> list[Any] | None:
        """Messages that have arrived; None at the end of the pipe, that is, of the process."""
        data = os.read(self.stdout.fileno(), _PIPE_READ_BYTES)
        if not data:
            return None
        self._buffer += data
        messages, start = [], 0
        while len(self._buffer) - start >= HEADER.size:
            end = start + HEADER.size + HEADER.unpack_from(self._buffer, start)[0]
            if end > len(self._buffer):
                break
            messages.append(json.loads(self._buffer[start + HEADER.size : end]))
            start = end
        self._buffer = self._buffer[start:]
        return messages

    def kill(self) -> int:
        """End the process with all that it started; its exit code, negative for a signal."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        code = self.process.wait()
        self.stdin.close()
        self.stdout.close()
        return code


class ScoringWorker:
    """Actor with a pool of scoring processes. Call it from one thread: the kernel kills the processes when it ends."""

    child_command: tuple[str, ...] = (sys.executable, "-m", "services.scoring.child")

    def __init__(self, index: int) -> None:
        self._index = index
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()

    def start(self, scorer: str, timeout_s: float, memory_mb: int, processes: int) -> None:
        """Start the processes and wait until each can score.

        Raises:
            RewardFailure: a process did not get ready.
        """
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._command = (*self.child_command, scorer, str(timeout_s), str(memory_mb))
        for _ in range(processes):
            self._add()
        while not all(child.ready for child in self._children):
            self._turn(deque(), {})

    def score(self, items: Sequence[tuple[str, str]]) -> list[Score]:
        """A score for each (gold, response), in order. What goes wrong with an item is its status, never a reward."""
        waiting = deque(range(len(items)))
        scores: dict[int, Score] = {}
        while len(scores) < len(items):
            self._feed(items, waiting)
            self._turn(waiting, scores)
        return [scores[i] for i in range(len(items))]

    def pids(self) -> list[int]:
        """Process ids of the scoring processes."""
        return [child.process.pid for child in self._children]

    def stop(self) -> None:
        """End the processes."""
        for child in list(self._children):
            self._remove(child)

    def _feed(self, items: Sequence[tuple[str, str]], waiting: deque[int]) -> None:
        """Give every idle process a batch; near the end smaller ones, so that all finish together."""
        for child in [c for c in self._children if c.idle]:
            most = min(_BATCH_ITEMS, -(-len(waiting) // len(self._children)))
            batch: list[int] = []
            room = _BATCH_CHARACTERS
            while len(batch) < most and room > 0:
                batch.append(waiting.popleft())
                room -= sum(len(text) for text in items[batch[-1]])
            if not batch:
                return
            child.items.extend(batch)
            child.deadline = time.monotonic() + self._timeout_s
            try:
                child.stdin.write(encode([items[i] for i in batch]))
            except BrokenPipeError:
                # It died idle, through none of these items.
                waiting.extendleft(reversed(batch))
                self._remove(child)
                self._add()

    def _turn(self, waiting: deque[int], scores: dict[int, Score]) -> None:
        """Wait for the next event, take what arrived, end what is late."""
        busy = [c for c in self._children if not c.idle]
        wait_s = max(0.0, min(c.deadline for c in busy) - time.monotonic())
        heard = {key.data for key, _ in self._selector.select(wait_s)}
        for child in heard:
            messages = child.read()
            if messages is None:
                self._replace(child, "crashed", waiting, scores)
            else:
                self._take(child, messages, scores)
        now = time.monotonic()
        for child in busy:
            if child not in heard and child.deadline <= now:
                self._replace(child, "timeout", waiting, scores)

    def _take(self, child: _Child, messages: list[Any], scores: dict[int, Score]) -> None:
        for message in messages:
            if not child.ready:
                child.ready = True
            elif "error" in message:
                scores[child.items.popleft()] = unscored("invalid", message["error"])
            else:
                scores[child.items.popleft()] = Score(message["reward"], "scored", message["extracted"])
        child.deadline = time.monotonic() + self._timeout_s

    def _replace(self, child: _Child, status: ScoreStatus, waiting: deque[int], scores: dict[int, Score]) -> None:
        """Put a new process in the place of one that died or is late.

        The item it worked on gets `status`, those behind it go to the front of the queue.
        """
        code = self._remove(child)
        if not child.ready:
            raise RewardFailure(
                f"expected a scoring process of reward-{self._index} to be ready within {_START_TIMEOUT_S:.0f} s, it ended "
                f"with code {code}; its last lines in the job's log say why (memory_mb too small, broken installation)"
            )
        if child.items:
            reason = f"memory limit of {self._memory_mb} MiB" if code == MEMORY_EXIT_CODE else f"process ended with code {code}"
            detail = f"killed after {self._timeout_s} s" if status == "timeout" else reason
            scores[child.items.popleft()] = unscored(status, detail)
            waiting.extendleft(reversed(child.items))
        self._add()

    def _add(self) -> None:
        child = _Child(self._command)
        self._children.append(child)
        self._selector.register(child.stdout, selectors.EVENT_READ, child)

    def _remove(self, child: _Child) -> int:
        self._children.remove(child)
        self._selector.unregister(child.stdout)
        return child.kill()
