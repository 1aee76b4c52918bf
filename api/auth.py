"""The API key: made at first start, kept in a file that only its owner reads, asked of every /v1 route."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.errors import ApiError

_bearer = HTTPBearer(auto_error=False, description="The key in `<home>/api_key`.")


def ensure_secret(path: Path) -> str:
    """The secret in `path`; 256 random bits are written there, readable by the owner alone, when there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        text = path.read_text(encoding="ascii").strip()
        if len(text) < 32:
            raise RuntimeError(f"expected at least 32 characters in {path}, got {len(text)}; delete the file") from None
        return text
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        secret = secrets.token_hex(32)
        file.write(secret)
    return secret


def digest(secret: str) -> bytes:
    """What the running service keeps of a key."""
    return hashlib.sha256(secret.encode()).digest()


def require_key(request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]) -> None:
    """Refuse a request without the key."""
    given = digest(credentials.credentials if credentials else "")
    if not hmac.compare_digest(given, request.app.state.key_digest):
        raise ApiError(
            401,
            "unauthorized",
            "expected the header `Authorization: Bearer <key>` with this service's key, got "
            f"{'another key' if credentials else 'no key'}; `sedsft up` says which file holds it",
            headers={"WWW-Authenticate": "Bearer"},
        )
