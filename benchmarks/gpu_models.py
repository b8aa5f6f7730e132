"""What `benchmarks/gpu.py` measures: models, the settings that are searched, and how fast each is to be. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.roofline import TARGET, roofline
from models.sizes import SIZES, LlamaShape


@dataclass(frozen=True)
class Setting:
    """What is searched over; everything else is the configuration's default."""

    micro_batch_size: int
    accumulation: int = 1
    """Micro-batches per step."""
    activation_checkpointing: str = "none"
    loss_chunk_tokens: int = 0
    cuda_graphs: bool = False
    reshard_after_forward: bool = False
    float8: str = "none"

    def flags(self) -> dict[str, Any]:
        """Keys of the configuration."""
        return {
            "training.micro_batch_size": self.micro_batch_size,
            "training.global_batch_size": self.micro_batch_size * self.accumulation,
            "training.loss_chunk_tokens": self.loss_chunk_tokens,
            "activation_checkpointing.mode": self.activation_checkpointing,
            "compile.cuda_graphs": str(self.cuda_graphs).lower(),
            "parallel.reshard_after_forward": str(self.reshard_after_forward).lower(),
            "float8.recipe": self.float8,
        }

    def __str__(self) -> str:
        parts = [f"{self.micro_batch_size} rows x {self.accumulation}"]
        if self.activation_checkpointing != "none":
            parts.append(f"{self.activation_checkpointing} recomputation")
        if self.loss_chunk_tokens:
            parts.append(f"loss by {self.loss_chunk_tokens}")
        parts += ["CUDA graphs"] * self.cuda_graphs + ["reshard"] * self.reshard_after_forward
        return ", ".join(parts)


Changes = tuple[dict[str, Any], ...]
RECOMPUTATION: Changes = tuple({"activation_checkpointing": mode} for mode in ("budget", "selective", "full"))


@dataclass(frozen=True)
class Model:
    """A model, the setting to begin with, and the axes of its search."""

    family: str
    size: str
    sequence_length: int
    first: Setting
    axes: tuple[Changes, ...] = ()

    @property
    def shape(self) -> LlamaShape:
        return SIZES[self.family][self.size]

    @property
    def roofline(self) -> float:
        """Tokens/s that one H100 cannot exceed (`roofline.py`)."""
        return roofline(self.shape, self.sequence_length).tokens_per_second

    @property
    def target(self) -> float | None:
        """Tokens/s to reach on one H100; of CLM models, since the roofline's attention is that of heads of 64."""
        return TARGET * self.roofline if self.family == "clm" and self.size != "debug" else None


# By the plan's estimate first settings keep 44 to 50 GiB and no setting more than 64. The batch is the configuration's for 60M
# to 400M (96 rows); the larger models take fewer micro-batches than theirs, so that ten steps take seconds.
MODELS = {
    "60M": Model(
        "clm", "60M", 2048, Setting(48, 2),
        axes=(
            ({"micro_batch_size": 64},),
            ({"cuda_graphs": True},),
            ({"accumulation": 4}, {"accumulation": 8}),
            ({"loss_chunk_tokens": 8192},),
            RECOMPUTATION,
            ({"micro_batch_size": 32, "accumulation": 3}, {"micro_batch_size": 24, "accumulation": 4}),
        ),
    ),
    "200M": Model(
        "clm", "200M", 2048, Setting(24, 4),
        axes=(
            ({"micro_batch_size": 32, "accumulation": 3},),
            ({"cuda_graphs": True},),
            ({"accumulation": 8},),
            ({"loss_chunk_tokens": 8192},),
            RECOMPUTATION,
            ({"micro_batch_size": 16, "accumulation": 6}, {"micro_batch_size": 12, "accumulation": 8}),
        ),
    ),
    "1.1B": Model(
        "clm", "1.1B", 2048, Setting(8, 4),
        axes=(
            ({"micro_batch_size": 12},),
            ({"cuda_graphs": True},),
            ({"accumulation": 8},),
            ({"loss_chunk_tokens": 8192},),
            RECOMPUTATION,
            ({"micro_batch_size": 4, "accumulation": 8},),
        ),
    ),
    "400M": Model("clm", "400M", 2048, Setting(16, 6)),
    "llama3-1B": Model("llama3", "1B", 8192, Setting(2, 4)),
    "llama3-3B": Model("llama3", "3B", 8192, Setting(1, 4, "selective", 2048, reshard_after_forward=True)),
    "llama3-8B": Model("llama3", "8B", 8192, Setting(1, 4, "full", 2048, reshard_after_forward=True)),
    "debug": Model(
        "clm", "debug", 128, Setting(4),
        axes=(({"micro_batch_size": 8},), ({"accumulation": 2},), ({"loss_chunk_tokens": 256},)),
    ),
}  # fmt: skip
DEFAULT_MODELS = [name for name in MODELS if name != "debug"]


def gains(name: str, recipe: str) -> bool:
    """Whether any layer of a model becomes float8."""
    from parallel.float8_layers import choices
    from train.config import Float8Config

    return any(not c.reason for c in choices(MODELS[name].shape, Float8Config.model_validate({"recipe": recipe})))


def planned_memory(flags: list[str]) -> int:
    """Bytes that `newcompute plan` estimates for a run on one process."""
    from parallel.degrees import resolve_degrees
    from train.config import named_shape
    from train.config_sources import load_config
    from train.plan_memory import plan_memory
    from train.plan_setup import Setup

    config = load_config([], flags, world_size=1)
    return round(plan_memory(Setup.of(config, named_shape(config.model), resolve_degrees(config, 1))).total)
