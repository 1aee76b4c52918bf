"""A real stack (Ray with token, API, database) on a folder of its own, and a small base model made in seconds."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from api import stack as local_stack
from api.client import Client
from api.settings import Settings
from sedsft.tasks.demo import prepare
from sedsft.tasks.tiny_model import Recipe

SHORT = Recipe(steps=160, batch_size=64)
"""Long enough that some samples are right, so that groups vary."""


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with base/ and data/, the only root that jobs may read from."""
    folder = tmp_path_factory.mktemp("workspace")
    prepare(folder, recipe=SHORT)
    return folder


@pytest.fixture(scope="session")
def settings(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A home of its own, and the workspace as the only root."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    return Settings(home=tmp_path_factory.mktemp("home"), port=port, allowed_roots=(workspace,))


@pytest.fixture(scope="session")
def stack(settings: Settings) -> Iterator[local_stack.Stack]:
    """Two logical cores of Ray and the API, ended with every process below them."""
    running = local_stack.up(settings, num_cpus=2)
    yield running
    local_stack.down(settings)
    assert not local_stack.processes_of(running)


@pytest.fixture(scope="session")
def client(stack: local_stack.Stack, settings: Settings) -> Iterator[Client]:
    """Client with the stack's key."""
    with Client.local(stack.api_url, settings.key_path) as client:
        yield client
