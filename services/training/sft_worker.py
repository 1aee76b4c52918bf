"""A rank that fine-tunes on examples with one of the objectives. N: flat positions of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from sedsft.data.batching import MicroBatch, labelled_values, sft_micro_batches
from sedsft.head import IGNORED_LABEL, HeadOutput, linear_objective_loss, token_statistics
from sedsft.records import Example
from services.checkpoints import FileRecord
from services.training.messages import InspectedRow, SFTSetup
from services.training.model import LinearHead
from services.training.ranks import rendezvous

if TYPE_CHECKING:
    from services.training.engine import TrainEngine


class SFTWorker:
    """One data-parallel rank. All methods but `address` are collective: call them on every rank of the group.

    Its process needs `ranks.trainer_env`.
    """

    def __init__(self, index: int) -> None:
        self.index = index

    def address(self) -> tuple[str, int]:
        """Address of this node and a free port, for rank 0 to be met at."""
        return rendezvous()

    def setup(self, setup: SFTSetup) -> None:
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

    def token_masses(self, examples: Sequence[Example], top_k: int) -> npt.NDArray[np.float32]:
        """Top-k mass of every trained token of this rank's `examples` under the current weights, in row order."""

        def masses(hidden_NH: torch.Tensor, head: LinearHead, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            statistics = token_statistics(hidden_NH, head.weight_VH, batch.labels_N, top_k=top_k, **head.options)
            assert statistics.topk_mass_N is not None
            return (statistics.topk_mass_N,)

        batches = sft_micro_batches(examples, self._config.micro_batch_size)
        per_row: dict[int, npt.NDArray[np.float32]] = {}
        for batch, (mass_N,) in zip(batches, self._engine.statistics(batches, masses), strict=True):
            per_row.update(zip(batch.rows, labelled_values(batch, mass_N), strict=True))
        return np.concatenate([np.empty(0, np.float32), *(per_row[row] for row in range(len(examples)))])

    def train_step(self, examples: Sequence[Example], denominator: int, tau: float | None, step: int) -> dict[str, float]:
        """One optimizer step, `step` counted from 1. `examples` are this rank's, `denominator` the trained tokens of all ranks.

        Returns sums over this rank's tokens that add up over ranks: `loss`, `ce` and `extra` = loss - ce (none divided by
        the denominator), `entropy`, `target_prob`, `active` (diversity term applied) and
        `tokens`; and `grad_norm` and `learning_rate`, equal on all ranks.

        Raises:
            TrainingDiverged: loss or gradient norm is not finite; raised on all ranks.
        """

        def loss(hidden_NH: torch.Tensor, head: LinearHead, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            output = linear_objective_loss(
                hidden_NH,
                head.weight_VH,
                batch.labels_N,
                self._config.objective,
                tau=tau,
                denominator=denominator,
                **head.options,
            )
            return output.loss, _sums(output, batch.labels_N)

        batches = sft_micro_batches(examples, self._config.micro_batch_size)
        sums = self._engine.backward(batches, MicroBatch.empty(), loss, step)
        grad_norm, rate = self._engine.step(step)
        return {**sums, "extra": sums["loss"] - sums["ce"], "grad_norm": grad_norm, "learning_rate": rate}

    def inspect(self, examples: Sequence[Example], tau: float | None, top_k: int) -> list[InspectedRow]:
        """This rank's `examples` token by token under the current weights.

        `active` is where the objective's diversity term applies with `tau`; nowhere for an objective without one.
        """

        def values(hidden_NH: torch.Tensor, head: LinearHead, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            labels_N = batch.labels_N
            statistics = token_statistics(hidden_NH, head.weight_VH, labels_N, top_k=top_k, **head.options)
            output = linear_objective_loss(
                hidden_NH, head.weight_VH, labels_N, self._config.objective, tau=tau, denominator=1, **head.options
            )
            assert statistics.topk_mass_N is not None
            return statistics.log_prob_N.exp(), statistics.topk_mass_N, output.active_N

        batches = sft_micro_batches(examples, self._config.micro_batch_size)
        inspected: dict[int, InspectedRow] = {}
        for batch, flat in zip(batches, self._engine.statistics(batches, values), strict=True):
            for row, *columns in zip(batch.rows, *(labelled_values(batch, value_N) for value_N in flat), strict=True):
                inspected[row] = _inspected(examples[row], *columns)
        return [inspected[row] for row in range(len(examples))]

    def save(self, folder: Path) -> list[FileRecord]:
        """Write a model folder into `folder`; rank 0 writes and returns the files with their hashes."""
        return self._engine.export_hf(folder)


def _sums(output: HeadOutput, labels_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over the tokens that carry a label; the head leaves zeros elsewhere, which exp would turn into ones."""
    labelled_N = labels_N != IGNORED_LABEL
    return {
        "loss": output.loss_N.sum(),
        "ce": -output.log_prob_N.sum(),
        "entropy": output.entropy_N.sum(),
        "target_prob": output.log_prob_N[labelled_N].exp().sum(),
        "active": output.active_N.sum(),
        "tokens": labelled_N.sum(),
    }


def _inspected(
    example: Example, prob_R: npt.NDArray[np.float32], mass_R: npt.NDArray[np.float32], active_R: npt.NDArray[np.float32]
) -> InspectedRow:
    """Spread values of the R trained tokens over all tokens; the first token is never predicted."""
    positions = np.flatnonzero(example.trained_T[1:]) + 1
    probability: list[float | None] = [None] * len(example.input_ids_T)
    top_k_mass = list(probability)
    active = [False] * len(probability)
    for position, prob, mass, on in zip(positions, prob_R, mass_R, active_R, strict=True):
        probability[position], top_k_mass[position], active[position] = float(prob), float(mass), bool(on)
    return InspectedRow(
        line=example.line,
        input_ids=tuple(int(token) for token in example.input_ids_T),
        trained=tuple(bool(flag) for flag in example.trained_T),
        probability=tuple(probability),
        top_k_mass=tuple(top_k_mass),
        active=tuple(active),
    )
