"""`newcompute plan --suggest`: the layouts that fit a device's memory, ranked by the estimated time of a step.

All products of degrees that make the world size are tried, with the micro-batch sizes, activation-checkpointing modes and
schedules that go with them. Everything else is as the configuration has it. Memory decides most of them before a time is
computed: some thousand are left for hundreds of GPUs, under a second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from models.sizes import LlamaShape
from parallel.degrees import Degrees, least_micro_batches, stages_per_device
from train.config import Config
from train.config_rules import layout_problems
from train.plan_memory import GIB, MemoryPlan, plan_memory
from train.plan_setup import Setup, float8_layers
from train.plan_time import NODE, Gpu, TimePlan, plan_time

USABLE = 0.9
"""Share of a device's memory that an estimate may fill: allocator, NCCL, CUDA context and kernels take some."""
TIE = 0.02
"""Layouts whose times differ by less are as good as each other, and the simpler one comes first."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
MODES = ("none", "selective", "full")
LEAST_TOKENS = 8192
"""Of a row on each context-parallel device: for less, cutting rows costs more than estimates know."""
LARGEST = 8192
"""GPUs up to which the smallest number is looked for."""


@dataclass(frozen=True)
class Candidate:
    """One way to run."""

    setup: Setup
    memory: MemoryPlan
    time: TimePlan

    @property
    def complexity(self) -> int:
        """Axes in use, those that need more care weighing more."""
        degrees = self.setup.degrees
        axes = 8 * (degrees.pipeline > 1) + 4 * (degrees.context > 1) + 3 * (degrees.tensor > 1)
        return 4 * axes + 4 * (self.setup.shards > 1) + 4 * (degrees.replicate > 1 and self.setup.shards > 1)

    @property
    def pace(self) -> int:
        """Equal where times are as good as each other."""
        return round(math.log(self.time.total) / math.log1p(TIE))

    @property
    def order(self) -> tuple:
        return (self.pace, self.complexity, self.time.total)

    def changes(self) -> dict[str, dict[str, Any]]:
        """Sections of the configuration, with what this layout sets in them."""
        setup, degrees = self.setup, self.setup.degrees
        parallel: dict[str, Any] = {name: getattr(degrees, name) for name in ("replicate", "shard", "context")}
        parallel |= {"tensor": degrees.tensor, "pipeline": degrees.pipeline}
        parallel["reshard_after_forward"] = setup.reshard
        if degrees.pipeline > 1:
            parallel["pipeline_schedule"] = setup.schedule
            if setup.schedule in ("interleaved_1f1b", "zero_bubble"):
                parallel["pipeline_stages"] = setup.per_device
        checkpointing: dict[str, Any] = {"mode": setup.mode}
        if setup.mode == "budget":
            checkpointing["budget"] = setup.budget
        return {
            "parallel": parallel,
            "training": {"micro_batch_size": setup.rows},
            "activation_checkpointing": checkpointing,
        }


def with_changes(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


def suggest(
    config: Config, shape: LlamaShape, world_size: int, gpu: Gpu, mfu: float, trained: int | None = None
) -> list[Candidate]:
    """The best settings of every layout that fits, best first; of settings as good as each other the one with least memory."""
    best: dict[Degrees, Candidate] = {}
    for setup, memory in _setups(config, shape, world_size, gpu, trained):
        if memory.total > USABLE * gpu.memory_gib * GIB:
            continue
        found = Candidate(setup, memory, plan_time(setup, gpu, mfu))
        known = best.get(setup.degrees)
        if known is None or (found.pace, memory.total) < (known.pace, known.memory.total):
            best[setup.degrees] = found
    return sorted(best.values(), key=lambda candidate: candidate.order)


def smallest_world(config: Config, shape: LlamaShape, gpu: Gpu, trained: int | None = None) -> int | None:
    """The smallest power of two of GPUs that something fits on, or None."""
    world_size = 1
    while world_size <= LARGEST:
        if least_memory(config, shape, world_size, gpu, trained) <= USABLE * gpu.memory_gib * GIB:
            return world_size
        world_size *= 2
    return None


def least_memory(config: Config, shape: LlamaShape, world_size: int, gpu: Gpu, trained: int | None = None) -> float:
    """Bytes per device of the layout that needs least; infinite where the batch or the model cannot be divided so."""
    setups = _setups(config, shape, world_size, gpu, trained, only_least=True)
    return min((memory.total for _, memory in setups), default=math.inf)


def _setups(
    config: Config, shape: LlamaShape, world_size: int, gpu: Gpu, trained: int | None, only_least: bool = False
) -> Iterator[tuple[Setup, MemoryPlan]]:
    """Everything worth trying; with `only_least` what needs the least memory of each layout."""
    budget = USABLE * gpu.memory_gib * GIB
    for degrees, schedule in _layouts(config, shape, world_size):
        changed = with_changes(config, {"parallel": degrees._asdict() | schedule})
        if any(True for _ in layout_problems(changed, shape, degrees)):
            continue
        rows = config.training.global_batch_size // degrees.data
        base = Setup.of(changed, shape, degrees, trained)
        base = replace(base, float8_layers=float8_layers(changed, shape, degrees.tensor))
        for size in _micro_batch_sizes(changed, degrees, rows):
            reshards = (False, True) if degrees.pipeline == 1 and base.shards > 1 else (False,)
            if only_least and size > 1:
                break
            fits = False
            for reshard in reshards[-1:] if only_least else reshards:
                for mode in MODES[-1:] if only_least else MODES:
                    setup = replace(base, rows=size, micro_batches=rows // size, reshard=reshard, mode=mode)
                    if mode == "full" and degrees.tensor > 1 and setup.compiled:
                        setup = replace(setup, mode="budget", budget=0.0)  # the same, in the graph
                    memory = plan_memory(setup)
                    fits = fits or memory.total <= budget
                    yield setup, memory
            if not fits:
                break  # larger micro-batches need more


def _layouts(config: Config, shape: LlamaShape, world_size: int) -> Iterator[tuple[Degrees, dict[str, Any]]]:
    """Degrees whose product is the world size, and what a pipeline's schedule sets."""
    parallel, batch = config.parallel, config.training.global_batch_size
    adapters = any(spec.kind == "lora" for spec in config.transforms)
    for tensor in [d for d in _divisors(world_size) if d <= NODE and not (adapters and d > 1)]:
        deepest = 1 if adapters else min(64, shape.num_layers)
        for pipeline in [d for d in _divisors(world_size // tensor) if d <= deepest]:
            longest = max(1, config.training.sequence_length // LEAST_TOKENS)
            for context in [d for d in _divisors(world_size // tensor // pipeline) if d <= longest]:
                data = world_size // (tensor * pipeline * context)
                if batch % data:
                    continue
                for shard in _divisors(data):
                    degrees = Degrees(pipeline, data // shard, shard, context, tensor)
                    if pipeline == 1:
                        yield degrees, {}
                        continue
                    yield degrees, {"pipeline_schedule": "1f1b"}
                    yield (
                        degrees,
                        {"pipeline_schedule": "interleaved_1f1b", "pipeline_stages": parallel.pipeline_stages},
                    )


def _micro_batch_sizes(config: Config, degrees: Degrees, rows: int) -> Iterator[int]:
    """Sizes that divide a process's rows, and leave the micro-batches that a schedule asks for."""
    schedule = config.parallel.pipeline_schedule
    for size in MICRO_BATCHES:
        if rows % size or config.noise.group_size % size:
            continue
        count = rows // size
        if degrees.pipeline > 1:
            if count < least_micro_batches(config, degrees.pipeline):
                continue
            if schedule == "interleaved_1f1b" and (count % degrees.pipeline or stages_per_device(config) == 1):
                continue
        yield size


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
