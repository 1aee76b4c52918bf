"""Identifiers: a prefix and a lower-case ULID, so that ids sort by the time they were made."""

from __future__ import annotations

import secrets
import time

_CROCKFORD = "0123456789abcdefghjkmnpqrstvwxyz"


def new_ulid() -> str:
    """48 bits of Unix time in milliseconds, then 80 random bits, as 26 characters of Crockford's base 32."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_CROCKFORD[(value >> shift) & 31] for shift in range(125, -1, -5))


def new_id(prefix: str) -> str:
    """For example `job_01k3...`."""
    return f"{prefix}_{new_ulid()}"


def run_name(job_id: str, attempt: int) -> str:
    """Name of an attempt's run at the backend: the same for the same attempt, letters, digits and dashes only."""
    return f"{job_id.replace('_', '-')}-a{attempt}"
