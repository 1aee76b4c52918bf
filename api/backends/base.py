"""The interface between the reconciler and a cluster. Every method may be repeated: names are deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol


class BackendError(Exception):
    """The backend refused, or answered something unexpected. What it did is to be observed."""


class BackendUnreachable(BackendError):
    """No answer. Nothing can be concluded about runs."""


@dataclass(frozen=True)
class RunSpec:
    """One run of a job: `name` is the same for the same attempt."""

    name: str
    folder: Path
    job_id: str
    job_name: str
    job_type: str
    attempt: int


@dataclass(frozen=True)
class Observation:
    """What the backend knows of a run. `unreachable` says nothing about it."""

    state: Literal["absent", "pending", "running", "ended", "unreachable"]
    message: str = ""


@dataclass(frozen=True)
class ServedApp:
    """One application that serves a model below `/<name>`."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class AppState:
    """What the backend knows of an application."""

    state: Literal["deploying", "ready", "failed", "deleting"]
    message: str = ""


class LaunchBackend(Protocol):
    """Launches the drivers of jobs."""

    async def submit(self, run: RunSpec) -> None:
        """Start the driver of `run.folder`. Raises BackendError; the run may exist nevertheless."""

    async def observe(self, name: str) -> Observation:
        """State of a run; never raises BackendUnreachable but says so."""

    async def stop(self, name: str) -> None:
        """Ask a run to end: SIGTERM, then SIGKILL after its grace period. No error when it has ended or never was."""

    async def cluster_resources(self) -> dict[str, float]:
        """Totals of the cluster, "CPU" and "GPU" among them. Raises BackendUnreachable."""

    def dashboard_url(self, name: str) -> str:
        """Page of a run for people."""


class ServeBackend(Protocol):
    """Serves models."""

    async def observe_apps(self) -> dict[str, AppState]:
        """All applications by name. Raises BackendUnreachable."""

    async def declare_apps(self, apps: Sequence[ServedApp]) -> None:
        """Make these the only applications. Raises BackendError."""

    def app_url(self, name: str) -> str:
        """Where the application's OpenAI routes start, with /v1."""
