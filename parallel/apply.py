"""From a plain model on the meta device to one that trains on a mesh: one ordered function.

The order matters: hardware effects change the layers of a block, activation checkpointing wraps the block that compile
then sees as a whole, and FSDP's hooks stay outside the compiled region.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch._functorch.config
import torch._inductor.config
from torch.distributed._symmetric_memory import enable_symm_mem_for_group
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel import context, pipeline, tensor
from parallel.activation_checkpointing import apply_activation_checkpointing
from parallel.degrees import stages_per_device
from parallel.mesh import Mesh
from transforms import apply as transforms

if TYPE_CHECKING:
    from models.llama import Llama
    from train.config import Config
    from transforms.context import Noise

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def compute_dtype(config: Config, device: torch.device) -> torch.dtype:
    """Type of products and activations: bfloat16 on GPU and float32 on CPU unless the configuration says."""
    if config.precision.compute == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[config.precision.compute]


@dataclass
class Parallel:
    """A model spread over a mesh."""

    parts: list[Llama]
    """This device's stages; without a pipeline the model."""
    stages: list[int]
    """Their numbers."""
    noise: Noise | None
    """What its transformed layers share, where there are any; to be filled after `to_empty`."""


def apply(model: Llama, config: Config, mesh: Mesh) -> Parallel:
    """Make `model`, on the meta device, ready for `mesh`, in place. Afterwards: `to_empty`, then its weights."""
    assert model.lm_head is not None
    model.lm_head.chunk_tokens = config.training.loss_chunk_tokens
    if mesh.context_size > 1:
        context.split(model, mesh)
    if mesh.tensor.size() > 1:
        tensor.split(model, mesh.tensor)
        if config.parallel.async_tensor and mesh.device.type == "cuda":
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # torch 2.13 does it by itself
                enable_symm_mem_for_group(mesh.tensor.get_group().group_name)
    if config.float8.recipe != "none":
        from parallel import float8  # torchao takes seconds to import

        float8.convert(model, config, mesh.device, mesh.tensor.size())
    noise = None
    if config.transforms:
        try:
            noise = transforms.apply(model, config.transforms, config.noise_seed, config.noise.warmup_steps)
        except transforms.TransformError as error:
            raise ValueError(f"{error.setting}: {error}") from error
    if model.lm_head.chunk_tokens and any(
        getattr(model.lm_head, f"{place}_effects", ()) for place in ("input", "output")
    ):
        raise ValueError(
            "training.loss_chunk_tokens: hardware effects on what the head reads and returns need the whole batch, not chunks"
        )
    parts, stages = [model], [0]
    if mesh.pipeline.size() > 1:
        parts, stages = _stages(model, config, mesh)
        if noise is not None:
            noise.keep_ranges(parts)
    for part in parts:
        checkpoint_and_compile(part, config, mesh, noise)
        shard(part, config, mesh)
    return Parallel(parts, stages, noise)


def _stages(model: Llama, config: Config, mesh: Mesh) -> tuple[list[Llama], list[int]]:
    """This device's stages and their numbers."""
    size, per_device = mesh.pipeline.size(), stages_per_device(config)
    layers = pipeline.split_layers(model.shape, config.training.sequence_length, size * per_device)
    schedule = config.parallel.pipeline_schedule
    mine = pipeline.stages_of_rank(mesh.pipeline.get_local_rank(), size, per_device, schedule)
    return [pipeline.cut(model, layers[i], i == 0, i == len(layers) - 1) for i in mine], mine


def checkpoint_and_compile(model: Llama, config: Config, mesh: Mesh, noise: Noise | None) -> None:
    """Activation checkpointing inside the compiled blocks, where the compiler sees what the backward really needs.

    But for `full` with tensor parallelism, which goes around them: torch 2.13.0 fails to save a DTensor's mesh.
    """
    checkpointing, compiled = config.activation_checkpointing, config.compile.enabled
    around = compiled and checkpointing.mode == "full" and mesh.tensor.size() > 1
    if around:
        compile_parts(model, config)
    apply_activation_checkpointing(model, checkpointing, noise if around or not compiled else None)
    if compiled and not around:
        compile_parts(model, config)


def compile_parts(model: Llama, config: Config) -> None:
    """torch.compile each block, and the head with its loss, as whole graphs."""
    options: dict[str, Any] = {"fullgraph": True, "backend": config.compile.backend}
    if config.compile.cuda_graphs:
        options["options"] = {"triton.cudagraphs": True}
    checkpointing = config.activation_checkpointing
    torch._functorch.config.activation_memory_budget = checkpointing.budget if checkpointing.mode == "budget" else 1.0
    if hasattr(torch._functorch.config, "unsafe_treat_script_objects_as_zero_size"):
        # The mesh of a DTensor, an object in the graph since torch 2.13, whose bytes a budget cannot tell: it has none.
        torch._functorch.config.unsafe_treat_script_objects_as_zero_size = True
    torch._inductor.config._micro_pipeline_tp = config.parallel.async_tensor
    # The backward of a zero-bubble schedule runs twice over a stage, first for inputs and then for weights.
    torch._functorch.config.donated_buffer = config.parallel.pipeline_schedule not in ("zero_bubble", "zbv")
    for block in model.model.layers.values():
        block.compile(**options)
    if model.lm_head is not None:
        model.lm_head.compile(**options)


def shard(model: Llama, config: Config, mesh: Mesh) -> None:
    """FSDP2 on the (replicate, shard) mesh: one unit per block, one for the embedding, one for norm and head.

    Also where nothing is sharded (shard = 1, or one process): its mixed-precision policy is the only precision mechanism.
    Gradients are summed, not averaged, over ranks: the loss is already divided by the tokens of all of them.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype(config, mesh.device),
        reduce_dtype=DTYPES[config.precision.reduce],
        cast_forward_inputs=False,  # tokens need no cast, and the rotary table stays float32
    )
    options: dict[str, Any] = {"mesh": mesh.parameters, "mp_policy": policy}
    if config.parallel.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device.type == "cuda")
    reshard = config.parallel.reshard_after_forward
    decoder = model.model
    ends = [decoder.norm, model.lm_head] if model.lm_head is not None else []
    if model.shape.tied_embeddings:
        fully_shard([decoder.embed_tokens, *ends], reshard_after_forward=False, **options)
    else:
        if decoder.embed_tokens is not None:
            fully_shard(decoder.embed_tokens, reshard_after_forward=reshard, **options)
        if ends:
            # The head's backward comes right after its forward: freeing its weights between would gather them twice.
            fully_shard(ends, reshard_after_forward=False, **options)
    for block in decoder.layers.values():
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    if mesh.gradient_size == 1:
        return  # nothing is divided by 1 process, and an explicit factor would cost a pass over all gradients
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A plain sum: gloo has no pre-multiplied one, and NCCL's fastest paths are for plain sums.
            module.set_force_sum_reduction_for_comms(True)


def reshard(model: Llama) -> None:
    """Put the sharded parameters back after a forward that no backward follows.

    Units that keep their gathered weights for the backward would otherwise go on holding them, and `parameters()` would
    show those instead of the ones that the optimizer knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
