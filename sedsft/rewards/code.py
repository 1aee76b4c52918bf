"""Asks a function of the user's own for a reward, in a sandboxed process that belongs to this scoring process.

python -m sedsft.rewards.code <CodeReward as JSON>      loads the code once and says what is wrong with it
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sedsft.records import ScoringItem
from sedsft.reward_config import CodeReward

MAX_SOURCE_BYTES = 1 << 20
MAX_REPLY_BYTES = 1 << 16
_CHECK_MEMORY_MB = 2048
_PACKAGE_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1", "PYTHONDONTWRITEBYTECODE": "1"}


class CodeError(RuntimeError):
    """The user's code gave no reward, does not load, or cannot be run here without danger."""


def source_of(config: CodeReward) -> bytes:
    """The file's content.

    Raises:
        ValueError: it is too large, or not what it was when the job was submitted.
    """
    source = Path(config.path).read_bytes()
    if len(source) > MAX_SOURCE_BYTES:
        raise ValueError(f"expected at most {MAX_SOURCE_BYTES} bytes of code in {config.path}, got {len(source)}")
    found = hashlib.sha256(source).hexdigest()
    if config.sha256 not in (None, found):
        raise ValueError(
            f"expected {config.path} as it was submitted, sha256 {config.sha256}, got {found}; restore it, or submit the job "
            "anew"
        )
    return source


class CodeScorer:
    """One sandbox at a time. It dies with this process, and one that died is followed by another at the next item."""

    def __init__(self, config: CodeReward, memory_mb: int) -> None:
        """Start a sandbox and load the code.

        Raises:
            ValueError: as `source_of` does.
            CodeError: the code does not load, or the kernel gives no sandbox.
        """
        self._name = f"{Path(config.path).name}:{config.function}"
        self._memory_mb = memory_mb
        self._begin = {"source": source_of(config).decode(), "path": config.path, "function": config.function}
        self._asked = 0
        self._process = self._start()

    def __call__(self, item: ScoringItem) -> float:
        """The reward of `item`.

        Raises:
            CodeError: the function raised, returned no finite number, or its sandbox died.
        """
        if self._process.poll() is not None:
            self._process = self._start()
        self._asked += 1
        question = {"id": self._asked, "arguments": [item.response, item.gold, item.data_source, item.response_tokens]}
        reply = self._ask(self._process, question)
        if reply.get("id") != self._asked:
            self._end(self._process)
            raise CodeError(f"expected an answer of {self._name} to one question, got another; it wrote to the pipe itself")
        reward = reply.get("reward")
        if not isinstance(reward, float):
            raise CodeError(f"{self._name}: {reply.get('error')}")
        return reward

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "sedsft.rewards.sandbox", str(self._memory_mb), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=_PACKAGE_ROOT,
            env=_ENVIRONMENT,
        )
        reply = self._ask(process, self._begin)
        if "error" in reply:
            self._end(process)
            raise CodeError(f"expected to load {self._name}, got: {reply['error']}")
        return process

    def _ask(self, process: subprocess.Popen[bytes], message: dict[str, Any]) -> dict[str, Any]:
        """Send one line, read one; whoever owns this process bounds the time."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline(MAX_REPLY_BYTES)
            reply = json.loads(line) if line.endswith(b"\n") else None
        except (OSError, ValueError, RecursionError):
            line, reply = b"", None
        if not isinstance(reply, dict):
            code = self._end(process)
            said = "an answer that is none" if line else f"its end with code {code}"
            raise CodeError(f"expected an answer of {self._name}, got {said}; it may have run out of memory or CPU time")
        return reply

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        process.kill()
        return process.wait()


def main(argument: str) -> None:
    """Load the code of a `CodeReward` given as JSON in its sandbox; exit with what is wrong."""
    try:
        CodeScorer(CodeReward.model_validate_json(argument), _CHECK_MEMORY_MB)
    except (OSError, ValueError, CodeError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1])
