"""Settings refuse what would expose the service."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from api.auth import ensure_secret
from api.ids import new_id, new_ulid, run_name
from api.settings import Settings, child_environment


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_than_loopback_must_be_allowed(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="SEDSFT_ALLOW_REMOTE"):
        Settings(home=tmp_path, host=host)
    assert Settings(home=tmp_path, host=host, allow_remote=True).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback(host: str, tmp_path: Path) -> None:
    assert Settings(home=tmp_path, host=host).host == host


def test_from_the_environment(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("SEDSFT_HOME", str(tmp_path / "h"))
    monkeypatch.setenv("SEDSFT_ALLOWED_ROOTS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    monkeypatch.setenv("SEDSFT_RAY_TOKEN_PATH", "")
    monkeypatch.setenv("SEDSFT_REWARD_HOSTS", "judge, judge:8000")
    settings = Settings()
    assert settings.allowed_roots == (tmp_path / "a", tmp_path / "b")
    assert settings.database_url == f"sqlite:///{tmp_path / 'h' / 'sedsft.db'}"
    assert settings.ray_token_path is None
    assert settings.reward_hosts == ("judge", "judge:8000")
    assert settings.key_path == tmp_path / "h" / "api_key"


def test_a_child_process_reads_the_same_settings(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "somewhere:6379")
    settings = Settings(home=tmp_path / "h", port=1234, allowed_roots=(tmp_path,), heartbeat_timeout_s=7.0, serve_port=4321)
    settings = settings.model_copy(update={"reward_hosts": ("judge", "judge:8000"), "allow_reward_code": True})
    environment = child_environment(settings, "mark")
    assert "RAY_ADDRESS" not in environment
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert Settings() == settings


def test_secrets_are_made_once_and_for_the_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "key"
    secret = ensure_secret(path)
    assert len(bytes.fromhex(secret)) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert ensure_secret(path) == secret
    path.write_text("short")
    with pytest.raises(RuntimeError, match="delete the file"):
        ensure_secret(path)


def test_ids_sort_by_time_and_name_runs() -> None:
    ids = [new_ulid() for _ in range(100)]
    assert len(set(ids)) == 100
    assert [i[:10] for i in ids] == sorted(i[:10] for i in ids)
    assert all(len(i) == 26 and i == i.lower() for i in ids)
    job_id = new_id("job")
    assert run_name(job_id, 2) == f"job-{job_id[4:]}-a2"
