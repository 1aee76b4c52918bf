"""Rewards by code of the user's own: what it returns counts, what it must not reach it does not reach."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sedsft.records import Score, ScoringItem
from sedsft.reward_config import AnswerReward, CodeReward, RewardConfig
from sedsft.rewards import confinement
from sedsft.rewards.code import CodeError, CodeScorer, source_of
from sedsft.rewards.pool import PoolLimits, ScorerStartError, ScoringPool, scoring_command

ROOT = Path(__file__).parents[3]
CODE = '''
import ctypes, io, json, os, signal, socket, subprocess, sys, threading, time

def score(response, gold, data_source, response_tokens):
    """Half a point for each right character, or what the response says."""
    if response.startswith("do "):
        return do(response[3:], gold)
    return 0.5 * sum(a == b for a, b in zip(response, gold)) + response_tokens

def do(what, gold):
    match what:
        case "connect": socket.create_connection(("127.0.0.1", int(gold)), timeout=3)
        case "unix": socket.socketpair()
        case "fork": os.fork()
        case "fork raw":
            clone = 57 if os.uname().machine == "x86_64" else 220
            return float(ctypes.CDLL(None).syscall(clone, signal.SIGCHLD, 0))
        case "thread": threading.Thread(target=print).start()
        case "exec": subprocess.run(["/bin/true"])
        case "kill": os.kill(int(gold), signal.SIGKILL)
        case "read": return float(len(open(gold, "rb").read()))
        case "write": open(gold, "w").write("x")
        case "write here": open("x", "w").write("x")
        case "write memory": os.write(os.memfd_create("x"), b"x" * 100)
        case "list": return float(len(os.listdir(gold)))
        case "environment": return float(not {"HF_TOKEN", "HOME", "PATH"} & set(os.environ))
        case "descriptors": return float(len([fd for fd in range(64) if is_open(fd)]))
        case "unlimit":
            import resource
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        case "session": os.setsid()
        case "outlive": return float(ctypes.CDLL(None).prctl(1, 0, 0, 0, 0))
        case "raise": raise ZeroDivisionError("planted")
        case "exit": sys.exit(3)
        case "die": os._exit(3)
        case "nan": return float("nan")
        case "none": return None
        case "true": return True
        case "text": return "1"
        case "huge": return "x" * 10_000_000
        case "memory": bytearray(8 << 30)
        case "sleep": time.sleep(1000)
        case "loop":
            while True: pass
        case "recurse": return do("recurse", gold)
        case "print": print("noise"); os.write(2, b"noise")
        case "forge": os.write(answers(), b'{"id": 1, "reward": 99.0}\\n')
        case "garbage": os.write(answers(), b"\\x00nonsense\\n")
        case "flood": os.write(answers(), b"x" * 200_000)
    return 0.25

def is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False

def answers():
    """The pipe to the owner: code that looks for it finds it."""
    return [fd for fd in range(3, 64) if is_open(fd) and not os.get_blocking(fd) is None][-1]
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(CODE)
    return path


@pytest.fixture(scope="module")
def scorer(file: Path) -> CodeScorer:
    return CodeScorer(CodeReward(path=str(file)), memory_mb=512)


@pytest.fixture
def pool(file: Path) -> Iterator[ScoringPool]:
    config = RewardConfig(components=(AnswerReward(weight=2.0), CodeReward(path=str(file), weight=0.5)), timeout_s=1.5)
    with ScoringPool(scoring_command(config), PoolLimits(2, config.timeout_s, config.memory_mb)) as built:
        yield built


def ask(scorer: CodeScorer, what: str, gold: object = "") -> float:
    return scorer(ScoringItem(str(gold), f"do {what}"))


def test_the_function_gets_all_that_scorers_get(scorer: CodeScorer) -> None:
    assert scorer(ScoringItem("abc", "abd", response_tokens=7)) == 8.0
    for text in ("", "\ud800", "\x00\n", "ü" * 200_000):
        assert scorer(ScoringItem(text, text)) == 0.5 * len(text)


def test_it_cannot_connect_to_a_port_that_listens(scorer: CodeScorer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), timeout=3).close()
        with pytest.raises(CodeError, match="PermissionError"):
            ask(scorer, "connect", port)
        with pytest.raises(CodeError, match="PermissionError"):
            ask(scorer, "unix")


@pytest.mark.parametrize(("wall", "said"), [("_filter_calls", "Network is unreachable"), ("_read_only", "PermissionError")])
def test_one_wall_fallen_the_others_stand(wall: str, said: str) -> None:
    """Without the filter of system calls, there still is no network in the namespace; without Landlock, the filter holds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = (
            f"import os, socket\nfrom sedsft.rewards import confinement\nconfinement.{wall} = lambda *a: None\n"
            f"confinement.confine(1024, os.getppid())\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 3)"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1
    assert said in done.stderr


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("fork", "PermissionError"),
        ("thread", "can't start new thread"),
        ("exec", "PermissionError"),
        ("write here", "FileNotFoundError"),
        ("write memory", "File too large"),
        ("session", "PermissionError"),
    ],
)
def test_it_starts_no_process_and_writes_nothing(scorer: CodeScorer, what: str, said: str) -> None:
    with pytest.raises(CodeError, match=said):
        ask(scorer, what)


def test_system_calls_are_refused_below_the_library_too(scorer: CodeScorer) -> None:
    assert ask(scorer, "fork raw") == -1.0
    assert ask(scorer, "outlive") == -1.0


def test_it_kills_nobody(scorer: CodeScorer) -> None:
    with pytest.raises(CodeError, match="PermissionError"):
        ask(scorer, "kill", os.getpid())


def test_limits_cannot_be_raised(scorer: CodeScorer) -> None:
    with pytest.raises(CodeError, match=r"ValueError|PermissionError"):
        ask(scorer, "unlimit")


def test_it_reads_what_is_installed_and_nothing_else(scorer: CodeScorer, file: Path, tmp_path: Path) -> None:
    assert ask(scorer, "read", json.__file__) == Path(json.__file__).stat().st_size
    secret = tmp_path / "api_key"
    secret.write_text("secret")
    for path in (secret, file, Path("/etc/passwd"), Path(f"/proc/{os.getpid()}/environ"), Path("/proc/self/environ")):
        with pytest.raises(CodeError, match="PermissionError"):
            ask(scorer, "read", path)
    for path in (tmp_path, Path.home(), Path(".")):
        with pytest.raises(CodeError, match="PermissionError"):
            ask(scorer, "list", path)
    with pytest.raises(CodeError, match="PermissionError"):
        ask(scorer, "write", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_it_inherits_neither_environment_nor_open_files(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    scorer = CodeScorer(CodeReward(path=str(file)), memory_mb=512)
    with file.open() as held:
        os.set_inheritable(held.fileno(), True)
        assert ask(scorer, "environment") == 1.0
        # 0, 1 and 2 lead nowhere; two lead to the owner.
        assert ask(scorer, "descriptors") == 5.0


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("raise", "ZeroDivisionError: planted"),
        ("exit", "SystemExit: 3"),
        ("recurse", "RecursionError"),
        ("nan", "expected a finite number, got 'nan'"),
        ("none", "got 'None'"),
        ("true", "got 'True'"),
        ("text", "got '1'"),
        ("huge", "got 'xxx"),
        ("die", "its end with code 3"),
        ("memory", "its end with code 77"),
        ("forge", "it wrote to the pipe itself"),
        ("garbage", "it may have run out"),
        ("flood", "an answer that is none"),
    ],
)
def test_what_goes_wrong_is_an_error_of_its_item_and_not_of_the_next(file: Path, what: str, said: str) -> None:
    scorer = CodeScorer(CodeReward(path=str(file)), memory_mb=512)
    assert ask(scorer, "print") == 0.25
    with pytest.raises(CodeError, match=said):
        # A forged answer comes to light with the question after it, and none but the forger's own reward is at stake.
        [ask(scorer, what) for _ in range(2 if what == "forge" else 1)]
    assert scorer(ScoringItem("a", "a")) == 0.5


def test_hangs_and_deaths_are_statuses_of_the_pool(pool: ScoringPool) -> None:
    """0.5 x code + 2 x answer; the boxed 4 is right, and half a point for each of its 8 characters but the box."""
    items = [ScoringItem("4", r"\boxed{4}")] * 8
    for place, what in ((1, "sleep"), (3, "loop"), (5, "die"), (6, "raise")):
        items[place] = ScoringItem("4", f"do {what}")
    scores = pool.score(items)
    assert [score.status for score in scores] == [
        "scored",
        "timeout",
        "scored",
        "timeout",
        "scored",
        "invalid",
        "invalid",
        "scored",
    ]
    good = [score for score in scores if score.status == "scored"]
    assert {(score.reward, tuple(score.parts.items())) for score in good} == {(2.0, (("answer", 1.0), ("code", 0.0)))}
    assert "mine.py:score: ZeroDivisionError: planted" in scores[6].detail


def sandboxes_below(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [process for process in found if "sedsft.rewards.sandbox" in process.cmdline()]


def test_a_sandbox_dies_with_its_scoring_process(pool: ScoringPool) -> None:
    first, second = pool.pids()
    boxes = [*sandboxes_below(first), *sandboxes_below(second)]
    assert len(boxes) == 2
    os.kill(first, signal.SIGKILL)
    psutil.wait_procs([boxes[0]], timeout=5)
    assert not boxes[0].is_running()
    pool.stop()
    psutil.wait_procs(boxes, timeout=5)
    assert not any(box.is_running() for box in boxes)


def test_what_was_submitted_is_what_runs(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mine.py"
    copy.write_bytes(file.read_bytes())
    config = CodeReward(path=str(copy), sha256=hashlib.sha256(file.read_bytes()).hexdigest())
    assert source_of(config) == file.read_bytes()
    copy.write_text(CODE + "\n# changed")
    with pytest.raises(ValueError, match="as it was submitted"):
        CodeScorer(config, 512)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def score(:", "SyntaxError"),
        ("import nothing_like_this", "ModuleNotFoundError"),
        ("def other(*a): return 1.0", "expected a function 'score'"),
        ("raise SystemExit(0)", "SystemExit"),
        ("import os; os._exit(0)", "its end with code 0"),
    ],
)
def test_code_that_does_not_load_is_named(tmp_path: Path, code: str, said: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    config = CodeReward(path=str(tmp_path / "mine.py"))
    with pytest.raises(CodeError, match=said):
        CodeScorer(config, 512)
    command = [sys.executable, "-m", "sedsft.rewards.code", config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 1
    assert said in done.stderr
    with (
        pytest.raises(ScorerStartError),
        ScoringPool(scoring_command(RewardConfig(components=(config,))), PoolLimits(1, 5, 512)),
    ):
        pass


def test_without_a_wall_there_is_no_sandbox(file: Path) -> None:
    """A kernel that refuses user namespaces, as most containers' profiles do: here a limit of none does."""
    script = (
        "import os, sys\nfrom sedsft.rewards import confinement\n"
        "confinement._libc = type('Kernel', (), {'unshare': lambda self, flags: (confinement.ctypes.set_errno(1), -1)[1]})()\n"
        "from sedsft.rewards import sandbox\nsandbox.main(['512', str(os.getppid())])"
    )
    begin = json.dumps({"source": "def score(*a): return 1.0", "path": str(file), "function": "score"}) + "\n"
    done = subprocess.run(
        [sys.executable, "-c", script], input=begin, capture_output=True, text=True, cwd=ROOT, timeout=60, check=False
    )
    reply = json.loads(done.stdout)
    assert "expected the kernel to give a sandbox a user and a network namespace of its own" in reply["error"]
    assert "Operation not permitted" in reply["error"]


def test_the_filter_ends_calls_of_other_architectures() -> None:
    program = confinement._program(0, 0xC000003E)
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096
    assert program[:8].hex() == "2000000004000000"
    # The last instruction lets everything pass that no other has named.
    assert program[-8:].hex() == "060000000000ff7f"


def test_a_thousand_items_take_less_than_a_second(scorer: CodeScorer) -> None:
    started = time.monotonic()
    for _ in range(1000):
        assert scorer(ScoringItem("a", "a")) == 0.5
    assert time.monotonic() - started < 1.0


def test_scores_carry_the_part(pool: ScoringPool) -> None:
    [score] = pool.score([ScoringItem("4", "4")])
    assert isinstance(score, Score)
    assert score.parts["code"] == 0.5
