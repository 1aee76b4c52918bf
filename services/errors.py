"""Errors of a job. Each names a stable cause code and says what was expected, what came and what to do.

They cross process boundaries, so each rebuilds itself from its constructor arguments when unpickled.
"""

from __future__ import annotations

from typing import Any


class JobError(Exception):
    """A job cannot go on. `code` ends up in the job's `status_reason`, the message in its detail."""

    code = "internal"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message,)


class DataError(JobError):
    """Rows that cannot be trained on or sampled from."""

    code = "data_invalid"


class ModelError(JobError):
    """A model folder that cannot be opened, or a tokenizer without chat template or pad token."""

    code = "model_invalid"


class ResourceError(JobError):
    """The cluster does not have what the job asks for."""

    code = "resources_unavailable"


class WorkerDied(JobError):
    """An actor process ended while the job needed it."""

    code = "worker_died"


class NoneLeft(WorkerDied):
    """Those that died were started again as often as they may be, so starting the stage again would not help."""


class GateFailed(JobError):
    """No candidate of a readiness gate reaches its thresholds."""

    code = "gate_failed"


class TrainingDiverged(JobError):
    """The loss or the gradient norm is not a finite number."""

    code = "diverged"


class WeightSyncMismatch(JobError):
    """After a weight sync, sampler and trainer disagree about the same tokens."""

    code = "weight_sync_mismatch"


class WeightSendFailed(JobError):
    """Weights that trainers sent did not reach the engines; what those hold now is unknown."""

    code = "weight_send_failed"


class RewardFailure(JobError):
    """Too many samples could not be scored."""

    code = "reward_errors"


class StaleSamples(JobError):
    """Samples drawn with weights older than the overlap of sampling and training allows, or newer than the trainer's."""

    code = "stale_samples"


class GroupsLost(JobError):
    """Rollout groups that were asked for are neither used nor dropped nor under way."""

    code = "groups_lost"


class CheckpointInvalid(JobError):
    """A checkpoint without a manifest, or with files that do not match it."""

    code = "checkpoint_invalid"


class RecordingInvalid(JobError):
    """Recorded rollouts that are missing, damaged, or those of another run."""

    code = "recording_invalid"


class PhaseTimeout(JobError):
    """A phase did not end within its deadline."""

    code = "phase_timeout"
