"""Table of deployments and every statement on it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import JSON, select
from sqlalchemy.orm import Mapped, mapped_column

from api.db import Base, Database
from api.ids import new_id

DeploymentStatus = Literal["deploying", "ready", "failed", "stopped"]


class DeploymentRow(Base):
    """A model that is served, or was."""

    __tablename__ = "deployments"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(index=True)
    model_path: Mapped[str]
    job_id: Mapped[str | None]
    stage: Mapped[str | None]
    resources: Mapped[dict[str, Any]] = mapped_column(JSON)
    desired_state: Mapped[str]
    status: Mapped[DeploymentStatus] = mapped_column(index=True)
    reason_code: Mapped[str | None]
    reason_message: Mapped[str | None]
    created_at: Mapped[float]
    ready_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class NameTaken(Exception):
    """Another deployment of that name is up."""


class DeploymentStore:
    """All SQL about deployments."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(self, name: str, model_path: str, source: tuple[str, str] | None, resources: dict[str, Any]) -> DeploymentRow:
        """Store a deployment of the checkpoint of `source` = (job id, stage), or of a folder.

        Raises:
            NameTaken: a deployment of that name has not ended.
        """
        with self._db.write() as session:
            live = select(DeploymentRow.id).where(DeploymentRow.name == name, DeploymentRow.status.in_(["deploying", "ready"]))
            if session.scalar(live) is not None:
                raise NameTaken(name)
            row = DeploymentRow(
                id=new_id("dep").replace("_", "-"),
                name=name,
                model_path=model_path,
                job_id=source[0] if source else None,
                stage=source[1] if source else None,
                resources=resources,
                desired_state="run",
                status="deploying",
                created_at=time.time(),
            )
            session.add(row)
            return row

    def get(self, deployment_id: str) -> DeploymentRow | None:
        """One deployment."""
        with self._db.read() as session:
            return session.get(DeploymentRow, deployment_id)

    def page(self, limit: int, after: str | None) -> Sequence[DeploymentRow]:
        """Up to `limit` deployments, newest first, that are older than `after`."""
        query = select(DeploymentRow).order_by(DeploymentRow.id.desc()).limit(limit)
        if after is not None:
            query = query.where(DeploymentRow.id < after)
        with self._db.read() as session:
            return session.scalars(query).all()

    def live(self) -> Sequence[DeploymentRow]:
        """Deployments that have not ended, oldest first."""
        query = select(DeploymentRow).where(DeploymentRow.status.in_(["deploying", "ready"])).order_by(DeploymentRow.id)
        with self._db.read() as session:
            return session.scalars(query).all()

    def request_stop(self, deployment_id: str) -> DeploymentRow | None:
        """Ask for the end of a deployment."""
        with self._db.write() as session:
            row = session.get(DeploymentRow, deployment_id)
            if row is not None:
                row.desired_state = "stop"
            return row

    def set_status(self, deployment_id: str, status: DeploymentStatus, reason: tuple[str, str] | None = None) -> None:
        """Store what the backend says; an ended deployment stays as it is."""
        with self._db.write() as session:
            row = session.get_one(DeploymentRow, deployment_id)
            if row.status in ("failed", "stopped") or (row.status == status and reason is None):
                return
            row.status = status
            row.reason_code, row.reason_message = reason or (None, None)
            now = time.time()
            if status == "ready" and row.ready_at is None:
                row.ready_at = now
            if status in ("failed", "stopped"):
                row.finished_at = now
