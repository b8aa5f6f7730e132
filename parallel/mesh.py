"""The process group and every device mesh of a run, owned by one object."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

RENDEZVOUS_TIMEOUT = timedelta(minutes=30)  # rank 0 may be preparing the corpus meanwhile


@dataclass(frozen=True)
class Mesh:
    """This process's place among all, and the meshes by purpose.

    Ranks are numbered with pipeline as the slowest axis, then replicate, shard, context, and tensor as the fastest: what
    talks most stands on one node.
    """

    device: torch.device
    rank: int
    world_size: int
    data_rank: int
    """Number of this process's rows among those of all data-parallel processes; the other axes share rows."""
    data_size: int
    """Replicate x shard."""
    parameters: DeviceMesh
    """(replicate, shard x context), or the second alone: parameters are copied along the first and sharded along the second
    (FSDP2)."""
    tensor: DeviceMesh
    pipeline: DeviceMesh
    context_group: ProcessGroup | None
    context_rank: int
    context_size: int
    stage_group: ProcessGroup | None
    """Processes that hold the same layers: all but the pipeline's other stages."""
    sum_group: ProcessGroup | None
    """Processes whose losses and token counts add up: all that hold another part of the batch, and the pipeline's others."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def gradient_size(self) -> int:
        """Processes over which gradients are summed."""
        return self.parameters.size()

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all parts of the global batch, in place; stages of a pipeline count as parts."""
        if self.sum_group is not None and self.sum_group.size() > 1:
            dist.all_reduce(value, group=self.sum_group)
        return value

    def largest_of_stage(self, value: torch.Tensor) -> torch.Tensor:
        """The maximum over all processes that hold the same layers, in place."""
        if self.stage_group is not None and self.stage_group.size() > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX, self.stage_group)
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


def start(
    requested_device: str,
    timeout: timedelta = RENDEZVOUS_TIMEOUT,
    *,
    pipeline: int = 1,
    replicate: int = 1,
    shard: int = 1,
    context: int = 1,
    tensor: int = 1,
) -> Mesh:
    """Join the process group (of one process without torchrun) and build the meshes; degrees must fit the world size.

    `timeout` is that of meeting the others, at least RENDEZVOUS_TIMEOUT, and of every exchange.
    """
    device = choose_device(requested_device)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"  # gloo beside nccl: checkpoints exchange their plans without touching the GPU
    if "RANK" in os.environ:
        dist.init_process_group(
            backend, timeout=max(timeout, RENDEZVOUS_TIMEOUT), device_id=device if device.type == "cuda" else None
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return build(device, pipeline, replicate, shard, context, tensor)


def build(device: torch.device, pipeline: int, replicate: int, shard: int, context: int, tensor: int) -> Mesh:
    """All meshes over the processes of the process group; collective."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    # FSDP and tensor parallelism share parameters, so their meshes must be parts of one.
    whole = init_device_mesh(
        device.type,
        (pipeline, replicate, shard * context, tensor),
        mesh_dim_names=("pipeline", "replicate", "shard", "tensor"),
    )
    grid = torch.arange(world_size).view(pipeline, replicate, shard, context, tensor)
    place = (grid == rank).nonzero()[0].tolist()
    return Mesh(
        device,
        rank,
        world_size,
        data_rank=place[1] * shard + place[2],
        data_size=replicate * shard,
        # Of one axis where nothing is copied: FSDP would sum gradients once more, over one process.
        parameters=whole["shard"] if replicate == 1 else whole["replicate", "shard"],
        tensor=whole["tensor"],
        pipeline=whole["pipeline"],
        context_group=_group_along(grid, (3,), rank) if context > 1 else None,
        context_rank=place[3],
        context_size=context,
        stage_group=_group_along(grid, (1, 2, 3, 4), rank) if pipeline > 1 else dist.group.WORLD,
        sum_group=_group_along(grid, (0, 1, 2, 3), rank) if tensor > 1 else dist.group.WORLD,
    )


def _group_along(grid: torch.Tensor, axes: tuple[int, ...], rank: int) -> ProcessGroup:
    """The process group of this rank's peers along some axes of the grid of ranks; every process makes all such groups."""
    others = [axis for axis in range(grid.ndim) if axis not in axes]
    rows = grid.permute(*others, *axes).reshape(-1, math.prod(grid.shape[axis] for axis in axes))
    mine = None
    for row in rows.tolist():
        group = dist.new_group(row)
        if rank in row:
            mine = group
    assert mine is not None
    return mine
