"""How weights get from trainers into engines: through files, or straight from memory to memory. The driver's side."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from services.actor_group import ActorGroup
from services.buckets import WeightStream
from services.jobspec import Backend, SyncSettings

if TYPE_CHECKING:
    from services.rollout.sender import Sender


@dataclass(frozen=True)
class Target:
    """An engine that weights are sent to."""

    name: str
    actor: Any
    """Its Ray actor; two lives of an engine differ in it."""
    ranks: int
    """Processes that its layers are split over."""


@dataclass(frozen=True)
class WeightLoad:
    """How engines get one version: what is sent to all of them at once, and then what each is asked, which answers with the
    version that it holds."""

    version: int
    method: str
    args: tuple[Any, ...]
    send: Callable[[Sequence[Target]], None] | None = None
    folder: Path | None = None
    """Where the weights lie, for engines that come later."""

    @staticmethod
    def of_files(folder: Path, version: int) -> WeightLoad:
        """The safetensors in `folder`."""
        return WeightLoad(version, "load_weights", (str(folder), version), folder=folder)


class Transport(Protocol):
    """One way from trainers to engines."""

    def export(self, version: int) -> WeightLoad:
        """Let the trainers write the weights of now, or make ready to send them.

        Raises:
            PhaseTimeout: not within the phase's deadline.
        """

    def discard(self, load: WeightLoad) -> None:
        """Remove what `export` left, after a sync that failed."""


class FileTransport:
    """`write(folder)` leaves safetensors in an empty folder. They stay until the next sync, for engines that come late."""

    def __init__(self, write: Callable[[Path], None], folder: Path) -> None:
        self._write = write
        self._folder = folder

    def export(self, version: int) -> WeightLoad:
        """Write the weights into a folder of their own."""
        load = WeightLoad.of_files(self._folder / f"weights-{version}", version)
        assert load.folder is not None
        self.discard(load)
        load.folder.mkdir(parents=True)
        try:
            self._write(load.folder)
        except BaseException:
            self.discard(load)
            raise
        return load

    def discard(self, load: WeightLoad) -> None:
        """Remove the folder."""
        assert load.folder is not None
        shutil.rmtree(load.folder, ignore_errors=True)


@dataclass(frozen=True)
class Follower:
    """The end of a rank that does not send, but has parts of what is sent."""

    weights: WeightStream

    def send(self, targets: tuple[Target, ...], version: int) -> None:
        """Take part in gathering. Collective."""
        for _ in self.weights.stream():
            pass


@dataclass(frozen=True)
class SenderSetup:
    """How each trainer rank opens its end. Rank 0 sends and loads vLLM for it."""

    backend: Backend
    bucket_bytes: int
    timeout_s: float

    def open(self, rank: int, weights: WeightStream) -> Sender | Follower:
        """The end of `rank`."""
        if rank > 0:
            return Follower(weights)
        sender: Sender = importlib.import_module("services.rollout.sender").Sender(self, weights)
        return sender


class StreamTransport:
    """Trainers send, engines receive, and nothing is kept: an engine that comes late waits for the next sync."""

    def __init__(self, trainers: ActorGroup, backend: Backend, settings: SyncSettings) -> None:
        self._trainers = trainers
        self._settings = settings
        self._setup = SenderSetup(backend, settings.bucket_mb << 20, settings.load_timeout_s)

    def export(self, version: int) -> WeightLoad:
        """Have every rank's end open; the weights themselves are gathered while they are sent."""
        self._trainers.call("open_sender", self._setup, timeout_s=self._settings.export_timeout_s)

        def send(targets: Sequence[Target]) -> None:
            self._trainers.call("send_weights", tuple(targets), version, timeout_s=self._settings.load_timeout_s)

        return WeightLoad(version, "held_version", (), send=send)

    def discard(self, load: WeightLoad) -> None:
        """Nothing was left."""
