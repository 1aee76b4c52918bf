"""Scoring processes: feeds them, kills what is late, replaces what died or has served long enough."""

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
from dataclasses import astuple, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sedsft.records import Score, ScoreStatus, ScoringItem
from sedsft.reward_config import RewardConfig
from sedsft.rewards.child import HEADER, MEMORY_EXIT_CODE, encode

_BATCH_ITEMS = 64
# Below the capacity of a pipe even when every character is escaped: writing to an idle process does not block.
_BATCH_CHARACTERS = 8_000
_RECYCLED_ITEMS = 20_000
_START_TIMEOUT_S = 60.0
_PIPE_READ_BYTES = 1 << 16
_LONGEST_MESSAGE_BYTES = 1 << 24
_PACKAGE_ROOT = Path(__file__).parents[2]
# Nothing of the owner's environment: what reads model output needs none of its secrets. One thread each, since BLAS would
# reserve address space for more.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}


_GARBAGE = object()


class ScorerStartError(RuntimeError):
    """A scoring process ended before it could score."""


@dataclass(frozen=True)
class PoolLimits:
    """How many processes, and what each may use."""

    processes: int
    timeout_s: float
    """Wall time of one item."""
    memory_mb: int


def scoring_command(config: RewardConfig) -> tuple[str, ...]:
    """Command line of a scoring process, up to its limits."""
    return sys.executable, "-m", "sedsft.rewards.child", config.model_dump_json()


def unscored(status: ScoreStatus, detail: str, seconds: float = 0.0) -> Score:
    """A score without reward: not a number, so that nothing can take it for a 0."""
    return Score(reward=math.nan, status=status, detail=detail, seconds=seconds)


class _BrokenProtocol(Exception):
    """A process answered what no scoring process answers."""


class _Child:
    """One scoring process with the items it was given. `items[0]` is the one it works on."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_PACKAGE_ROOT,
            env=_ENVIRONMENT,
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.served = 0
        self.items: deque[int] = deque()
        self.since = time.monotonic()
        """When it began what it does now, as far as its owner can tell."""
        self._buffer = b""

    @property
    def idle(self) -> bool:
        return self.ready and not self.items

    def deadline(self, timeout_s: float) -> float:
        """When what it does now is late."""
        return self.since + (timeout_s if self.ready else _START_TIMEOUT_S)

    def read(self) -> list[Any] | None:
        """Messages that have arrived, `_GARBAGE` for what is none; None at the end of the pipe, that is, of the process."""
        data = os.read(self.stdout.fileno(), _PIPE_READ_BYTES)
        if not data:
            return None
        self._buffer += data
        messages: list[Any] = []
        start = 0
        while len(self._buffer) - start >= HEADER.size:
            [length] = HEADER.unpack_from(self._buffer, start)
            end = start + HEADER.size + length
            if length > _LONGEST_MESSAGE_BYTES:
                return [*messages, _GARBAGE]
            if end > len(self._buffer):
                break
            try:
                messages.append(json.loads(self._buffer[start + HEADER.size : end]))
            except ValueError:
                return [*messages, _GARBAGE]
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


class ScoringPool:
    """Use it from one thread: the kernel kills the processes when that ends."""

    def __init__(self, command: Sequence[str], limits: PoolLimits) -> None:
        self._command = (*command, str(limits.timeout_s), str(limits.memory_mb))
        self._limits = limits
        self._children: list[_Child] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> ScoringPool:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start the processes and wait until each can score.

        Raises:
            ScorerStartError: a process did not get ready.
        """
        for _ in range(self._limits.processes):
            self._add()
        while not all(child.ready for child in self._children):
            self._turn(deque(), {}, math.inf)

    def score(self, items: Sequence[ScoringItem], total_timeout_s: float = math.inf) -> list[Score]:
        """A score for each item, in order. What goes wrong with an item is its status, never a reward.

        What is not scored after `total_timeout_s` has the status `timeout`.

        Raises:
            ScorerStartError: a process that takes the place of another does not get ready.
        """
        end = time.monotonic() + total_timeout_s
        waiting = deque(range(len(items)))
        scores: dict[int, Score] = {}
        while len(scores) < len(items):
            if time.monotonic() >= end:
                self._give_up(len(items), scores, f"not scored within {total_timeout_s:g} s for all")
                break
            self._feed(items, waiting)
            self._turn(waiting, scores, end)
        return [scores[i] for i in range(len(items))]

    def pids(self) -> list[int]:
        """Process ids of the scoring processes."""
        return [child.process.pid for child in self._children]

    def stop(self) -> None:
        """End the processes."""
        for child in list(self._children):
            self._remove(child)

    def _give_up(self, count: int, scores: dict[int, Score], detail: str) -> None:
        for child in [c for c in self._children if not c.idle]:
            self._remove(child)
            self._add()
        for index in range(count):
            scores.setdefault(index, unscored("timeout", detail))

    def _feed(self, items: Sequence[ScoringItem], waiting: deque[int]) -> None:
        """Give every idle process a batch; near the end smaller ones, so that all finish together."""
        for child in [c for c in self._children if c.idle]:
            most = min(_BATCH_ITEMS, -(-len(waiting) // len(self._children)))
            batch: list[int] = []
            room = _BATCH_CHARACTERS
            while len(batch) < most and room > 0:
                batch.append(waiting.popleft())
                item = items[batch[-1]]
                room -= len(item.gold) + len(item.response) + len(item.data_source)
            if not batch:
                return
            if child.served >= _RECYCLED_ITEMS:
                waiting.extendleft(reversed(batch))
                self._remove(child)
                self._add()
                continue
            child.items.extend(batch)
            child.since = time.monotonic()
            try:
                child.stdin.write(encode([astuple(items[i]) for i in batch]))
            except BrokenPipeError:
                # It died idle, through none of these items.
                waiting.extendleft(reversed(batch))
                self._remove(child)
                self._add()

    def _turn(self, waiting: deque[int], scores: dict[int, Score], end: float) -> None:
        """Wait for the next event, take what arrived, end what is late."""
        timeout_s = self._limits.timeout_s
        busy = [c for c in self._children if not c.idle]
        wait_s = max(0.0, min([end, *(c.deadline(timeout_s) for c in busy)]) - time.monotonic())
        heard = {key.data for key, _ in self._selector.select(wait_s)}
        for child in heard:
            try:
                messages = child.read()
                if messages is not None:
                    self._take(child, messages, scores)
                    continue
            except _BrokenProtocol:
                pass
            self._replace(child, "crashed", waiting, scores)
        now = time.monotonic()
        for child in busy:
            if child not in heard and child.deadline(timeout_s) <= now:
                self._replace(child, "timeout", waiting, scores)

    def _take(self, child: _Child, messages: list[Any], scores: dict[int, Score]) -> None:
        for message in messages:
            if not child.ready:
                child.ready = True
            elif child.items and isinstance(message, dict):
                scores[child.items.popleft()] = _read_score(message)
                child.served += 1
            else:
                raise _BrokenProtocol
        child.since = time.monotonic()

    def _replace(self, child: _Child, status: ScoreStatus, waiting: deque[int], scores: dict[int, Score]) -> None:
        """Put a new process in the place of one that died or is late.

        The item it worked on gets `status`, those behind it go to the front of the queue.
        """
        code = self._remove(child)
        if not child.ready:
            raise ScorerStartError(
                f"expected a scoring process to be ready within {_START_TIMEOUT_S:.0f} s, it ended with code {code}; what it "
                "wrote to stderr says why (memory_mb too small, broken installation)"
            )
        if child.items:
            reason = f"memory limit of {self._limits.memory_mb} MiB" if code == MEMORY_EXIT_CODE else f"ended with code {code}"
            detail = f"killed after {self._limits.timeout_s} s" if status == "timeout" else f"process: {reason}"
            scores[child.items.popleft()] = unscored(status, detail, time.monotonic() - child.since)
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


def _read_score(message: dict[str, Any]) -> Score:
    if "error" in message:
        return unscored("invalid", str(message["error"]), message.get("seconds", 0.0))
    try:
        return Score(
            reward=message["reward"],
            status="scored",
            extracted=message["extracted"],
            correct=message["correct"],
            parts=message["parts"],
            seconds=message["seconds"],
        )
    except KeyError as error:
        raise _BrokenProtocol from error
