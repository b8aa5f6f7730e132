"""Which process makes the others wait.

Every step ends in exchanges, so all processes have the same step time, and a slow one shows only in what it does itself.
Measured here as a process's own work per step: the time it stood waiting for its data, mean over the steps since the
last log, plus the time of its blocks' forward in the step that is logged. FSDP gathers a block's weights before the
measured stretch, so waiting for others is not in it. On the host that is a clock before and after each block; on a GPU
two CUDA events, read when the step's figures are read from the device anyway. Steps that are not logged pay one
attribute test per block.

What it does not see: a process slow in its backward or optimizer alone (a slow device or crowded host is slow in its
forward as well), and which one is slow in a tensor- or context-parallel group, whose exchanges lie inside the blocks: all
of them look slow. Stages of a pipeline with unequal numbers of blocks are compared by the time per block.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from models.llama import Llama
from parallel.mesh import Mesh

LOGS_IN_A_ROW = 3
"""So many logs must find a process slow before it is named."""
LEAST_EXCESS = 0.02
"""Seconds per step below which slowness is not worth a word."""


class StepTimes:
    """Own work of every process, gathered when a step is logged.

    Args:
        parts: this process's stages, parallelised: the hooks come after FSDP's.
        mesh: the process group; on one process nothing is measured.
        threshold: processes whose own work takes this many times the median's are named; 0: never.
    """

    def __init__(self, parts: Sequence[Llama], mesh: Mesh, threshold: float):
        self.mesh, self.threshold = mesh, threshold
        self.slow = ""
        """Says which process is slow, after the reading that has found it slow for the third time in a row."""
        self._measuring = False
        self._starts: list[Any] = []
        self._ends: list[Any] = []
        self._steps, self._last_waited = 0, 0.0
        self._in_a_row = [0] * mesh.world_size
        if mesh.world_size > 1:
            self.hosts = mesh.gather_objects(socket.gethostname())
            for part in parts:
                for block in part.model.layers.values():
                    block.register_forward_pre_hook(self._before)
                    block.register_forward_hook(self._after)

    def measure(self, wanted: bool) -> None:
        """Before a step: whether it will be logged."""
        self._measuring = wanted
        self._starts, self._ends = [], []
        self._steps += 1

    # Compiled blocks leave their hooks outside, as FSDP's are.
    @torch._disable_dynamo
    def _before(self, block: Any, arguments: Any) -> None:
        if self._measuring:
            self._starts.append(self._now())

    @torch._disable_dynamo
    def _after(self, block: Any, arguments: Any, output: Any) -> None:
        if self._measuring:
            self._ends.append(self._now())

    def _now(self) -> Any:
        if self.mesh.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self, waited: float) -> dict[str, Any]:
        """Figures for the log, of the step just ended; collective, after the device was waited for.

        `waited` is the total of the seconds that this process has waited for its data.
        """
        if self.mesh.world_size == 1:
            return {}
        data = (waited - self._last_waited) / max(1, self._steps)
        self._measuring, self._steps, self._last_waited = False, 0, waited
        pairs = list(zip(self._starts, self._ends, strict=False))
        if self.mesh.device.type == "cuda":
            blocks = sum(start.elapsed_time(end) for start, end in pairs) / 1e3
        else:
            blocks = sum(end - start for start, end in pairs)
        # On the host: gloo also where the gradients go over NCCL.
        table = torch.zeros(self.mesh.world_size, 3, dtype=torch.float64)
        table[self.mesh.rank] = torch.tensor([data, blocks, len(pairs)])
        dist.all_reduce(table)
        return self.judge(table.tolist())

    def judge(self, table: list[list[float]]) -> dict[str, Any]:
        """The same from every process's (seconds waiting for data, seconds in blocks, calls of blocks)."""
        calls = statistics.mean(row[2] for row in table)
        work = [data + blocks / max(1.0, count) * calls for data, blocks, count in table]
        median = statistics.median_low(work)  # of two processes the faster one
        slowest = max(range(len(work)), key=work.__getitem__)
        spread = work[slowest] / median if median > 0 else 1.0
        self.slow = ""
        for rank, seconds in enumerate(work):
            is_slow = self.threshold > 0 and seconds > max(self.threshold * median, median + LEAST_EXCESS)
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if is_slow else 0
        named = [rank for rank, count in enumerate(self._in_a_row) if count == LOGS_IN_A_ROW]
        if named:
            self.slow = "; ".join(
                f"rank {rank} ({self.hosts[rank]}) is slow: its own work takes {work[rank]:.3f} s per step "
                f"({table[rank][0]:.3f} s of it waiting for data), the median rank's {median:.3f} s"
                for rank in named
            )
        return {"step_time_spread": round(spread, 3), "slowest_rank": slowest}
