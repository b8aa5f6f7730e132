"""Hardware effects on the attention products of transformers models, through its registry of attention functions.

A model with such effects is switched to the registered function. It computes the products of modules that have effects
(`transforms/attention.py`), and those of the others, or of all while the hardware is off, as "sdpa" does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transforms.apply import run_attention

NAME = "newcompute"


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
    if not hasattr(module, "attention_effects") or module.noise.clean:
        usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return usual(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise ValueError(f"attention with {', '.join(unknown) or 'dropout'} cannot run on simulated hardware")
    causal = module.is_causal if kwargs.get("is_causal") is None else kwargs["is_causal"]
    if attention_mask is None and not causal:
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return run_attention(module, query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)
