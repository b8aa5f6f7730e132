"""From a plain model on the meta device to one that trains on a mesh: one ordered function.

The order matters: hardware effects change the layers of a block, activation checkpointing wraps the block that compile
then sees as a whole, and FSDP's hooks stay outside the compiled region.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.activation_checkpointing import apply_activation_checkpointing
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


def apply(model: Llama, config: Config, mesh: Mesh) -> Noise | None:
    """Make `model`, on the meta device, ready for `mesh`, in place. Afterwards: `to_empty`, then its weights.

    Returns:
        What its transformed layers share, where there are any; to be filled after `to_empty`.
    """
    noise = None
    if config.transforms:
        try:
            noise = transforms.apply(model, config.transforms, config.noise_seed)
        except transforms.TransformError as error:
            raise ValueError(f"transforms.{error.index}.modules: {error}") from error
    eager = None if config.compile.enabled else noise
    apply_activation_checkpointing(model, config.activation_checkpointing.mode, eager)
    if config.compile.enabled:
        for block in model.model.layers.values():
            block.compile(fullgraph=True, backend=config.compile.backend)
        if transforms.is_transformed(model.lm_head):
            model.lm_head.compile(fullgraph=True, backend=config.compile.backend)
    shard(model, config, mesh)
    return noise


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
    options = {"mesh": mesh.data, "mp_policy": policy}
    reshard = config.parallel.reshard_after_forward
    decoder = model.model
    if model.shape.tied_embeddings:
        fully_shard([decoder.embed_tokens, decoder.norm, model.lm_head], reshard_after_forward=False, **options)
    else:
        fully_shard(decoder.embed_tokens, reshard_after_forward=reshard, **options)
        # The head's backward comes right after its forward: freeing its weights between would gather them twice.
        fully_shard([decoder.norm, model.lm_head], reshard_after_forward=False, **options)
    for block in decoder.layers.values():
        fully_shard(block, reshard_after_forward=reshard, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    # The logits are a view where the vocabulary is padded, and nothing writes into them.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if mesh.data_size == 1:
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
