"""What memory and time of a run depend on, taken from its configuration or tried out by a search. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from models.sizes import LlamaShape
from parallel.degrees import Degrees, rows_per_micro_batch, stages_per_device
from parallel.float8_layers import block_layers, choices

if TYPE_CHECKING:
    from train.config import Config


class Stage(NamedTuple):
    """Part of the model that a pipeline's device holds at one place; without a pipeline all of it."""

    layers: int
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True)
class Setup:
    """One process's share of a run."""

    shape: LlamaShape
    degrees: Degrees
    rows: int
    """Of one micro-batch."""
    micro_batches: int
    """Per step and process."""
    length: int
    """Tokens of a row."""
    compute_bytes: int
    reduce_bytes: int
    compiled: bool
    fused_norms: bool
    """One kernel per norm, as on GPU; on CPU a norm that is not compiled is several operations."""
    mode: str
    """Of activation checkpointing."""
    budget: float
    reshard: bool
    reduce_each: bool
    cpu_offload: bool
    async_tensor: bool
    schedule: str
    per_device: int
    """Pipeline stages of a device."""
    chunk_tokens: int
    optimizer: str
    recipe: str
    float8_layers: frozenset[str]
    """Layers of a block whose products run in float8."""
    positions: bool
    """Rows come with positions, and so with a rotary table of their own."""
    trained: int | None
    """Parameters of the model that are trained where it is not all of them."""

    @classmethod
    def of(cls, config: Config, shape: LlamaShape, degrees: Degrees, trained: int | None = None) -> Setup:
        training, parallel = config.training, config.parallel
        on_gpu = config.run.device != "cpu"
        rows = rows_per_micro_batch(config, degrees)
        return cls(
            shape=shape,
            degrees=degrees,
            rows=rows,
            micro_batches=max(1, training.global_batch_size // (rows * degrees.data)),
            length=training.sequence_length,
            compute_bytes={"float32": 4, "bfloat16": 2}.get(config.precision.compute, 2 if on_gpu else 4),
            reduce_bytes={"float32": 4, "bfloat16": 2}[config.precision.reduce],
            compiled=config.compile.enabled,
            fused_norms=on_gpu,
            mode=config.activation_checkpointing.mode,
            budget=config.activation_checkpointing.budget,
            reshard=parallel.reshard_after_forward,
            reduce_each=parallel.reduce_each_micro_batch,
            cpu_offload=parallel.cpu_offload,
            async_tensor=parallel.async_tensor,
            schedule=parallel.pipeline_schedule,
            per_device=stages_per_device(config),
            chunk_tokens=training.loss_chunk_tokens,
            optimizer=config.optimizer.name,
            recipe=config.float8.recipe,
            float8_layers=float8_layers(config, shape, degrees.tensor),
            positions=training.document_mask or degrees.context > 1 or degrees.pipeline > 1,
            trained=trained,
        )

    @property
    def tokens(self) -> int:
        """Of a micro-batch on this device; tensor-parallel devices hold the same ones."""
        return self.rows * self.length // self.degrees.context

    @property
    def world_size(self) -> int:
        return self.degrees.data * self.degrees.pipeline * self.degrees.context * self.degrees.tensor

    @property
    def shards(self) -> int:
        """Processes over which a parameter is sharded; context parallelism shards as well."""
        return self.degrees.shard * self.degrees.context

    def stages(self) -> list[tuple[Stage, ...]]:
        """What each device along the pipeline holds."""
        if self.degrees.pipeline == 1:
            return [(Stage(self.shape.num_layers, True, True),)]
        return _stages(self.shape, self.length, self.degrees.pipeline, self.per_device, self.schedule)


def float8_layers(config: Config, shape: LlamaShape, tensor: int) -> frozenset[str]:
    if config.float8.recipe == "none":
        return frozenset()
    return frozenset(choice.name for choice in choices(shape, config.float8, tensor) if not choice.reason)


@lru_cache(maxsize=256)
def _stages(shape: LlamaShape, length: int, pipeline: int, per_device: int, schedule: str) -> list[tuple[Stage, ...]]:
    from parallel.pipeline import split_layers, stages_of_rank  # imports torch

    layers = split_layers(shape, length, pipeline * per_device)
    last = len(layers) - 1
    return [
        tuple(Stage(len(layers[i]), i == 0, i == last) for i in stages_of_rank(rank, pipeline, per_device, schedule))
        for rank in range(pipeline)
    ]


class Matrix(NamedTuple):
    """A parameter as a tensor-parallel device holds it; vectors have one column."""

    name: str
    """Within a block, or of an end of the model."""
    rows: int
    columns: int
    whole: int
    """Numbers of the parameter on all tensor-parallel devices."""

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def shard(self, shards: int) -> int:
        """Numbers that the first of `shards` processes holds: FSDP cuts rows, and rounds up."""
        return -(-self.rows // shards) * self.columns


@lru_cache(maxsize=64)
def block_parameters(shape: LlamaShape, tensor: int) -> tuple[Matrix, ...]:
    """Parameters of a block on one of `tensor` devices (the plan beside models/llama.py says what is split)."""
    parameters = []
    for name, (rows, columns) in block_layers(shape).items():
        by_columns = name.endswith(("o_proj", "down_proj"))
        rows_here, columns_here = (rows, columns // tensor) if by_columns else (rows // tensor, columns)
        parameters.append(Matrix(name, rows_here, columns_here, rows * columns))
    for name in ("input_layernorm", "post_attention_layernorm"):
        parameters.append(Matrix(name, shape.dim, 1, shape.dim))
    return tuple(parameters)


@lru_cache(maxsize=64)
def end_parameters(shape: LlamaShape, tensor: int, has_embedding: bool, has_head: bool) -> tuple[Matrix, ...]:
    """Parameters outside blocks; a tied weight counts once."""
    vocabulary = shape.padded_vocab_size
    matrix = Matrix("", vocabulary // tensor, shape.dim, vocabulary * shape.dim)
    ends = [matrix._replace(name="model.embed_tokens")] if has_embedding else []
    if has_head:
        ends.append(Matrix("model.norm", shape.dim, 1, shape.dim))
        if not (shape.tied_embeddings and has_embedding):
            ends.append(matrix._replace(name="lm_head"))
    return tuple(ends)


@lru_cache(maxsize=256)
def numbers(parameters: tuple[Matrix, ...], shards: int = 1) -> int:
    return sum(parameter.shard(shards) for parameter in parameters)
