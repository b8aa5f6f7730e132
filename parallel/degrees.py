"""How many processes lie along each axis, and what follows for the batch. Torch-free, for configuration checks and plans."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from train.config import Config


class Degrees(NamedTuple):
    """Processes along each axis; their product is the world size."""

    pipeline: int
    replicate: int
    shard: int
    context: int
    tensor: int

    @property
    def data(self) -> int:
        """Groups of processes that train on different rows."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        named = [f"{name} {degree}" for name, degree in zip(self._fields, self) if degree > 1]
        return " x ".join(named) or "no parallelism"


def rows_per_micro_batch(config: Config, degrees: Degrees) -> int:
    """Rows that one forward takes: by default all of a data-parallel process, or of a pipeline as many as fill it."""
    training = config.training
    if training.micro_batch_size:
        return training.micro_batch_size
    rows = max(1, training.global_batch_size // degrees.data)
    if degrees.pipeline == 1:
        return rows
    return max(1, rows // least_micro_batches(config, degrees.pipeline))


def stages_per_device(config: Config) -> int:
    """Pipeline stages that each device holds."""
    schedule = config.parallel.pipeline_schedule
    return {"gpipe": 1, "1f1b": 1, "zbv": 2}.get(schedule, config.parallel.pipeline_stages)


def least_micro_batches(config: Config, pipeline: int) -> int:
    """Fewest micro-batches that a schedule runs with."""
    return {"gpipe": 1, "zbv": 2 * pipeline}.get(config.parallel.pipeline_schedule, pipeline)


def nearest_multiple(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)


def nearest_divisor(of: int, value: int) -> int:
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: abs(d - value))


def resolve_degrees(config: Config, world_size: int) -> Degrees:
    """All degrees, with -1 filled in so that their product is the world size.

    Raises:
        ValueError: no degree fits; the message names the nearest valid choice.
    """
    given = {name: getattr(config.parallel, name) for name in Degrees._fields}
    open_names = [name for name, degree in given.items() if degree == -1]
    if len(open_names) > 1:
        names = " and ".join(f"parallel.{name}" for name in open_names)
        raise ValueError(f"{names} cannot both be -1: give all but one")
    if any(degree == 0 for degree in given.values()):
        raise ValueError("a degree is at least 1, or -1 to take what is left of the world size")
    fixed = math.prod(degree for degree in given.values() if degree != -1)
    if not open_names and fixed != world_size:
        product = " x ".join(f"{name} {degree}" for name, degree in given.items() if degree != 1) or "all degrees 1"
        raise ValueError(
            f"{product} = {fixed} processes, but {world_size} are running; set one of them to -1 or start {fixed}"
        )
    if open_names and world_size % fixed:
        raise ValueError(
            f"{fixed} does not divide the {world_size} running processes; the nearest that does: "
            f"{nearest_divisor(world_size, fixed)}"
        )
    return Degrees(**{name: world_size // fixed if degree == -1 else degree for name, degree in given.items()})
