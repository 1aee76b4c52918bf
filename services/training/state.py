"""State of one trainer rank as named tensors: fp32 masters, moments and step counts of AdamW, and random generators.

Everything fits into one safetensors file per rank, so that reading it back never unpickles.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch

from services.errors import CheckpointInvalid

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def masters_of(wrapper: Any) -> list[torch.Tensor]:
    """The tensors that AdamW updates on this rank, in a fixed order, whatever DeepSpeed wrapped around it.

    ZeRO 3: flat partitions of sub-groups. ZeRO 1 and 2: one flat partition per parameter group, kept under another name by
    the bf16 optimizer of stage 1. No ZeRO: fp32 copies of bf16 parameters, or the parameters themselves.
    """
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(wrapper, name):
            return list(getattr(wrapper, name))
    if hasattr(wrapper, "fp32_groups"):
        return [master for group in wrapper.fp32_groups for master in group]
    return [parameter for group in wrapper.param_groups for parameter in group["params"]]


@torch.no_grad()
def refresh_weights(wrapper: Any) -> None:
    """Make the model's weights on all ranks what the masters say. Collective under ZeRO."""
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        wrapper._partition_all_parameters()
        for index in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(index)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif hasattr(wrapper, "update_lp_params"):
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_groups"):
        for masters, parameters in zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.copy_(master)


def optimizer_tensors(wrapper: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies on CPU: `master.<i>`, and after the first step `exp_avg.<i>`, `exp_avg_sq.<i>` and `step.<i>`."""
    tensors = {}
    for index, master in enumerate(masters_of(wrapper)):
        tensors[f"master.{index}"] = master
        for name, value in optimizer.state.get(master, {}).items():
            tensors[f"{name}.{index}"] = value
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def load_optimizer_tensors(wrapper: Any, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`; call `refresh_weights` afterwards.

    Raises:
        CheckpointInvalid: the tensors are not those of this model and partition.
    """
    masters = masters_of(wrapper)
    expected = {f"master.{index}": master.shape for index, master in enumerate(masters)}
    found = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("master.")}
    if expected != found:
        differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointInvalid(
            f"expected the trainer state of this model and ZeRO stage, {len(differing)} of {len(expected)} partitions differ, "
            f"first {differing[0]}: expected {expected.get(differing[0])}, got {found.get(differing[0])}; use the checkpoint "
            "of the same setting"
        )
    for index, master in enumerate(masters):
        master.copy_(tensors[f"master.{index}"])
        optimizer.state.pop(master, None)
        for name in _MOMENTS:
            if (value := tensors.get(f"{name}.{index}")) is not None:
                optimizer.state[master][name] = value.to(master.device, copy=True)


def random_tensors() -> dict[str, torch.Tensor]:
    """States of the random generators of this process: torch on CPU and the GPU, Python and NumPy."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    host = json.dumps(
        {"python": [version, list(words), gauss], "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, cached]}
    )
    tensors = {"rng.torch": torch.get_rng_state(), "rng.host": torch.frombuffer(bytearray(host.encode()), dtype=torch.uint8)}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    return tensors


def load_random_tensors(tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `random_tensors`."""
    torch.set_rng_state(tensors["rng.torch"])
    if torch.cuda.is_available() and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    host = json.loads(tensors["rng.host"].numpy().tobytes())
    version, words, gauss = host["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = host["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
