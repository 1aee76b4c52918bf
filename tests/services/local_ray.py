"""A Ray cluster of a test's own, in this process and gone with it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray


@contextmanager
def local_ray() -> Iterator[None]:
    """Two cores, no dashboard, no token; session files in a folder whose short name leaves room for socket paths."""
    with tempfile.TemporaryDirectory(prefix="lr", dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        ray.init(num_cpus=2, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
        yield
        ray.shutdown()
