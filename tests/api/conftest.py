"""A service on a fresh home with a cluster that the test commands, and a model and data that pass every check."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from api.backends.base import AppState, BackendError, BackendUnreachable, Observation, RunSpec, ServedApp
from api.settings import Settings


@dataclass
class CommandedCluster:
    """Both backends: does what a cluster would, and goes wrong where the test says."""

    runs: dict[str, Observation] = field(default_factory=dict)
    submitted: list[RunSpec] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    apps: dict[str, AppState] = field(default_factory=dict)
    declared: list[list[ServedApp]] = field(default_factory=list)
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 4.0, "GPU": 0.0})
    reachable: bool = True
    submit_error: BackendError | None = None
    record_in_spite_of_error: bool = False
    declare_error: BackendError | None = None

    def _reach(self) -> None:
        if not self.reachable:
            raise BackendUnreachable("expected Ray to answer, it does not; start it")

    async def submit(self, run: RunSpec) -> None:
        self._reach()
        self.submitted.append(run)
        if self.submit_error is None or self.record_in_spite_of_error:
            if run.name in self.runs:
                raise BackendError(f"Job with submission_id {run.name} already exists")
            self.runs[run.name] = Observation("pending")
        if self.submit_error is not None:
            raise self.submit_error

    async def observe(self, name: str) -> Observation:
        return self.runs.get(name, Observation("absent")) if self.reachable else Observation("unreachable", "no answer")

    async def stop(self, name: str) -> None:
        self._reach()
        self.stopped.append(name)

    async def cluster_resources(self) -> dict[str, float]:
        self._reach()
        return self.resources

    def dashboard_url(self, name: str) -> str:
        return f"http://dashboard/{name}"

    async def observe_apps(self) -> dict[str, AppState]:
        self._reach()
        return dict(self.apps)

    async def declare_apps(self, apps: Sequence[ServedApp]) -> None:
        self._reach()
        if self.declare_error is not None:
            raise self.declare_error
        self.declared.append(list(apps))
        self.apps = {app.name: self.apps.get(app.name, AppState("deploying")) for app in apps}

    def app_url(self, name: str) -> str:
        return f"http://serve/{name}/v1"


def write_model(folder: Path) -> Path:
    """The smallest folder that passes as a model."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    header = json.dumps({"weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "tokenizer.json").write_text('{"model": {}, "added_tokens": []}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}", "pad_token": "<pad>"}')
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a model and a data file for each purpose."""
    root = tmp_path / "root"
    write_model(root / "model")
    (root / "sft.jsonl").write_text('{"prompt": "1+1", "completion": "2"}\n' * 3)
    (root / "rl.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 3)
    (root / "bench.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n' * 3)
    return root


@pytest.fixture
def sft_job() -> dict[str, Any]:
    """A job that passes every check."""
    sft = {"objective": {"type": "sed"}, "data": {"path": "sft.jsonl"}, "steps": 2}
    return {"type": "sft", "name": "first", "model": {"path": "model"}, "sft": sft}


@pytest.fixture
def pipeline_job() -> dict[str, Any]:
    """SFT, RL from its checkpoint, evaluation of both."""
    return {
        "type": "pipeline",
        "name": "whole",
        "stages": [
            {
                "type": "sft",
                "name": "sft",
                "model": {"path": "model"},
                "sft": {"objective": {"type": "sed", "tau": 0.9}, "data": {"path": "sft.jsonl"}, "steps": 2},
                "trainer": {"workers": 2},
            },
            {
                "type": "rl",
                "name": "rl",
                "model": {"stage": "sft"},
                "grpo": {"data": {"path": "rl.jsonl"}, "iterations": 1},
            },
            {
                "type": "eval",
                "name": "eval",
                "models": {"base": {"path": "model"}, "rl": {"stage": "rl"}},
                "eval": {"benchmarks": [{"name": "sums", "path": "bench.jsonl"}]},
            },
        ],
    }


@pytest.fixture
def cluster() -> CommandedCluster:
    """The cluster behind the service."""
    return CommandedCluster()


@pytest.fixture
def settings(tmp_path: Path, root: Path) -> Settings:
    """A home of its own; the loop turns fast."""
    return Settings(
        home=tmp_path / "home", allowed_roots=(root, tmp_path / "home"), reconcile_period_s=0.02, max_body_bytes=20_000
    )


@pytest.fixture
def anonymous(settings: Settings, cluster: CommandedCluster) -> Iterator[TestClient]:
    """A client without the key; the service runs meanwhile."""
    with TestClient(create_app(settings, (cluster, cluster)), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(anonymous: TestClient, settings: Settings) -> TestClient:
    """A client with the key."""
    anonymous.headers["Authorization"] = f"Bearer {settings.key_path.read_text()}"
    return anonymous
