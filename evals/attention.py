"""Hardware effects on the attention products of transformers models, through its registry of attention functions.

A model with such effects is switched to the registered function. It computes the products of modules that have effects
(`transforms/attention.py`), and those of the others, or of all while the hardware is off, with the implementation that the
model had. Whatever a model gives to its attention beyond what this function understands is refused.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transforms.attention import AttentionPlan, transformed_attention
from transforms.layers import run_attention

NAME = "newcompute"
_OPERANDS = {"softcap", "s_aux"}
"""Arguments that this function computes with."""
_NO_PART = {
    "cache_position", "is_causal", "logits_to_keep", "num_items_in_batch", "output_attentions", "output_hidden_states",
    "output_router_logits", "position_ids", "return_dict", "return_loss", "sliding_window", "use_cache",
}  # fmt: skip
"""Arguments without a part in the products: others act before, and a window is in the mask."""
_EXACT = AttentionPlan(None, None, None, None, None, None, (0,) * 6)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: query (B, H, T, E), key and value (B, K, S, E) -> (B, T, H, E).

    Raises:
        ValueError: the attention adds something of its own to the products.
    """
    noise = module.noise if hasattr(module, "attention_effects") else None
    if noise is None or (noise.clean and not noise.exact):
        usual = usual_attention(module)
        return usual(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    given = {name for name, argument in kwargs.items() if argument is not None and argument is not False}
    unknown = sorted(given - _OPERANDS - _NO_PART)
    if unknown or dropout:
        raise ValueError(
            f"the attention of {type(module).__name__} takes {', '.join(unknown) or 'dropout'}, which effects on its products "
            "know nothing of: set attention = false, or leave attention out"
        )
    causal = module.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
    if attention_mask is None and not causal:
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap, sinks = kwargs.get("softcap") or 0.0, kwargs.get("s_aux")
    if noise.exact:
        plan = replace(_EXACT, softcap=softcap)
        found = transformed_attention(
            plan, False, scale, query, key, value, attention_mask, None, None, None, None, sinks
        )
    else:
        found = run_attention(module, query, key, value, attention_mask, scale, softcap, sinks)
    return found.transpose(1, 2).contiguous(), None


def usual_attention(module: Any) -> Any:
    """The function that computes a module's attention where no effect does."""
    implementation = module.usual_attention
    if implementation in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[implementation]
    return sys.modules[type(module).__module__].eager_attention_forward


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
