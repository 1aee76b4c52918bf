"""A rank that fine-tunes on examples with one of the objectives. N: flat positions of a micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from sedsft.config import SEDObjective
from sedsft.data.batching import MicroBatch, labelled_values, packed_micro_batches, sft_micro_batches
from sedsft.exploration import MassSketch
from sedsft.head import IGNORED_LABEL, HeadOutput, linear_objective_loss, token_statistics
from sedsft.records import Example
from services.training.messages import InspectedRow, SFTSetup
from services.training.model import LinearHead
from services.training.saving_rank import SavingRank


class SFTWorker(SavingRank):
    """One data-parallel rank. All methods but `address` are collective: call them on every rank of the group.

    Its process needs `ranks.trainer_env`.
    """

    def setup(self, setup: SFTSetup) -> None:
        """Join the other ranks and open the model."""
        # Here, because importing DeepSpeed fixes its accelerator, and whoever only names this class needs neither.
        from services.training.engine import EngineSetup, TrainEngine  # noqa: PLC0415

        self._setup, config = setup, setup.config
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
                gradient_checkpointing=config.gradient_checkpointing,
                lora=config.lora,
                longest_row=config.max_length if config.pack_tokens is not None else None,
            )
        )

    def restart(self) -> None:
        """Go back to the starting model and the state that `setup` left."""
        self._engine.close()
        self.setup(self._setup)

    def mass_sketch(self, examples: Sequence[Example], top_k: int) -> MassSketch:
        """Top-k masses of the trained tokens of this rank's `examples` under the current weights; adds up over ranks."""

        def masses(hidden_NH: torch.Tensor, head: LinearHead, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            statistics = token_statistics(hidden_NH, head.weight_VH, batch.labels_N, top_k=top_k, **head.options)
            assert statistics.topk_mass_N is not None
            return (statistics.topk_mass_N[batch.labels_N != IGNORED_LABEL],)

        sketch = MassSketch.empty()
        for (mass_R,) in self._engine.statistics(self._batches(examples), masses):
            sketch += MassSketch.of(mass_R.numpy())
        return sketch

    def train_step(
        self, examples: Sequence[Example], denominator: int, tau: float | None, step: int
    ) -> tuple[dict[str, float], MassSketch | None]:
        """One optimizer step, `step` counted from 1. `examples` are this rank's, `denominator` the trained tokens of all ranks.

        Returns sums over this rank's tokens that add up over ranks: `loss`, `ce` and `extra` = loss - ce (none divided by the
        denominator), `entropy`, `target_prob`, `active` (diversity term applied) and `tokens`; and `grad_norm` and
        `learning_rate`, equal on all ranks. Second, where tau follows the model, the top-k masses of this rank's tokens.

        A `grad_norm` of NaN says that a loss or a gradient was not finite on some rank and that the step was skipped on all of
        them: the weights and all that moves them are unchanged, and there are no masses.
        """
        objective = self._config.objective
        follows = isinstance(objective, SEDObjective) and objective.mask and objective.tau_mode == "running"
        masses: list[torch.Tensor] = []

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
            if follows:
                assert output.topk_mass_N is not None
                masses.append(output.topk_mass_N[batch.labels_N != IGNORED_LABEL])
            return output.loss, _sums(output, batch.labels_N)

        batches = self._batches(examples)
        sums = self._engine.backward(batches, MicroBatch.empty(), loss)
        grad_norm, rate = self._engine.step(step)
        follows = follows and math.isfinite(grad_norm)
        figures = {**sums, "extra": sums["loss"] - sums["ce"], "grad_norm": grad_norm, "learning_rate": rate}
        return figures, MassSketch.of(torch.cat(masses).cpu().numpy()) if follows else None

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

        batches = self._batches(examples)
        inspected: dict[int, InspectedRow] = {}
        for batch, flat in zip(batches, self._engine.statistics(batches, values), strict=True):
            for row, *columns in zip(batch.rows, *(labelled_values(batch, value_N) for value_N in flat), strict=True):
                inspected[row] = _inspected(examples[row], *columns)
        return [inspected[row] for row in range(len(examples))]

    def evaluate(self, examples: Sequence[Example], tau: float | None) -> dict[str, float]:
        """Sums of `ce`, `entropy`, `active` and `tokens` over this rank's `examples`, without dropout; they add up."""

        def values(hidden_NH: torch.Tensor, head: LinearHead, batch: MicroBatch) -> tuple[torch.Tensor, ...]:
            output = linear_objective_loss(
                hidden_NH, head.weight_VH, batch.labels_N, self._config.objective, tau=tau, denominator=1, **head.options
            )
            return -output.log_prob_N, output.entropy_N, output.active_N, batch.labels_N != IGNORED_LABEL

        totals = np.zeros(4)
        for flat in self._engine.statistics(self._batches(examples), values):
            totals += [float(value_N.double().sum()) for value_N in flat]
        return dict(zip(("ce", "entropy", "active", "tokens"), map(float, totals), strict=True))

    def _batches(self, examples: Sequence[Example]) -> list[MicroBatch]:
        if self._config.pack_tokens is not None:
            return packed_micro_batches(examples, self._config.pack_tokens)
        return sft_micro_batches(examples, self._config.micro_batch_size)


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
