"""The process group and every device mesh of a run, owned by one object."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # rank 0 may be preparing the corpus meanwhile


@dataclass(frozen=True)
class Mesh:
    """This process's place among all, and the meshes by purpose."""

    device: torch.device
    rank: int
    world_size: int
    data: DeviceMesh
    """(replicate, shard): parameters are copied along the first axis and sharded along the second; both see other rows."""

    @property
    def data_rank(self) -> int:
        return self.rank

    @property
    def data_size(self) -> int:
        return self.world_size

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all data-parallel ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def gather_objects(self, value) -> list:
        """Every rank's picklable value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def broadcast_object(self, value):
        """Rank 0's picklable value, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def choose_device(requested: str) -> torch.device:
    """The device of this process, its own GPU by its rank on this node.

    Raises:
        ValueError: a GPU is asked for where there is none, or there are fewer than processes.
    """
    available = torch.cuda.device_count()
    if requested == "cpu" or (requested == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ValueError(
            'run.device = "cuda", but PyTorch sees no CUDA GPU here: use "auto" or "cpu", or install a CUDA build'
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > available:
        raise ValueError(f"{processes} processes on this node, but PyTorch sees {available} GPUs: start one per GPU")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start(requested_device: str, replicate: int, shard: int) -> Mesh:
    """Join the process group (of one process without torchrun) and build the meshes; degrees must fit the world size."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(requested_device)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo beside nccl: checkpoints exchange their plans without touching the GPU
    if "RANK" in os.environ:
        dist.init_process_group(
            backend, timeout=RENDEZVOUS_TIMEOUT, device_id=device if device.type == "cuda" else None
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    data = init_device_mesh(device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
    return Mesh(device, rank, world_size, data)
