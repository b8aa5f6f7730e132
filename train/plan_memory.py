"""Memory of one device, part by part, from shapes alone. Torch-free.

What stays allocated at the fullest moment, the begin of a micro-batch's backward: sharded float32 parameters, gradients
and the optimizer's moments; gathered weights in the compute type; what blocks keep for their backward; the logits with
their gradient; the gradient that is being reduced. The allocator, NCCL and kernels need some more on top.

Kept activations are counted tensor by tensor and tested against what blocks really keep (tests/train/test_plan.py).
D is the model's width, Q and K those of all query and key heads, F that of the feed-forward layer, n the tensor degree.
Between matrix products tokens are split over the n devices; the inputs of products are gathered, and kept as gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from models.sizes import LlamaShape
from train.plan_setup import Matrix, Setup, Stage, block_parameters, end_parameters, numbers

GIB = 2**30
MIN_QUANTISED, QUANTISED_BLOCK = 4096, 256
"""8-bit moments: tensors with fewer numbers, and shards that are no multiple, keep float32 (train/low_bit_adamw.py)."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes per device, of the fullest device along the pipeline."""

    parameters: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered: float = 0.0
    accumulated: float = 0.0
    """Whole float32 gradients, where they are reduced once per step."""
    reduced: float = 0.0
    """The gradient of the largest unit on its way to its shards."""
    activations: float = 0.0
    working: float = 0.0
    """The block whose backward runs: what it computes again, and gradients of activations."""
    logits: float = 0.0
    host: float = 0.0
    """In the host's memory, per process; not in the total."""
    rank: int = 0
    """Along the pipeline."""
    in_flight: int = 1
    """Micro-batches x stages whose activations are kept at once."""

    @property
    def total(self) -> float:
        state = self.parameters + self.gradients + self.optimizer + self.gathered + self.accumulated + self.reduced
        return state + self.activations + self.working + self.logits


@lru_cache(maxsize=1024)
def kept_per_token(
    shape: LlamaShape, mode: str, budget: float, tensor: int, context: int, compiled: bool, fused_norms: bool
) -> tuple[float, float]:
    """What one block keeps for its backward per token of a tensor-parallel group: numbers of the compute type, and of float32.

    Args:
        mode: of activation checkpointing; `budget` is its share with "budget".
    """
    n, d, f = tensor, shape.dim, shape.ffn_dim
    q, k = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    statistics = shape.num_heads / n  # log of the softmax's sum, per head
    if mode == "full":
        return d / n, 0.0  # the block's input
    if mode == "budget":
        known = (tensor, context, compiled, fused_norms)
        least, most = kept_per_token(shape, "full", 0, *known), kept_per_token(shape, "none", 0, *known)
        return tuple(a + budget * (b - a) for a, b in zip(least, most))  # type: ignore[return-value]
    if mode == "selective":
        # Input, results of products and of attention; keys and values of other devices are gathered again.
        kept = (d + 2 * q + 2 * k + 2 * f) / n
        if compiled:
            return kept + d / n, statistics  # o_proj's result summed over devices; down_proj's is never needed again
        # Both results before they are summed, of all tokens, and after.
        return kept + (2 * d if n == 1 else 2 * d + 2 * d / n), statistics
    # Input of the block, and of the second norm; rotated queries and keys, values, attention's result.
    kept = (2 * d + 2 * q + 2 * k * context) / n
    if compiled:
        return kept + 2 * d + 3 * f / n, statistics  # inputs of both groups of products; gate, up, and their product
    norms = 0 if fused_norms else 2 * d / n  # before the norm's weight is applied
    return kept + 2 * d + norms + 4 * f / n, statistics


def block_bytes(setup: Setup, mode: str) -> float:
    """Bytes that one block keeps of one micro-batch under an activation-checkpointing mode."""
    degrees = setup.degrees
    compute, float32 = kept_per_token(
        setup.shape, mode, setup.budget, degrees.tensor, degrees.context, setup.compiled, setup.fused_norms
    )
    return setup.tokens * (setup.compute_bytes * compute + 4 * float32)


def in_flight(schedule: str, pipeline: int, rank: int, per_device: int, micro_batches: int) -> int:
    """Most (micro-batch, stage) pairs of a device whose forward is done and backward is not (torch 2.13's schedules)."""
    most = micro_batches * per_device
    if pipeline == 1:
        return 1
    if schedule == "gpipe":
        return most
    if schedule == "1f1b":
        return min(most, pipeline - rank)
    if schedule == "interleaved_1f1b":
        return min(most, (per_device - 1) * pipeline + 2 * (pipeline - 1 - rank) + 1)
    return min(most, pipeline * per_device)  # zero_bubble, zbv


def moment_bytes(optimizer: str, parameter: Matrix, shards: int = 1, in_block: bool = True) -> float:
    """Bytes of optimizer state for the first process's shard of a parameter."""
    size = parameter.shard(shards)
    if optimizer == "muon" and in_block and parameter.columns > 1:
        return 4 * size  # one moment for the blocks' matrices, two for the rest
    if optimizer == "adamw_bf16":
        return 4 * size
    quantised = optimizer == "adamw_8bit" and parameter.name != "model.embed_tokens"
    if quantised and parameter.whole >= MIN_QUANTISED and size % QUANTISED_BLOCK == 0:
        return 2 * (1 + 4 / QUANTISED_BLOCK) * size  # a code of one byte each, and a float32 scale per block
    return 8 * size


@lru_cache(maxsize=4096)
def held(shape: LlamaShape, stage: Stage, tensor: int, shards: int, optimizer: str) -> tuple[int, float]:
    """(numbers, bytes of moments) of a stage's parameters on the first of the processes that share it."""
    block = block_parameters(shape, tensor)
    ends = end_parameters(shape, tensor, stage.has_embedding, stage.has_head)
    moments = stage.layers * sum(moment_bytes(optimizer, p, shards) for p in block)
    moments += sum(moment_bytes(optimizer, p, shards, in_block=False) for p in ends)
    return stage.layers * numbers(block, shards) + numbers(ends, shards), moments


def gathered_block(setup: Setup) -> float:
    """Bytes of a block's weights as they are gathered; float8 with the tensorwise recipe, unless tensor-parallel."""
    in_float8 = setup.float8_layers if setup.recipe == "tensorwise" and setup.degrees.tensor == 1 else ()
    return sum(
        parameter.size * (1 if parameter.name in in_float8 else setup.compute_bytes)
        for parameter in block_parameters(setup.shape, setup.degrees.tensor)
    )


def plan_memory(setup: Setup) -> MemoryPlan:
    """Of the device along the pipeline that needs most."""
    plans = [_device(setup, rank, stages) for rank, stages in enumerate(setup.stages())]
    return max(plans, key=lambda plan: plan.total)


def _device(setup: Setup, rank: int, stages: tuple[Stage, ...]) -> MemoryPlan:
    shape, degrees, tensor = setup.shape, setup.degrees, setup.degrees.tensor
    layers = sum(stage.layers for stage in stages)
    has_embedding = any(stage.has_embedding for stage in stages)
    has_head = any(stage.has_head for stage in stages)
    here = Stage(layers, has_embedding, has_head)
    sharded, moments = held(shape, here, tensor, setup.shards, setup.optimizer)
    whole = held(shape, here, tensor, 1, setup.optimizer)[0]
    block = numbers(block_parameters(shape, tensor))
    ends = numbers(end_parameters(shape, tensor, has_embedding, has_head))
    vocabulary = shape.padded_vocab_size * shape.dim // tensor
    share = 1.0
    if setup.trained is not None:
        share = setup.trained / (held(shape, Stage(shape.num_layers, True, True), 1, 1, "adamw")[0])
    pipelined = degrees.pipeline > 1

    gathered = gathered_block(setup)
    if setup.reshard and not pipelined:
        # The block that computes, the next one on its way, and an end of the model.
        held_gathered = 2 * gathered + setup.compute_bytes * min(ends, vocabulary)
    else:
        # A pipeline frees no weights between the backward of a micro-batch and the forward of the next.
        held_gathered = layers * gathered + setup.compute_bytes * ends
    at_once = pipelined or (not setup.reduce_each and setup.micro_batches > 1)
    largest = vocabulary if has_embedding or has_head else block
    count = in_flight(setup.schedule, degrees.pipeline, rank, setup.per_device, setup.micro_batches)
    deepest = max(stage.layers for stage in stages)
    positions = 8 * shape.head_dim * setup.tokens if setup.positions else 0  # cosine and sine, for all blocks
    state = {"parameters": 4.0 * sharded, "gradients": 4.0 * sharded * share, "optimizer": moments * share}
    host = sum(state.values()) if setup.cpu_offload else 0.0
    return MemoryPlan(
        **({} if setup.cpu_offload else state),
        gathered=held_gathered,
        accumulated=setup.reduce_bytes * whole * share if at_once else 0.0,
        reduced=(setup.compute_bytes + setup.reduce_bytes) * largest * share,
        activations=count * (deepest * block_bytes(setup, setup.mode) + positions),
        working=block_bytes(setup, "none"),
        logits=logit_bytes(setup) if has_head else 0.0,
        host=host,
        rank=rank,
        in_flight=count,
    )


def logit_bytes(setup: Setup) -> float:
    """Logits of one micro-batch with their gradient, and the head's inputs."""
    shape, n, width = setup.shape, setup.degrees.tensor, setup.compute_bytes
    tokens = min(setup.tokens, setup.chunk_tokens) if setup.chunk_tokens else setup.tokens
    if setup.compiled:
        per_logit = 2 * width  # logits and their gradient; the float32 values in between stay in registers
    else:
        # Softmax, its gradient and that of the logits in float32; split, also what is left after the maximum (measured).
        per_logit = 12 if n == 1 else 16
    hidden = shape.dim * (2 / n + (1 if n > 1 else 0))  # input and result of the last norm, and the gathered result
    return tokens * shape.padded_vocab_size / n * per_logit + setup.tokens * hidden * width
