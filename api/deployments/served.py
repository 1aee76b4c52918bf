"""A deployment as the application that Ray Serve runs: its arguments are those of `services.serving.app:build`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from api.backends.base import ServedApp
from api.deployments.store import DeploymentRow

INGRESS_CPUS = 0.1


def served_app(row: DeploymentRow) -> ServedApp:
    """The same for the same row, so that declaring it again changes nothing."""
    arguments = {"model_path": row.model_path, "model_id": row.name}
    return ServedApp(row.id, arguments | {key: value for key, value in row.resources.items() if value is not None})


def reserved(resources: Mapping[str, Any]) -> tuple[float, int]:
    """CPU cores and GPUs that a deployment takes from the cluster: `cpus` with each GPU, and the HTTP side."""
    return resources["cpus"] * max(1, resources["gpus"]) + INGRESS_CPUS, resources["gpus"]
