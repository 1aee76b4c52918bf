from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from sedsft.records import ScoringItem
from sedsft.reward_config import RemoteReward
from sedsft.rewards.remote import Breaker, RemoteError, RemoteScorer

ITEM = ScoringItem("5", r"\boxed{5}", 7, "somewhere")


class Service(ThreadingHTTPServer):
    """Gives the replies in `replies`, one after the other; the last one again and again."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, bytes]] = [(200, b'{"reward": 0.5}')]
        self.asked: list[dict[str, Any]] = []
        self.pause_s = 0.0
        self.location = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/score?v=1"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))) | {"path": self.path})
        time.sleep(self.server.pause_s)
        replies = self.server.replies
        status, body = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(status)
        if self.server.location:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def scorer(service: Service, **settings: Any) -> RemoteScorer:
    return RemoteScorer(RemoteReward(**({"url": service.url, "timeout_s": 0.3, "retry_pause_s": 0.01} | settings)))


def test_asks_and_reads(service: Service) -> None:
    assert scorer(service)(ITEM) == 0.5
    assert service.asked == [
        {"gold": "5", "response": r"\boxed{5}", "response_tokens": 7, "data_source": "somewhere", "path": "/score?v=1"}
    ]


def test_failing_attempts_are_repeated(service: Service) -> None:
    service.replies = [(503, b""), (500, b"{}"), (200, b'{"reward": -1}')]
    assert scorer(service, retries=2)(ITEM) == -1.0
    assert len(service.asked) == 3


def test_after_the_last_attempt_it_is_an_error(service: Service) -> None:
    service.replies = [(503, b"")]
    with pytest.raises(RemoteError, match=r"expected status 200 of .*, got 503"):
        scorer(service, retries=1)(ITEM)
    assert len(service.asked) == 2


def test_time_out_and_no_connection(service: Service) -> None:
    service.pause_s = 1.0
    started = time.monotonic()
    with pytest.raises(RemoteError, match="TimeoutError"):
        scorer(service, retries=0, timeout_s=0.1)(ITEM)
    assert time.monotonic() - started < 0.5
    with pytest.raises(RemoteError, match="ConnectionRefusedError"):
        RemoteScorer(RemoteReward(url="http://127.0.0.1:9/", retries=0))(ITEM)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((200, b"[0.5]"), "expected .*reward"),
        ((200, b'{"rewards": [0.5, 0.5]}'), "expected .*reward"),
        ((200, b'{"reward": NaN}'), "finite"),
        ((200, b'{"reward": true}'), "finite"),
        ((200, b'{"reward": "1"}'), "finite"),
        ((200, b"{"), "expected JSON"),
        ((200, b" " * 70_000), "at most 65536 bytes"),
        ((404, b""), "got 404"),
        ((302, b""), "got 302"),
    ],
)
def test_other_answers_are_errors_at_once(service: Service, reply: tuple[int, bytes], said: str) -> None:
    service.replies, service.location = [reply], service.url
    with pytest.raises(RemoteError, match=said):
        scorer(service, retries=3)(ITEM)
    assert len(service.asked) == 1


def test_breaker() -> None:
    now = [0.0]
    breaker = Breaker(failures=2, pause_s=10, clock=lambda: now[0])
    for succeeded in (False, True, False):
        breaker.check()
        breaker.record(succeeded)
    breaker.check()
    breaker.record(succeeded=False)
    now[0] = 9.9
    with pytest.raises(RemoteError, match="failed 2 times in a row"):
        breaker.check()
    now[0] = 10.0
    breaker.check()
    breaker.record(succeeded=False)
    now[0] = 19.9
    with pytest.raises(RemoteError, match="failed 3 times in a row"):
        breaker.check()
    now[0] = 20.0
    breaker.check()
    breaker.record(succeeded=True)
    breaker.check()


def test_an_open_breaker_asks_no_more(service: Service) -> None:
    service.replies = [(500, b"")]
    ask = scorer(service, retries=0, breaker_failures=3)
    for _ in range(10):
        with pytest.raises(RemoteError):
            ask(ITEM)
    assert len(service.asked) == 3
