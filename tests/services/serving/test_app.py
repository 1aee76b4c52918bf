"""A tiny model behind Ray Serve, asked over HTTP; deployed through Serve's REST API as the service does it."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from pydantic import ValidationError
from ray import serve

from services.serving.app import DeploymentArgs, llm_config
from tests.services.tiny_llama import save_tiny_llama


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = answer.read()
    return json.loads(text) if text else None


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "model")


@pytest.mark.timeout(60)
def test_args_are_checked(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"has no config\.json"):
        DeploymentArgs(model_path=str(tmp_path), model_id="m")
    with pytest.raises(ValidationError, match="Extra inputs"):
        DeploymentArgs(model_path=str(model), model_id="m", tp=2)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="pattern"):
        DeploymentArgs(model_path=str(model), model_id="a/b")


@pytest.mark.timeout(60)
def test_gpus_split_the_model(model: Path) -> None:
    config = llm_config(DeploymentArgs(model_path=str(model), model_id="m", gpus=2, cpus=2))
    assert config.engine_kwargs["tensor_parallel_size"] == 2
    assert config.placement_group_config == {"bundles": [{"CPU": 2.0, "GPU": 1}] * 2}
    assert "enforce_eager" not in config.engine_kwargs


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """(Serve REST address, HTTP address of applications)."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    folder = tempfile.mkdtemp(prefix="sv-", dir="/tmp")
    port, http = free_port(), free_port()
    ray.init(num_cpus=4, dashboard_port=port, include_dashboard=True, _temp_dir=folder, object_store_memory=200 << 20)
    serve.start(http_options={"host": "127.0.0.1", "port": http})
    yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{http}"
    serve.shutdown()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_chat_completion_over_http(dashboard: tuple[str, str], model: Path) -> None:
    rest, http = dashboard
    application = {
        "name": "tiny",
        "route_prefix": "/tiny",
        "import_path": "services.serving.app:build",
        "args": {"model_path": str(model), "model_id": "tiny"},
        "runtime_env": {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[3])}},
    }
    began = time.monotonic()
    ask(f"{rest}/api/serve/applications/", {"applications": [application]}, "PUT")
    while True:
        state = ask(f"{rest}/api/serve/applications/")["applications"].get("tiny", {})
        assert state.get("status") not in ("DEPLOY_FAILED", "UNHEALTHY"), state
        if state.get("status") == "RUNNING":
            break
        time.sleep(0.5)
    print(f"up in {time.monotonic() - began:.1f} s")
    assert [m["id"] for m in ask(f"{http}/tiny/v1/models")["data"]] == ["tiny"]
    question = {"model": "tiny", "messages": [{"role": "user", "content": "w1 w2 w3"}], "max_tokens": 5, "seed": 3}
    answer = ask(f"{http}/tiny/v1/chat/completions", question)
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["completion_tokens"] <= 5
    assert answer["choices"][0]["message"]["role"] == "assistant"
    long = {**question, "messages": [{"role": "user", "content": " ".join(["w5"] * 230)}], "n": 8}
    assert len(ask(f"{http}/tiny/v1/chat/completions", long)["choices"]) == 8
