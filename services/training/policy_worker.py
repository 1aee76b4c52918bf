"""A rank that updates the policy on scored responses. N: flat positions of a micro-batch, R: tokens of one response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sedsft.config import GRPOConfig
from sedsft.data.batching import (
    MicroBatch,
    PolicyMicroBatch,
    labelled_values,
    policy_micro_batches,
    response_micro_batches,
)
from sedsft.head import IGNORED_LABEL, HeadOutput, linear_objective_loss, token_statistics
from sedsft.objectives import PolicyObjective, k3_divergence, truncated_weight
from sedsft.records import PolicyRow
from services.errors import ModelError, TrainingDiverged
from services.training.export import DEFAULT_BUCKET_BYTES
from services.training.messages import PolicySetup, SenderSetup, WeightSender
from services.training.model import LinearHead
from services.training.saving_rank import SavingRank


class PolicyWorker(SavingRank):
    """One data-parallel rank. All methods but `address` are collective: call them on every rank of the group.

    Its process needs `ranks.trainer_env`. Log-probabilities are taken at the sampling temperature throughout.
    """

    _sender: WeightSender | None = None

    def setup(self, setup: PolicySetup) -> None:
        """Join the other ranks and open the model."""
        # Here, because importing DeepSpeed fixes its accelerator, and whoever only names this class needs neither.
        from services.training.engine import EngineSetup, TrainEngine  # noqa: PLC0415

        config = setup.config
        self._config = config
        self._engine = TrainEngine(
            EngineSetup(
                model_path=setup.model_path,
                optimizer=config.optimizer,
                precision=config.precision,
                zero_stage=setup.zero_stage,
                total_steps=setup.total_steps,
                seed=config.seed,
                ranks=setup.ranks,
                longest_row=config.max_prompt_tokens + config.max_tokens if config.pack_tokens is not None else None,
                keep_start=config.kl_weight > 0,
                lora=config.lora,
            )
        )

    def update(self, rows: Sequence[PolicyRow], denominator: int, step: int) -> dict[str, float]:
        """One optimizer step, `step` counted from 1. `rows` are this rank's, `denominator` that of all ranks' losses.

        Rows carry `old_log_probs_R` unless the current weights are those at the start of the iteration, and
        `reference_log_probs_R` where the loss has a divergence.

        Returns sums over this rank's tokens that add up over ranks: `loss` (not divided by the denominator), `entropy`,
        `clipped` (a clip stopped the gradient), `tokens`, `logprob_gap` = |log p(sampler) - log p(trainer)|, with truncated
        importance sampling of p_old, else of the current weights; with it `tis_weight` and `tis_truncated` (the cap held); with
        a divergence `kl`; and `grad_norm` and `learning_rate`, equal on all ranks.

        Raises:
            TrainingDiverged: loss or gradient norm is not finite; raised on all ranks, with the weights unchanged.
        """
        sums = self._backward(rows, denominator)
        grad_norm, rate = self._engine.step(step)
        if not math.isfinite(grad_norm):
            # Rewards and samples belong to the weights that drew them, so the loop has no step to leave out and go on.
            raise TrainingDiverged(
                f"expected a finite loss and gradient at optimizer step {step}, one of them was not on some rank (loss "
                f"{sums['loss']} here) at learning rate {rate:.3g}; lower the learning rate or look at the rewards"
            )
        return {**sums, "grad_norm": grad_norm, "learning_rate": rate}

    def _backward(self, rows: Sequence[PolicyRow], denominator: int) -> dict[str, float]:
        """Gradient of the step, reduced over ranks; this rank's sums."""

        def loss(
            hidden_NH: torch.Tensor, head: LinearHead, batch: PolicyMicroBatch
        ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            objective = policy_objective(self._config, batch)
            output = linear_objective_loss(
                hidden_NH,
                head.weight_VH,
                batch.labels_N,
                objective,
                denominator=denominator,
                **head.at_temperature(self._config.temperature).options,
            )
            return output.loss, _sums(output, objective, batch)

        batches = policy_micro_batches(rows, self._config.micro_batch_size, self._config.pack_tokens)
        return self._engine.backward(batches, PolicyMicroBatch.empty(), loss)

    def log_probs(
        self, sequences: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]], reference: bool = False
    ) -> list[npt.NDArray[np.float32]]:
        """Log-probability of each response token of this rank's (prompt ids, response ids) pairs under the current weights, or
        with `reference`, where the configuration has a divergence, under the starting weights."""

        def values(hidden_NH: torch.Tensor, head: LinearHead, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            options = head.at_temperature(self._config.temperature).options
            return (token_statistics(hidden_NH, head.weight_VH, batch.labels_N, top_k=None, **options).log_prob_N,)

        batches = response_micro_batches(sequences, self._config.micro_batch_size, self._config.pack_tokens)
        with self._engine.at_start() if reference else nullcontext():
            found = self._engine.statistics(batches, values)
        per_row: dict[int, npt.NDArray[np.float32]] = {}
        for batch, (log_prob_N,) in zip(batches, found, strict=True):
            per_row.update(zip(batch.rows, labelled_values(batch, log_prob_N), strict=True))
        return [per_row[row] for row in range(len(sequences))]

    def export_weights(self, folder: Path, bucket_bytes: int = DEFAULT_BUCKET_BYTES) -> None:
        """Write weights and config for the samplers, one file a bucket; rank 0 writes, `folder` is complete when all ranks have
        returned."""
        self._engine.export_weights(folder, bucket_bytes)

    def open_sender(self, setup: SenderSetup) -> None:
        """Make ready to send weights to engines, unless it was done before.

        Raises:
            ModelError: files of this architecture keep other tensors than the model does, so an engine would not know these.
        """
        if self._sender is not None:
            return
        export = self._engine.weight_export(setup.bucket_bytes)
        if not export.as_in_files():
            raise ModelError(
                "expected a model whose files keep its tensors as they are, this architecture splits or renames them; set "
                "rollout.sync.transport to 'files'"
            )
        self._sender = setup.open(self._engine.setup.ranks.rank, export)

    def send_weights(self, targets: Any, version: int) -> None:
        """Send the weights of now to engines, as `version`.

        Raises:
            WeightSendFailed: they did not arrive; what these engines hold now is unknown.
        """
        assert self._sender is not None, "expected open_sender first"
        self._sender.send(targets, version)


def policy_objective(config: GRPOConfig, batch: PolicyMicroBatch) -> PolicyObjective:
    """The loss of a micro-batch. Without truncated importance sampling, the sampler's distribution is p_old."""
    sampler_log_prob_N, truncates = batch.sampler_log_prob_BT.flatten(), config.tis_cap is not None
    reference_BT = batch.reference_log_prob_BT if config.kl_weight > 0 else None
    trainer_N = None if batch.old_log_prob_BT is None else batch.old_log_prob_BT.flatten()
    return PolicyObjective(
        advantage_N=batch.advantage_BT.flatten(),
        old_log_prob_N=trainer_N if truncates else sampler_log_prob_N,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
        sampler_log_prob_N=sampler_log_prob_N if truncates else None,
        tis_cap=config.tis_cap,
        reference_log_prob_N=None if reference_BT is None else reference_BT.flatten(),
        kl_weight=config.kl_weight,
    )


def _sums(output: HeadOutput, objective: PolicyObjective, batch: PolicyMicroBatch) -> dict[str, torch.Tensor]:
    """Sums over the tokens that carry a label."""
    labelled_N = batch.labels_N != IGNORED_LABEL
    log_prob_R = output.log_prob_N[labelled_N]
    sampler_R = batch.sampler_log_prob_BT.flatten()[labelled_N]
    sums = {
        "loss": output.loss_N.sum(),
        "entropy": output.entropy_N.sum(),
        "clipped": (~output.active_N[labelled_N]).sum(),
        "tokens": labelled_N.sum(),
    }
    if objective.tis_cap is None:
        trainer_R = log_prob_R
    else:
        trainer_R = log_prob_R if objective.old_log_prob_N is None else objective.old_log_prob_N[labelled_N]
        weight_R = truncated_weight(trainer_R, sampler_R, objective.tis_cap)
        sums |= {"tis_weight": weight_R.sum(), "tis_truncated": (weight_R == objective.tis_cap).sum()}
    if objective.reference_log_prob_N is not None:
        sums["kl"] = k3_divergence(log_prob_R, objective.reference_log_prob_N[labelled_N]).sum()
    return sums | {"logprob_gap": (trainer_R - sampler_R).abs().sum()}
