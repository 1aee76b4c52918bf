"""Ranks of a trainer: environment, rendezvous address, and what one rank is told about the others."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import ray


@dataclass(frozen=True)
class RankSetup:
    """Place of one process among the data-parallel ranks."""

    rank: int
    world_size: int
    master_address: str
    """Address and port on the node of rank 0 where the ranks meet, from rank 0's `address()`."""
    master_port: int
    gpu: bool = False
    """NCCL on the one GPU that the process sees, else gloo on CPU."""
    threads: int = 1
    """PyTorch threads of the process."""


def trainer_env(*, gpu: bool, threads: int) -> dict[str, str]:
    """Environment of a trainer actor. DeepSpeed picks its accelerator while it is imported, so it must be set before."""
    return {
        "DS_ACCELERATOR": "cuda" if gpu else "cpu",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def rendezvous() -> tuple[str, int]:
    """Address of this node and a port that is free at the moment."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    with socket.socket() as probe:
        probe.bind((address, 0))
        return address, int(probe.getsockname()[1])
