"""Next-token cross-entropy as a sum, so that any split of a batch adds up to the same loss."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Target that no loss is computed for (padding rows of the last validation batch)."""


def next_token_loss_sum(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Sum over valid targets of -log softmax(logits)[target], in float32 nats; a scalar.

    Divide by the number of valid targets in the whole global batch, over all ranks and micro-batches: a mean per
    micro-batch would weigh tokens unequally. Compiled, the float32 copy of the logits is never written to memory.
    """
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")


def inputs_and_targets(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Split rows (B, T + 1) into inputs and next-token targets (B, T); ignored positions read token 0."""
    return rows[:, :-1].clamp(min=0), rows[:, 1:].contiguous()
