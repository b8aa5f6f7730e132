"""Which activations a block keeps for its backward pass, and which it computes again."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

if TYPE_CHECKING:
    from models.llama import Llama
    from train.config import ActivationCheckpointingConfig
    from transforms.context import Noise

aten = torch.ops.aten
# Costly to repeat, cheap to keep. Everything else in a block (norms, rotations, SwiGLU, casts) is memory-bound.
KEPT = {
    aten.mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
    aten._scaled_mm.default,
    aten.max.default,  # of float8 scales: one number, from a pass over a whole tensor
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}


def _keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(
    model: Llama, config: ActivationCheckpointingConfig, noise: Noise | None = None
) -> None:
    """Wrap every block in place. "full" keeps its input alone, "selective" also matrix products and attention; "budget" is
    the compiler's own choice and wraps nothing.

    Args:
        noise: of the model's hardware effects, where blocks run eagerly: recomputation must see the forward's context.
            Compiled blocks hold it as an input.
    """
    if config.mode in ("none", "budget"):
        return
    for name, block in model.model.layers.items():
        model.model.layers[name] = _wrapped(block, config.mode, noise)


def _wrapped(block: nn.Module, mode: str, noise: Noise | None) -> nn.Module:
    contexts: Any = partial(create_selective_checkpoint_contexts, _keep_products) if mode == "selective" else None
    if noise is not None:
        contexts = noise.restoring(contexts)
    options = {} if contexts is None else {"context_fn": contexts}
    # Nothing in a block draws from torch's random state, so there is none to preserve.
    return checkpoint_wrapper(block, preserve_rng_state=False, **options)
