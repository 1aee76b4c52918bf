"""Settings of the service, from `SEDSFT_*` environment variables. The only place of this room that reads the environment."""

from __future__ import annotations

import ipaddress
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Where the service keeps its things, where it listens and where Ray is."""

    model_config = SettingsConfigDict(env_prefix="SEDSFT_", frozen=True, extra="forbid", use_attribute_docstrings=True)

    home: Path = Path("~/.sedsft")
    """Folder of the database, keys, logs and runs."""
    host: str = "127.0.0.1"
    """Address that the API listens on."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8642
    """Port that the API listens on."""
    allow_remote: bool = False
    """Must be true before `host` may be an address that other machines reach; the API itself speaks plain HTTP."""
    database_url: str = Field(default_factory=lambda data: f"sqlite:///{data['home'] / 'sedsft.db'}")
    """SQLAlchemy URL. Default: a SQLite file in `home`."""
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = Field(default_factory=lambda data: (Path.cwd(), data["home"]))
    """Folders below which models and data files may lie, separated by colons. Relative paths of a job start at the first."""
    allow_hub: bool = False
    """Whether a job may name data as `hf://owner/name`, which the service downloads from the Hugging Face hub (`HF_ENDPOINT`)
    into `home/runs/hub` when the job is submitted. Jobs themselves never use the network."""
    reward_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Hosts that rewards of the kind `remote` may ask, as `name` or `name:port`, separated by commas."""
    allow_reward_code: bool = False
    """Whether a reward may be a Python file of the job's owner. It runs in a sandbox, which the kernel must be able to give:
    user namespaces, Landlock and seccomp."""
    ray_dashboard: str = "http://127.0.0.1:8265"
    """URL of Ray's dashboard, whose REST API runs jobs and serves models."""
    ray_token_path: Path | None = Field(default_factory=lambda data: data["home"] / "ray_token")
    """File with Ray's token; empty for a cluster without token authentication."""
    serve_port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the OpenAI routes of deployments, on the loopback address."""
    reconcile_period_s: Annotated[float, Field(gt=0, le=60)] = 1.0
    """Pause between two rounds of the reconciler."""
    heartbeat_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """A driver silent for this long has its job stopped and failed with `heartbeat_lost`."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A driver that runs for this long without a first heartbeat fails with `heartbeat_lost`."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1 << 20
    """Largest request body."""

    @field_validator("home", mode="after")
    @classmethod
    def _absolute_home(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split_roots(cls, roots: Any) -> Any:
        return tuple(part for part in roots.split(os.pathsep) if part) if isinstance(roots, str) else roots

    @field_validator("reward_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, hosts: Any) -> Any:
        return tuple(part.strip() for part in hosts.split(",") if part.strip()) if isinstance(hosts, str) else hosts

    @field_validator("allowed_roots", mode="after")
    @classmethod
    def _real_roots(cls, roots: tuple[Path, ...]) -> tuple[Path, ...]:
        if not roots:
            raise ValueError("expected at least one folder, got none")
        return tuple(root.expanduser().resolve() for root in roots)

    @field_validator("ray_token_path", mode="before")
    @classmethod
    def _no_token(cls, path: Any) -> Any:
        return path or None

    @model_validator(mode="after")
    def _loopback(self) -> Settings:
        if not self.allow_remote and not _is_loopback(self.host):
            raise ValueError(
                f"expected a loopback host such as 127.0.0.1, got {self.host!r}; to listen for other machines put TLS in front "
                "and set SEDSFT_ALLOW_REMOTE=true"
            )
        return self

    @property
    def url(self) -> str:
        """URL of the API for clients on this machine."""
        return f"http://{'127.0.0.1' if self.host == '0.0.0.0' else self.host}:{self.port}"

    @property
    def runs(self) -> Path:
        """Folder of the runs, one folder per job."""
        return self.home / "runs"

    @property
    def key_path(self) -> Path:
        """File of the API key."""
        return self.home / "api_key"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def child_environment(settings: Settings, stack_id: str) -> dict[str, str]:
    """Environment of the processes that `sedsft up` starts: Ray's token, no telemetry, no downloads, this Python first.

    `SEDSFT_STACK` marks every process below them, so that `sedsft down` finds what is left.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SEDSFT_"))}
    bin_folder = str(Path(sys.executable).parent)
    return environment | {
        "PATH": os.pathsep.join([bin_folder, environment.get("PATH", os.defpath)]),
        "SEDSFT_STACK": stack_id,
        "SEDSFT_HOME": str(settings.home),
        "SEDSFT_HOST": settings.host,
        "SEDSFT_PORT": str(settings.port),
        "SEDSFT_ALLOW_REMOTE": str(settings.allow_remote),
        "SEDSFT_DATABASE_URL": settings.database_url,
        "SEDSFT_ALLOWED_ROOTS": os.pathsep.join(str(root) for root in settings.allowed_roots),
        "SEDSFT_ALLOW_HUB": str(settings.allow_hub),
        "SEDSFT_REWARD_HOSTS": ",".join(settings.reward_hosts),
        "SEDSFT_ALLOW_REWARD_CODE": str(settings.allow_reward_code),
        "SEDSFT_RAY_DASHBOARD": settings.ray_dashboard,
        "SEDSFT_RAY_TOKEN_PATH": str(settings.ray_token_path or ""),
        "SEDSFT_SERVE_PORT": str(settings.serve_port),
        "SEDSFT_RECONCILE_PERIOD_S": str(settings.reconcile_period_s),
        "SEDSFT_HEARTBEAT_TIMEOUT_S": str(settings.heartbeat_timeout_s),
        "SEDSFT_START_TIMEOUT_S": str(settings.start_timeout_s),
        "SEDSFT_MAX_BODY_BYTES": str(settings.max_body_bytes),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(settings.ray_token_path or ""),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray would otherwise wait 30 s on SIGTERM for running jobs to end by themselves.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
