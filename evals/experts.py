"""Hardware effects on the experts of transformers models, through its registry of functions for experts.

A model with such effects is switched to the registered function, which routes each expert's tokens through the expert's own
layers (`transforms/experts.py`): their weights, inputs and outputs are those of the hardware as in any other layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations.moe import ExpertsInterface

from transforms.experts import tokens_of, with_effects
from transforms.layers import Place, forward

NAME = "newcompute"


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As transformers calls it: hidden_states (tokens, hidden), the experts of each token and their weights (tokens, k)."""
    out = torch.zeros_like(hidden_states)
    for number in top_k_index.unique().tolist():
        if number >= module.num_experts:
            continue  # a token's place that no expert takes
        rows, nth = torch.where(top_k_index == number)
        x = _linear(
            module, "gate_up_proj" if module.has_gate else "up_proj", number, hidden_states[rows], rows, hidden_states
        )
        x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
        x = _linear(module, "down_proj", number, x, rows, hidden_states)
        if getattr(module, "has_post_expert_norm", False):
            x = module.post_expert_norm(x)
        out.index_add_(0, rows, (x * top_k_weights[rows, nth, None]).to(out.dtype))
    return out


def _linear(module: Any, parameter: str, number: int, x: Tensor, rows: Tensor, batch: Tensor) -> Tensor:
    """One expert's matmul of its rows of a batch."""
    expert = with_effects(module, parameter, number)
    if expert is not None:
        place: Place = tokens_of(expert.noise.place(), rows, len(batch))
        return forward(expert, x[None], place)[0]
    weight = getattr(module, parameter)[number]
    bias = getattr(module, f"{parameter}_bias")[number] if module.has_bias else None
    return F.linear(x, weight.t() if module.is_transposed else weight, bias)


ExpertsInterface.register(NAME, experts)
