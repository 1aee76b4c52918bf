"""Asks an HTTP service for a reward, with time-outs, repeated attempts and a circuit breaker."""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from sedsft.records import ScoringItem
from sedsft.reward_config import RemoteReward

MAX_REPLY_BYTES = 1 << 16
_TRANSIENT = frozenset((429, 500, 502, 503, 504))


class RemoteError(RuntimeError):
    """The service gave no reward: it cannot be reached, is broken, or answered what it should not."""


class _Transient(RemoteError):
    """An attempt that may succeed when repeated."""


class Breaker:
    """Stops asking after `failures` in a row, for `pause_s`; then one call decides whether it closes or opens again."""

    def __init__(self, failures: int, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._pause_s = pause_s
        self._clock = clock
        self._failures = 0
        self._opened_at = -math.inf

    def check(self) -> None:
        """Raise RemoteError while it is open."""
        if self._failures >= self._limit and self._clock() - self._opened_at < self._pause_s:
            raise RemoteError(f"expected an answer, the service failed {self._failures} times in a row and is not asked now")

    def record(self, succeeded: bool) -> None:
        """Note how a call ended."""
        self._failures = 0 if succeeded else self._failures + 1
        if self._failures >= self._limit:
            self._opened_at = self._clock()


class RemoteScorer:
    """One connection per attempt; one breaker per process."""

    def __init__(self, config: RemoteReward) -> None:
        self._config = config
        self._breaker = Breaker(config.breaker_failures, config.breaker_pause_s)
        url = urlsplit(config.url)
        self._kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = url.hostname or "", url.port
        self._target = (url.path or "/") + (f"?{url.query}" if url.query else "")

    def __call__(self, item: ScoringItem) -> float:
        """The reward of `item`.

        Raises:
            RemoteError: no reward after all attempts, or the breaker is open.
        """
        self._breaker.check()
        try:
            reward = self._asked(item)
        except RemoteError:
            self._breaker.record(succeeded=False)
            raise
        self._breaker.record(succeeded=True)
        return reward

    def _asked(self, item: ScoringItem) -> float:
        question = {
            "gold": item.gold,
            "response": item.response,
            "response_tokens": item.response_tokens,
            "data_source": item.data_source,
        }
        body = json.dumps(question).encode()
        for attempt in range(self._config.retries):
            try:
                return self._attempt(body)
            except _Transient:
                time.sleep(self._config.retry_pause_s * 2**attempt)
        return self._attempt(body)

    def _attempt(self, body: bytes) -> float:
        connection = self._kind(self._host, self._port, timeout=self._config.timeout_s)
        try:
            connection.request("POST", self._target, body, {"Content-Type": "application/json", "Accept": "application/json"})
            reply = connection.getresponse()
            text = reply.read(MAX_REPLY_BYTES + 1)
        except (OSError, http.client.HTTPException) as error:
            raise _Transient(f"expected an answer of {self._config.url}, got {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        if reply.status in _TRANSIENT:
            raise _Transient(f"expected status 200 of {self._config.url}, got {reply.status}")
        if reply.status != http.client.OK:
            raise RemoteError(f"expected status 200 of {self._config.url}, got {reply.status}")
        return _read_reward(text)


def _read_reward(text: bytes) -> float:
    """The number in `{"reward": 0.5}`; anything else is an error."""
    shown = text[:100]
    if len(text) > MAX_REPLY_BYTES:
        raise RemoteError(f"expected at most {MAX_REPLY_BYTES} bytes, got more, beginning {shown!r}")
    try:
        reply = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"expected JSON, got {shown!r}") from error
    reward = reply.get("reward") if isinstance(reply, dict) else None
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise RemoteError(f'expected {{"reward": <finite number>}}, got {shown!r}')
    return float(reward)
