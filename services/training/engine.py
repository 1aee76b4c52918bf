"""One rank of a data-parallel trainer on DeepSpeed ZeRO 0-3. The only file that imports deepspeed.

The loss of an optimizer step is a sum over tokens divided by a denominator that the caller counted over all ranks and
micro-batches. DeepSpeed averages over ranks and accumulation steps; both averages are undone here, so the gradient does
not depend on how rows are split. Every rank runs the same number of passes per step: who has fewer batches adds empty ones.

Shape suffixes: B rows, T positions, N = B * T flat positions, H hidden width, V vocabulary.
"""

from __future__ import annotations

import gc
import math
import os
import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from sedsft.config import AdamWConfig, LoRAConfig, Precision
from sedsft.data.batching import MicroBatch
from sedsft.data.chat import load_tokenizer
from services.buckets import fill_buckets
from services.checkpoints import FileRecord, is_state_file, on_disk, state_file
from services.errors import CheckpointInvalid
from services.training.adapters import ADAPTER_FOLDER, add_adapters, merged_state, save_adapters
from services.training.attention import prepare_packing, row_options
from services.training.export import WeightExport
from services.training.host_memory import release_free_memory
from services.training.model import LinearHead, linear_head, open_model
from services.training.ranks import RankSetup
from services.training.schedule import learning_rate
from services.training.starting_weights import StartingWeights
from services.training.state import (
    load_optimizer_tensors,
    load_random_tensors,
    optimizer_tensors,
    random_tensors,
    refresh_weights,
)

COLLECTIVE_TIMEOUT_S = 1800
_BUCKET_ELEMENTS = {"cuda": 50_000_000, "cpu": 5_000_000}
"""Gradient elements that are reduced at once, which takes a copy of them in fp32."""
_GROUP_ELEMENTS = 2**25
"""Elements of a parameter group."""

BatchT = TypeVar("BatchT", bound=MicroBatch)


@dataclass(frozen=True)
class EngineSetup:
    """What a rank opens and how it optimises."""

    model_path: str
    optimizer: AdamWConfig
    precision: Precision
    zero_stage: int
    total_steps: int
    seed: int
    ranks: RankSetup
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    lora: LoRAConfig | None = None
    """Train adapters and leave the model's own weights as they are."""
    longest_row: int | None = None
    """Tokens of the longest row where rows are packed."""
    keep_start: bool = False
    """Keep a copy of the starting weights for `at_start`."""


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of the state behind an optimizer step, as copies on CPU that training does not touch."""

    weights: dict[str, torch.Tensor]
    """All weights on rank 0, nothing elsewhere."""
    trainer: dict[str, torch.Tensor]
    """`TrainEngine.state_tensors`."""


LossHead = Callable[[torch.Tensor, LinearHead, BatchT], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""(hidden_NH, head, batch) -> differentiable loss, already divided by the denominator, and named sums over its tokens."""

StatisticsHead = Callable[[torch.Tensor, LinearHead, MicroBatch], tuple[torch.Tensor, ...]]
"""(hidden_NH, head, batch) -> tensors of shape [N]."""


class HeadedModel(nn.Module):
    """A causal language model whose forward ends in a function of hidden states and head weight, not in logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        # ZeRO-3 gathers a parameter where its own module runs; the head weight is used here instead.
        for parameter in model.get_output_embeddings().parameters():
            deepspeed.zero.register_external_parameter(self, parameter)

    def forward(self, batch: MicroBatch, head: Callable[..., Any]) -> Any:
        """Backbone, then `head(hidden_NH, LinearHead, batch)`."""
        hidden_BTH = self.model.base_model(**batch.inputs, **row_options(self.model, batch)).last_hidden_state
        return head(hidden_BTH.flatten(0, 1), linear_head(self.model), batch)


class TrainEngine:
    """Model, optimizer and process group of one rank. All public methods are collective unless they say otherwise."""

    def __init__(self, setup: EngineSetup) -> None:
        self.setup = setup
        torch.set_num_threads(setup.ranks.threads)
        seed = setup.seed + setup.ranks.rank
        torch.manual_seed(seed)
        # Models may draw from these too, and their state is saved: two runs of one spec must start alike.
        random.seed(seed)
        np.random.seed(seed % 2**32)
        _join(setup.ranks)
        self.device = torch.device("cuda", 0) if setup.ranks.gpu else torch.device("cpu")
        model = open_model(setup.model_path, torch.bfloat16 if setup.precision == "bf16" else torch.float32)
        if setup.longest_row is not None:
            prepare_packing(model, setup.longest_row)
        if setup.lora is not None:
            add_adapters(model, setup.lora, setup.seed)
        if setup.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = HeadedModel(model)
        self._optimizer = _adamw(module, setup.optimizer)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=self._optimizer, config=_deepspeed_config(setup, model), dist_init_required=False
        )
        self._model = model
        self._tokenizer = load_tokenizer(setup.model_path)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        if setup.zero_stage == 0:
            # DeepSpeed's bf16 optimizer without ZeRO takes a step when it is built, which would count as the first, and
            # leaves sums of gradients in bf16.
            self._optimizer.state.clear()
            for parameter in self._parameters:
                parameter.grad_dtype = torch.float32
        self._start = StartingWeights(self._engine.optimizer) if setup.keep_start else None

    def backward(self, batches: Sequence[BatchT], empty: BatchT, loss_head: LossHead[BatchT]) -> dict[str, float]:
        """Accumulate the gradient of this rank's `batches` (any number, also none) and reduce it over ranks.

        Returns this rank's totals of the sums that `loss_head` named. A loss that is not finite makes the whole gradient NaN,
        so that `step` skips it on all ranks.
        """
        self._engine.train()
        padded = self._even_out(batches, empty)
        sums: dict[str, torch.Tensor] = {}
        for index, batch in enumerate(padded):
            self._engine.set_gradient_accumulation_boundary(index == len(padded) - 1)
            loss, named = self._engine(batch.to(self.device), loss_head)
            # DeepSpeed divides the sum over ranks by their number.
            factor = torch.where(loss.isfinite(), self.setup.ranks.world_size, math.nan)
            self._engine.backward(loss * factor, scale_wrt_gas=False)
            for name, value in named.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
            if self.device.type == "cpu":
                release_free_memory()
        return {name: float(value) for name, value in sums.items()}

    def step(self, step: int) -> tuple[float, float]:
        """Clip and update with the rate of optimizer step `step` (from 1). Returns (gradient norm before clipping, rate).

        A norm of NaN, on all ranks, says that the gradient was not finite: it is gone, and weights, masters, moments and step
        counts are bit for bit what they were.
        """
        rate = learning_rate(self.setup.optimizer, step, self.setup.total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self.setup.zero_stage == 0:
            norm = self._plain_norm()
            if math.isfinite(norm):
                self._engine.step()
            else:
                for parameter in self._parameters:
                    parameter.grad = None
        else:
            # Changes nothing but to drop the gradient where its norm is not finite.
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
        if self.device.type == "cpu":
            release_free_memory()
        return (norm if math.isfinite(norm) and norm >= 0 else math.nan), rate

    def statistics(self, batches: Sequence[MicroBatch], head: StatisticsHead) -> list[tuple[torch.Tensor, ...]]:
        """`head`'s tensors for each of this rank's `batches`, on CPU, without gradients and dropout."""
        self._engine.eval()
        results = []
        with torch.no_grad():
            for batch in self._even_out(batches, MicroBatch.empty()):
                values = self._engine.module(batch.to(self.device), head)
                results.append(tuple(value.cpu() for value in values))
        return results[: len(batches)]

    def at_start(self) -> AbstractContextManager[None]:
        """Within it the model has the weights of `setup.model_path`, whatever was trained or loaded since."""
        assert self._start is not None, "expected keep_start in the engine's setup"
        return self._start.loaded()

    def snapshot(self) -> Snapshot:
        """What `write` needs, copied: the weights are gathered here, so that no later step waits for a writer."""
        return Snapshot(self._full_state(), self.state_tensors())

    def write(self, snapshot: Snapshot, folder: Path) -> list[FileRecord]:
        """Write this rank's part of a checkpoint: by rank 0 the model folder, and trainer/rank-<i>.safetensors below it.

        Returns the files with their hashes once they are on disk. Not collective; may run in a thread beside training.
        """
        rank = self.setup.ranks.rank
        name = state_file(rank)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(snapshot.trainer, folder / name)
        return [*(self._write_model(folder, snapshot.weights) if rank == 0 else []), on_disk(folder, name)]

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """This rank's optimizer state and random generators, as copies on CPU. Not collective."""
        return optimizer_tensors(self._engine.optimizer, self._optimizer) | random_tensors()

    def load_state_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go back to where `state_tensors` was taken on this rank; the weights are then bit for bit what they were.

        Raises:
            CheckpointInvalid: the tensors are those of another model, ZeRO stage or number of ranks.
        """
        load_optimizer_tensors(self._engine.optimizer, self._optimizer, tensors)
        refresh_weights(self._engine.optimizer)
        load_random_tensors(tensors)

    def load_state(self, folder: Path) -> None:
        """Go back to the snapshot that `write` wrote into `folder`, a verified checkpoint.

        Raises:
            CheckpointInvalid: it holds no state for this rank, or that of another setting.
        """
        path = folder / state_file(self.setup.ranks.rank)
        if not path.is_file():
            raise CheckpointInvalid(f"expected the trainer state {path}, it is missing; use a checkpoint of a training run")
        self.load_state_tensors(load_file(path))

    def weight_export(self, bucket_bytes: int) -> WeightExport:
        """The weights as they change, adapters merged, so many bytes of parameters gathered at a time. Not collective."""
        return WeightExport(self._model, self._whole, bucket_bytes)

    def export_weights(self, folder: Path, bucket_bytes: int) -> None:
        """Write weights and config only, for samplers that already have the tokenizer. Rank 0 writes."""
        export = self.weight_export(bucket_bytes)
        if export.as_in_files():
            export.write(folder, here=self.setup.ranks.rank == 0)
        else:
            weights = self._full_state()
            if self.setup.ranks.rank == 0:
                self._save_weights(folder, weights)
        dist.barrier()

    def _whole(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
        """Within it, `parameters` are whole on every rank. Collective under ZeRO-3."""
        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            list(parameters), enabled=self.setup.zero_stage == 3
        )
        return gathered

    def close(self) -> None:
        """Free the model and everything DeepSpeed made of it; the engine cannot be used any more. Not collective."""
        self._engine.destroy()
        del self._engine, self._model, self._optimizer, self._parameters, self._start
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _write_model(self, folder: Path, weights: dict[str, torch.Tensor]) -> list[FileRecord]:
        """The model folder alone, without the training state that other ranks write below it at the same time."""
        if self.setup.lora is not None:
            save_adapters(self._model, weights, folder / ADAPTER_FOLDER)
        self._save_weights(folder, weights)
        self._tokenizer.save_pretrained(folder)
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        return [on_disk(folder, name) for name in names if not is_state_file(name)]

    def _save_weights(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Weights and config of the plain model that `weights`, with their adapters, make."""
        state = weights if self.setup.lora is None else merged_state(self._model, weights)
        folder.mkdir(parents=True, exist_ok=True)
        self._model.save_pretrained(folder, state_dict=state)

    def _full_state(self) -> dict[str, torch.Tensor]:
        """Copies of all weights on the CPU of rank 0, nothing elsewhere; under ZeRO-3 one parameter is gathered at a time.

        A weight that modules share comes once, under the first of its names.
        """
        state = {}
        for name, parameter in self._model.named_parameters():
            with self._whole([parameter]):
                if self.setup.ranks.rank == 0:
                    state[name] = parameter.detach().to("cpu", copy=True)
        if self.setup.ranks.rank == 0:
            saved = self._model.state_dict().keys()
            state |= {name: b.to("cpu", copy=True) for name, b in self._model.named_buffers() if name in saved}
        return state

    def _even_out(self, batches: Sequence[BatchT], empty: BatchT) -> list[BatchT]:
        """`batches`, followed by empty ones up to the largest count of any rank and at least one."""
        count = torch.tensor(max(1, len(batches)), device=self.device)
        dist.all_reduce(count, op=dist.ReduceOp.MAX)
        return [*batches, *[empty] * (int(count) - len(batches))]

    def _plain_norm(self) -> float:
        """Norm of the reduced gradient where every rank holds all of it."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))


def _adamw(module: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases and norms, which have one dimension, get none.

    The rate is set before every step. Groups are small because DeepSpeed steps group by group, each on a copy of its gradient.
    """
    groups: list[dict[str, Any]] = []
    for decayed in (True, False):
        parameters = [p for p in module.parameters() if p.requires_grad and (p.ndim > 1) == decayed]
        weight_decay = config.weight_decay if decayed else 0.0
        parts = fill_buckets([parameter.numel() for parameter in parameters], _GROUP_ELEMENTS)
        groups += [{"params": parameters[part.start : part.stop], "weight_decay": weight_decay} for part in parts]
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, fused=True)


def _deepspeed_config(setup: EngineSetup, model: PreTrainedModel) -> dict[str, Any]:
    """DeepSpeed's settings. Accumulation is driven by hand, hence its count of 1."""
    bf16 = setup.precision == "bf16"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": setup.optimizer.grad_clip,
        "steps_per_print": 1_000_000_000,
        "communication_data_type": "fp32",
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": setup.zero_stage,
            "overlap_comm": setup.ranks.gpu,
            "reduce_bucket_size": min(
                _BUCKET_ELEMENTS["cuda" if setup.ranks.gpu else "cpu"],
                sum(p.numel() for p in model.parameters() if p.requires_grad),
            ),
            # Below this size gathering costs more than keeping: norms and biases stay whole.
            "stage3_param_persistence_threshold": 10 * model.config.get_text_config().hidden_size,
        },
    }
    if bf16 and setup.zero_stage > 0:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _join(ranks: RankSetup) -> None:
    """Meet the other ranks; once per process."""
    if dist.is_initialized():
        return
    # DeepSpeed reads the local rank from the environment alone; a process sees at most one GPU, hence 0.
    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        LOCAL_RANK="0",
        MASTER_ADDR=ranks.master_address,
        MASTER_PORT=str(ranks.master_port),
    )
    deepspeed_logger.setLevel("WARNING")
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Only DeepSpeed's tensor-parallel inference uses this operator; without it no compiler is needed at run time.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if ranks.gpu else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        init_method=f"tcp://{ranks.master_address}:{ranks.master_port}",
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
