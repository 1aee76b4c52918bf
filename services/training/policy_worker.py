"""A rank that updates the policy on scored responses. N: flat positions of a micro-batch, R: tokens of one response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from sedsft.data.batching import (
    MicroBatch,
    PolicyMicroBatch,
    labelled_values,
    policy_micro_batches,
    response_micro_batches,
)
from sedsft.head import IGNORED_LABEL, HeadOutput, linear_objective_loss, token_statistics
from sedsft.objectives import PolicyObjective
from sedsft.records import PolicyRow
from services.checkpoints import FileRecord
from services.errors import TrainingDiverged
from services.training.messages import PolicySetup
from services.training.model import LinearHead
from services.training.ranks import rendezvous

if TYPE_CHECKING:
    from services.training.engine import TrainEngine


class PolicyWorker:
    """One data-parallel rank. All methods but `address` are collective: call them on every rank of the group.

    Its process needs `ranks.trainer_env`. Log-probabilities are taken at the sampling temperature throughout.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def address(self) -> tuple[str, int]:
        """Address of this node and a free port, for rank 0 to be met at."""
        return rendezvous()

    def setup(self, setup: PolicySetup) -> None:
        """Join the other ranks and open the model."""
        # Here, because importing DeepSpeed fixes its accelerator, and whoever only names this class needs neither.
        from services.training.engine import EngineSetup, TrainEngine  # noqa: PLC0415

        config = setup.config
        self._config = config
        self._engine: TrainEngine = TrainEngine(
            EngineSetup(
                model_path=setup.model_path,
                optimizer=config.optimizer,
                precision=config.precision,
                zero_stage=setup.zero_stage,
                total_steps=setup.total_steps,
                seed=config.seed,
                ranks=setup.ranks,
            )
        )

    def update(self, rows: Sequence[PolicyRow], denominator: int, step: int) -> dict[str, float]:
        """One optimizer step, `step` counted from 1. `rows` are this rank's, `denominator` the response tokens of all ranks.

        Returns sums over this rank's tokens that add up over ranks: `loss` (not divided by the denominator), `entropy`,
        `clipped` (the clip stopped the gradient), `logprob_gap` = |log p(sampler) - log p(trainer)| and `tokens`;
        and `grad_norm` and `learning_rate`, equal on all ranks.

        Raises:
            TrainingDiverged: loss or gradient norm is not finite; raised on all ranks, with the weights unchanged.
        """

        def loss(
            hidden_NH: torch.Tensor, head: LinearHead, batch: PolicyMicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            old_log_prob_N = batch.old_log_prob_BT.flatten()
            objective = PolicyObjective(
                batch.advantage_BT.flatten(), old_log_prob_N, self._config.clip_low, self._config.clip_high
            )
            output = linear_objective_loss(
                hidden_NH,
                head.weight_VH,
                batch.labels_N,
                objective,
                denominator=denominator,
                **head.at_temperature(self._config.temperature).options,
            )
            return output.loss, _sums(output, old_log_prob_N, batch.labels_N)

        batches = policy_micro_batches(rows, self._config.micro_batch_size)
        sums = self._engine.backward(batches, PolicyMicroBatch.empty(), loss)
        grad_norm, rate = self._engine.step(step)
        if not math.isfinite(grad_norm):
            # Rewards and samples belong to the weights that drew them, so the loop has no step to leave out and go on.
            raise TrainingDiverged(
                f"expected a finite loss and gradient at optimizer step {step}, one of them was not on some rank (loss "
                f"{sums['loss']} here) at learning rate {rate:.3g}; lower the learning rate or look at the rewards"
            )
        return {**sums, "grad_norm": grad_norm, "learning_rate": rate}

    def log_probs(self, sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]]) -> list[npt.NDArray[np.float32]]:
        """Log-probability of each response token of this rank's (prompt ids, response ids) pairs under the current weights."""

        def values(hidden_NH: torch.Tensor, head: LinearHead, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            options = head.at_temperature(self._config.temperature).options
            return (token_statistics(hidden_NH, head.weight_VH, batch.labels_N, top_k=None, **options).log_prob_N,)

        batches = response_micro_batches(sequences, self._config.micro_batch_size)
        per_row: dict[int, npt.NDArray[np.float32]] = {}
        for batch, (log_prob_N,) in zip(batches, self._engine.statistics(batches, values), strict=True):
            per_row.update(zip(batch.rows, labelled_values(batch, log_prob_N), strict=True))
        return [per_row[row] for row in range(len(sequences))]

    def export_weights(self, folder: Path) -> None:
        """Write weights and config for the samplers; rank 0 writes, `folder` is complete when all ranks have returned."""
        self._engine.export_weights(folder)

    def save(self, folder: Path) -> list[FileRecord]:
        """Write a model folder into `folder`; rank 0 writes and returns the files with their hashes."""
        return self._engine.export_hf(folder)


def _sums(output: HeadOutput, old_log_prob_N: torch.Tensor, labels_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the tokens that carry a label."""
    labelled_N = labels_N != IGNORED_LABEL
    difference_R = (output.log_prob_N - old_log_prob_N)[labelled_N]
    return {
        "loss": output.loss_N.sum(),
        "entropy": output.entropy_N.sum(),
        "clipped": (~output.active_N[labelled_N]).sum(),
        "logprob_gap": difference_R.abs().sum(),
        "tokens": labelled_N.sum(),
    }
