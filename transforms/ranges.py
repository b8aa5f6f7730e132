"""Ranges that converters and quantisers work with: tracked from the largest value seen, or learned from there.

The range in use is frozen during a step. A forward only notes the largest finite magnitude it sees, before any clipping, so
that a range can grow; at the end of the step all devices take the maximum of what they saw, one exchange for all ranges, and the
range in use moves: to the first maximum at once, then by an exponential moving average. A learned one stays where the
first step put it, times a factor whose logarithm is a parameter. Until something was seen a range is 0, and what it
belongs to passes values unchanged: so the first step of a run trains as if it were clean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

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
            factor = factor.to_local(grad_placements=[Partial()])
        return [self.used, self.seen, factor]

    @property
    def in_use(self) -> Tensor:
        """(1,) float32, without a gradient."""
        tensors = self.tensors
        return self.used if self.log_range is None else self.used * tensors[2].detach().float().exp()

    @torch.no_grad()
    def reset(self) -> None:
        """Nothing is known yet."""
        if not self.used.is_meta:
            self.used.zero_()
            self.seen.zero_()


class Moves:
    """How ranges move at the end of a step: all in a few operations, however many they are."""

    def __init__(self, ranges: Sequence[Range]):
        self.used, self.seen = [range_.used for range_ in ranges], [range_.seen for range_ in ranges]
        # A learned one stays where the first step put it.
        decay = [1.0 if range_.log_range is not None else range_.decay for range_ in ranges]
        self.decay = torch.tensor(decay, device=self.used[0].device)

    @torch.no_grad()
    def move(self, agree: Callable[[Tensor], Tensor]) -> None:
        """
        Args:
            agree: takes (n,) float32, the largest values that this device has seen, to those of all devices.
        """
        seen, used = torch.cat(self.seen), torch.cat(self.used)
        # NaN is not ordered: which one a maximum over processes gives depends on their order.
        seen = agree(torch.where(seen.isnan(), torch.inf, seen))
        # A single value out of all proportion, such as a bit error makes, must not end a layer.
        moved = self.decay * used + (1 - self.decay) * torch.minimum(seen, LARGEST_STEP * used)
        moved = torch.where(used > 0, moved, seen)
        # 0: nothing was looked at.
        moved = torch.where((seen > 0) & torch.isfinite(seen), moved, used)
        torch._foreach_copy_(self.used, list(moved.split(1)))
        torch._foreach_zero_(self.seen)
