"""The local stack: a Ray head with token authentication and the API, started and ended as a whole.

Both lead sessions of their own, and every process below them inherits `SEDSFT_STACK`: by these two `down` finds and ends
whatever is left, and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import psutil

from api.auth import ensure_secret
from api.settings import Settings, child_environment
from services.rundir import write_atomically

UP_TIMEOUT_S = 90.0
TERM_GRACE_S = 6.0
KILL_GRACE_S = 5.0
OBJECT_STORE_BYTES = 256 << 20
RAY_PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


class StackError(Exception):
    """The stack cannot be started or ended."""


@dataclass(frozen=True)
class Leader:
    """A process that was started, and when, so that a later process with its number is not taken for it."""

    pid: int
    created_at: float


@dataclass(frozen=True)
class Stack:
    """What `<home>/stack.json` holds while the stack is up."""

    stack_id: str
    api_url: str
    dashboard_url: str
    serve_port: int
    ray_folder: str
    leaders: dict[str, Leader]


def read_stack(settings: Settings) -> Stack | None:
    """The stack that `up` recorded; None when there is none."""
    try:
        record = json.loads((settings.home / "stack.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    leaders = {name: Leader(**leader) for name, leader in record.pop("leaders").items()}
    return Stack(**record, leaders=leaders)


def up(settings: Settings, num_cpus: int | None = None, num_gpus: int | None = None) -> Stack:
    """Start Ray and the API and wait until both answer.

    Raises:
        StackError: one is up already, a port is taken, or a process ended or did not answer; what was started is ended.
    """
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (old := read_stack(settings)) is not None:
        if processes_of(old):
            raise StackError(f"expected no stack on {settings.home}, one is up at {old.api_url}; run `sedsft down` first")
        _forget(settings, old)
    _require_free(settings.host, settings.port)
    ports = _free_ports(len(RAY_PORTS) + 1)
    settings = settings.model_copy(
        update={
            "ray_dashboard": f"http://127.0.0.1:{ports[1]}",
            "ray_token_path": settings.home / "ray_token",
            "serve_port": ports[-1],
        }
    )
    ensure_secret(settings.home / "ray_token")
    ensure_secret(settings.key_path)
    stack_id = secrets.token_hex(16)
    # Ray's sockets lie in this folder and their paths may have 107 bytes at most, so it is not in the home.
    ray_folder = tempfile.mkdtemp(prefix="sedsft-ray-")
    environment = child_environment(settings, stack_id)
    commands = {"ray": _ray_command(ports, ray_folder, num_cpus, num_gpus), "api": [sys.executable, "-m", "api.app"]}
    stack = Stack(stack_id, settings.url, settings.ray_dashboard, settings.serve_port, ray_folder, {})
    try:
        for name, command in commands.items():
            # Only the service may download, never a worker.
            offline = "0" if name == "api" and settings.allow_hub else environment["HF_HUB_OFFLINE"]
            process = _spawn(command, environment | {"HF_HUB_OFFLINE": offline}, settings.home / f"{name}.log")
            stack.leaders[name] = Leader(process.pid, psutil.Process(process.pid).create_time())
            write_atomically(settings.home / "stack.json", json.dumps(asdict(stack), indent=1))
        _wait_until_ready(settings, stack)
    except BaseException:
        down(settings)
        raise
    return stack


def down(settings: Settings) -> int:
    """End the stack and every process below it; how many had to be killed.

    Raises:
        StackError: there is no stack, or a process outlived SIGKILL.
    """
    stack = read_stack(settings)
    if stack is None:
        raise StackError(f"expected a stack on {settings.home}, there is none; `sedsft up` starts one")
    for leader in stack.leaders.values():
        process = _same_process(leader)
        if process is not None:
            process.terminate()
    _wait_until_gone(stack, TERM_GRACE_S)
    left = processes_of(stack)
    # A killed parent's children appear again until they are killed too.
    deadline = time.monotonic() + KILL_GRACE_S
    while (remaining := processes_of(stack)) and time.monotonic() < deadline:
        for process in remaining:
            _signal(process, signal.SIGKILL)
        time.sleep(0.05)
    if remaining:
        raise StackError(f"expected every process of the stack to end, {[p.pid for p in remaining]} did not; end them by hand")
    _forget(settings, stack)
    return len(left)


def processes_of(stack: Stack) -> list[psutil.Process]:
    """Every living process of the stack: in a leader's session, or with the stack's mark, or in a session of one with it.

    The mark alone is not enough, since a process that sets its title overwrites the environment that others can read.
    """
    seen: list[tuple[psutil.Process, int, bool]] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                seen.append((process, os.getsid(process.pid), _is_marked(process, stack.stack_id)))
        except (psutil.NoSuchProcess, ProcessLookupError):
            continue
    sessions = {leader.pid for leader in stack.leaders.values() if _keeps_session(leader)}
    sessions |= {session for _, session, marked in seen if marked}
    return [process for process, session, marked in seen if marked or session in sessions]


def _is_marked(process: psutil.Process, stack_id: str) -> bool:
    try:
        return process.environ().get("SEDSFT_STACK") == stack_id
    except (psutil.AccessDenied, psutil.ZombieProcess, OSError):
        return False


def _keeps_session(leader: Leader) -> bool:
    """A session keeps its number while it has members, so only another process of that number shows that it is over."""
    return _same_process(leader) is not None or not psutil.pid_exists(leader.pid)


# --------------------------------------------------------------------------------------------------- starting


def _ray_command(ports: Sequence[int], folder: str, num_cpus: int | None, num_gpus: int | None) -> list[str]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in zip(RAY_PORTS, ports, strict=False)]
    command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--include-dashboard=true"]
    command += [f"--temp-dir={folder}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
    command += [f"--num-cpus={num_cpus}"] if num_cpus is not None else []
    command += [f"--num-gpus={num_gpus}"] if num_gpus is not None else []
    return command


def _spawn(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, cwd="/"
        )


def _wait_until_ready(settings: Settings, stack: Stack) -> None:
    deadline = time.monotonic() + UP_TIMEOUT_S
    state = "no answer yet"
    while time.monotonic() < deadline:
        for name, leader in stack.leaders.items():
            process = _same_process(leader)
            if process is None or process.status() == psutil.STATUS_ZOMBIE:
                raise StackError(
                    f"expected {name} to run, it ended; its log {settings.home / name}.log ends:\n{_tail(settings, name)}"
                )
        try:
            response = httpx.get(f"{stack.api_url}/readyz", timeout=5, trust_env=False)
            if response.status_code == 200:
                return
            state = response.text
        except httpx.TransportError as error:
            state = str(error)
        time.sleep(0.2)
    raise StackError(
        f"expected {stack.api_url}/readyz to answer 200 within {UP_TIMEOUT_S:g} s, got {state}; ray.log ends:\n"
        f"{_tail(settings, 'ray')}\napi.log ends:\n{_tail(settings, 'api')}"
    )


def _tail(settings: Settings, name: str) -> str:
    path = settings.home / f"{name}.log"
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]) if path.exists() else ""


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, all different."""
    with ExitStack() as sockets:
        held = [sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


def _require_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StackError(
                f"expected {host}:{port} to be free, got {error.strerror}; set SEDSFT_PORT to another port"
            ) from error


# ----------------------------------------------------------------------------------------------------- ending


def _same_process(leader: Leader) -> psutil.Process | None:
    try:
        process = psutil.Process(leader.pid)
        return process if abs(process.create_time() - leader.created_at) < 1.0 else None
    except psutil.NoSuchProcess:
        return None


def _wait_until_gone(stack: Stack, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while processes_of(stack) and time.monotonic() < deadline:
        time.sleep(0.1)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _forget(settings: Settings, stack: Stack) -> None:
    for leader in stack.leaders.values():
        try:
            os.waitpid(leader.pid, os.WNOHANG)
        except ChildProcessError:
            continue
    shutil.rmtree(stack.ray_folder, ignore_errors=True)
    (settings.home / "stack.json").unlink(missing_ok=True)
