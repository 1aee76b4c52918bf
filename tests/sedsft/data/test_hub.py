"""Names are parsed; files of one commit come through the hub's own client from a server that speaks the hub's endpoints."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from sedsft.data import DataFileError
from sedsft.data.files import find_files
from sedsft.data.hub import HubName, hub_origin, parse_hub_name

ROOT = Path(__file__).parents[3]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROW = b'{"prompt": "1+1", "completion": "2"}\n'
FILES = {
    "README.md": b"# words\n",
    "words.py": b"raise SystemExit('data set scripts never run')\n",
    "train.jsonl": ROW * 3,
    "data/a.jsonl": ROW,
    "data/deep/b.jsonl": ROW * 2,
    ".hidden/c.jsonl": b"never",
}
PROGRAM = """
import sys
from pathlib import Path
from sedsft.data import DataFileError
from sedsft.data.hub import fetch, parse_hub_name
for name in sys.argv[2:]:
    try:
        print(fetch(parse_hub_name(name), Path(sys.argv[1])))
    except DataFileError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """The two endpoints of a hub with one data set at one commit: what it is, and its files."""

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        self.server.asked.append((self.command, path))  # type: ignore[attr-defined]
        revisions = {f"/api/datasets/team/words{revision}" for revision in ("", "/revision/main", f"/revision/{COMMIT}")}
        prefix = f"/datasets/team/words/resolve/{COMMIT}/"
        if path in revisions:
            siblings = [{"rfilename": name} for name in FILES]
            content = json.dumps({"id": "team/words", "sha": COMMIT, "siblings": siblings}).encode()
            self._send(200, content, {"Content-Type": "application/json"}, body)
        elif path.startswith("/api/datasets/team/words/revision/"):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        elif path.startswith(prefix) and (name := path.removeprefix(prefix)) in FILES:
            etag = hashlib.sha1(FILES[name]).hexdigest()
            self._send(200, FILES[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)

    def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def url(hub: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def fetched(*names: str, home: Path, endpoint: str, **environment: str) -> list[str]:
    """Path or error of each name, from a process of its own, since the client reads its endpoint when it is imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
    environment = {**kept, "HF_ENDPOINT": endpoint, "HF_HOME": str(home / "hf"), **environment}
    command = [sys.executable, "-c", PROGRAM, str(home), *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://team/words", HubName("team/words", None, "")),
        ("hf://team/words@main", HubName("team/words", "main", "")),
        (f"hf://team/words@{COMMIT}/data/*.jsonl", HubName("team/words", COMMIT, "data/*.jsonl")),
        ("hf://a.b/c-d_1/x y.jsonl", HubName("a.b/c-d_1", None, "x y.jsonl")),
        ("team/words", None),
        ("/data/hf://x.jsonl", None),
    ],
)
def test_names_and_paths_are_told_apart(text: str, parts: HubName | None) -> None:
    assert parse_hub_name(text) == parts
    assert parts is None or str(parts) == text


@pytest.mark.parametrize("text", ["hf://", "hf://words", "hf://team//x", "hf://team/words/../x", "hf://te am/words"])
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(DataFileError, match="expected hf://owner/name"):
        parse_hub_name(text)


def test_origin_of_a_fetched_path() -> None:
    assert hub_origin(f"/srv/hub/team/words/{COMMIT}/data/*.jsonl") == f"hf://team/words@{COMMIT}/data/*.jsonl"
    assert hub_origin(f"/srv/hub/team/words/{COMMIT}") == f"hf://team/words@{COMMIT}"
    assert hub_origin("/srv/hub/team/words/main/train.jsonl") is None


def test_data_files_alone_are_fetched_and_found_again(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    cases = {
        "": ["data/a.jsonl", "data/deep/b.jsonl", "train.jsonl"],
        "@main/train.jsonl": ["train.jsonl"],
        "/data": ["data/a.jsonl", "data/deep/b.jsonl"],
        "/data/*.jsonl": ["data/a.jsonl"],
        f"@{COMMIT}/**/[!t]*.jsonl": ["data/a.jsonl", "data/deep/b.jsonl"],
    }
    for number, (pattern, files) in enumerate(cases.items()):
        home = tmp_path / str(number)
        [path] = fetched(f"hf://team/words{pattern}", home=home, endpoint=url(hub))
        folder = home / "hub" / "team" / "words" / COMMIT
        assert path.startswith(str(folder))
        assert find_files(path) == tuple(folder / file for file in files)
        for file in files:
            assert (folder / file).read_bytes() == FILES[file]
        there = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and ".cache" not in p.parts]
        assert sorted(map(str, there)) == files


def test_what_is_there_is_not_downloaded_again(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    first, second = fetched("hf://team/words", "hf://team/words", home=tmp_path, endpoint=url(hub))
    assert first == second
    downloads = [path for command, path in hub.asked if command == "GET" and "/resolve/" in path]  # type: ignore[attr-defined]
    assert len(downloads) == len(set(downloads)) == 3


def test_what_the_hub_has_not_is_told(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    expected = {
        "hf://team/others": f"expected a data set at {url(hub)}, got none for hf://team/others",
        "hf://team/words@v9": "expected a branch, tag or commit of team/words in hf://team/words@v9",
        "hf://team/words/*.parquet": "got data/a.jsonl, data/deep/b.jsonl, train.jsonl in the data set",
        "hf://team/words/[z-a].jsonl": "expected a pattern of file names, got '[z-a].jsonl'",
        "hf://team/words/words.py": "expected files ending in",
    }
    for message, part in zip(fetched(*expected, home=tmp_path, endpoint=url(hub)), expected.values(), strict=True):
        assert part in message


def test_without_a_hub_the_error_says_what_was_tried_and_that_a_local_path_works(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        # Bound and not listening: every connection is refused.
        offline = fetched("hf://team/words", home=tmp_path, endpoint=endpoint, HF_HUB_OFFLINE="1")
        unreachable = fetched("hf://team/words", home=tmp_path, endpoint=endpoint)
    for [message] in (offline, unreachable):
        assert message.startswith(f"expected to download hf://team/words from {endpoint}, got ")
        assert "give their local path, which always works" in message
