"""Ranges that converters and quantisers work with: tracked from the largest value seen, or learned from there.

The range in use is frozen during a step. A forward only notes the largest magnitude it sees, before any clipping, so that a
range can grow; at the end of the step all devices take the maximum of what they saw, one exchange for all ranges, and the
range in use moves: to the first maximum at once, then by an exponential moving average. A learned one stays where the
first step put it, times a factor whose logarithm is a parameter. Until something was seen a range is 0, and what it
belongs to passes values unchanged: so the first step of a run trains as if it were clean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

LARGEST_STEP = 16.0
"""How many times a tracked range a step's largest value counts for at most."""


class Range(nn.Module):
    """One range.

    Args:
        decay: what is left of the last range in the moving average.
        factor: (1,) the logarithm of the factor on a learned range; None where it is tracked.
    """

    used: Tensor
    seen: Tensor

    def __init__(self, decay: float, factor: nn.Parameter | None = None):
        super().__init__()
        self.decay = decay
        self.register_buffer("used", torch.zeros(1), persistent=False)
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.register_parameter("log_range", factor)

    @property
    def tensors(self) -> list[Tensor]:
        if self.log_range is None:
            return [self.used, self.seen]
        factor = self.log_range
        if isinstance(factor, DTensor):  # each tensor-parallel device has a part of its gradient
            from torch.distributed.tensor import Partial

            factor = factor.to_local(grad_placements=[Partial()])
        return [self.used, self.seen, factor]

    @property
    def in_use(self) -> Tensor:
        """(1,) float32, without a gradient."""
        tensors = self.tensors
        return self.used if self.log_range is None else self.used * tensors[2].detach().float().exp()

    def next(self, seen: Tensor) -> Tensor:
        """The range to use after a step in which `seen` was the largest value, 0 where nothing was looked at."""
        if self.log_range is not None:
            moved = self.used
        else:
            # A single value out of all proportion, such as a bit error makes, must not end a layer.
            moved = self.decay * self.used + (1 - self.decay) * torch.minimum(seen, LARGEST_STEP * self.used)
        moved = torch.where(self.used > 0, moved, seen)
        return torch.where((seen > 0) & torch.isfinite(seen), moved, self.used)

    @torch.no_grad()
    def reset(self) -> None:
        """Nothing is known yet."""
        if not self.used.is_meta:
            self.used.zero_()
            self.seen.zero_()
