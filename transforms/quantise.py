"""Rounding an operand to a format of few bits, as a memory holds it or a converter passes it on.

    T(x) = s round(x / s)

with the grid of `transforms/formats.py` and the scale s of `transforms/scales.py`. Backward is straight-through: the
gradient passes where |x| is within the range that the format holds, which is everywhere where the scale comes from the
values themselves.

With a learned range r (the step is r / n) the logarithm of r has the gradient of Esser et al., "Learned step size
quantization" (ICLR 2020, equation 3): r dT/dr = T(x) - x within the range and T(x) beyond, times 1 / sqrt(n N) for N
values (features of an activation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transforms.context import Noise
from transforms.effect import Code, Own, RangedEffect, Slots
from transforms.formats import Format
from transforms.operands import Operand, uniforms
from transforms.ranges import Range
from transforms.scales import Scaling, finite_magnitude


@dataclass(frozen=True)
class QuantiseCode(Code, Slots, Operand):
    rounds = True
    form: Format
    scaling: Scaling
    stochastic: bool = False
    floor: float = 0.0
    """Of the range: smaller values than this but 0 become it, in magnitude."""
    fixed: float = 0.0
    """A range that is known; 0 where it is tracked or learned."""
    tracked: bool = False
    learned: bool = False
    blended: bool = False
    """A strength below 1 can pass a part of the value unchanged."""
    of_weight: bool = False
    first_row: int = 0
    first_column: int = 0
    columns: int = 0
    features: int = 0
    """Values that share a learned range, for its gradient."""
    persistent = False

    @property
    def slots(self) -> tuple[str, ...]:
        ranged = self.tracked or self.learned
        has = {
            "keys": self.stochastic,
            "used": ranged,
            "seen": ranged,
            "log_range": self.learned,
            "strength": self.blended,
        }
        return tuple(name for name, present in has.items() if present)

    def range_of(self, own: Own, device: torch.device) -> Tensor | None:
        """(1,) float32, the largest magnitude that the format holds; None where that follows from the values."""
        if self.fixed:
            return torch.full((1,), self.fixed, device=device)
        if own.used is None or own.log_range is None:
            return own.used
        return own.used * own.log_range.float().exp()

    def codes(self, value: Tensor, own: Own, uniform: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The numbers that a value is rounded to, in blocks where scales are of blocks, and their scale; both float32."""
        blocks = self.scaling.blocks(value.float())
        scale = self.scaling.scale(blocks, self.form, self.range_of(own, value.device))
        uniform = None if uniform is None else self.scaling.blocks(uniform)
        return self.form.round(self.scaling.divided(blocks, scale), uniform), scale

    def quantised(self, value: Tensor, own: Own, uniform: Tensor | None) -> Tensor:
        """The value after rounding, float32."""
        exact, range_ = value.float(), self.range_of(own, value.device)
        codes, scale = self.codes(value, own, uniform)
        found = self.scaling.unblocked(codes * scale, value.shape[-1])
        if self.floor:
            least = self.floor * (scale * self.form.max)
            found = torch.where((found != 0) & (found.abs() < least), torch.copysign(least, found), found)
        if range_ is not None:
            # Before anything was seen nothing is known of the range: the value passes.
            found = torch.where(range_ > 0, found, exact)
        if own.strength is not None:
            found = torch.where(own.strength < 1, torch.lerp(exact, found, own.strength), found)
        return found

    def _rounded(self, value: Tensor, own: Own, context: Tensor, tokens: Tensor | None) -> Tensor:
        uniform = None if own.keys is None else uniforms(self, value, own.keys, context, tokens)
        return self.quantised(value, own, uniform)

    def forward(self, value: Tensor, *rest: Any) -> Tensor:
        return self._rounded(value, self.read(rest[:-2]), *rest[-2:]).to(value.dtype)

    def regenerate(self, value: Tensor, *rest: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        own = self.read(rest[:-2])
        rounded, range_ = self._rounded(value, own, *rest[-2:]), self.range_of(own, value.device)
        if range_ is None:
            return rounded.to(value.dtype), lambda grad: grad
        inside = within(value, range_)

        def pull(grad: Tensor) -> Any:
            passed = passing(grad, inside, own.strength)
            if not self.learned:
                return passed
            exact = value.float()
            beyond = rounded
            if own.strength is not None:  # at full strength no part of an infinite value is left
                beyond = torch.where(own.strength < 1, rounded - (1 - own.strength) * exact, rounded)
            slope = torch.where(range_ > 0, torch.where(inside, rounded - exact, beyond), 0)
            total = (grad.float() * slope).sum() / math.sqrt(self.form.max * self.features)
            grads: list[Tensor | None] = [None] * len(self.slots)
            grads[self.slots.index("log_range")] = total.view(1)
            return passed, grads

        return rounded.to(value.dtype), pull

    def observe(self, value: Tensor, *rest: Any) -> None:
        seen = self.read(rest[:-2]).seen
        if seen is None or value.numel() == 0:
            return
        if self.learned and self.of_weight:
            # LSQ's first step, 2 mean|w| / sqrt(n), as a range.
            found = 2 * math.sqrt(self.form.max) * self.scaling.mean(value.detach())
        else:
            found = finite_magnitude(value.detach()).amax().float()
        seen.copy_(torch.maximum(seen, found))


def within(value: Tensor, range_: Tensor) -> Tensor:
    """Which values a range holds; all, before it is known."""
    return (value.abs() <= range_) | (range_ <= 0)


def passing(grad: Tensor, inside: Tensor | None, strength: Tensor | None) -> Tensor:
    """The straight-through gradient of what was rounded: none where it was clipped, but for the part that passes unchanged
    while the effect warms up."""
    if inside is None:
        return grad
    return torch.where(inside, grad, 0 if strength is None else (grad * (1 - strength)).to(grad.dtype))


class Quantise(RangedEffect):
    """The module of a `QuantiseCode`.

    Args:
        range_: what is tracked or learned, where the scale is a range.
        transposed: the weight is stored (in, out).
    """

    def __init__(
        self,
        noise: Noise,
        name: str,
        role: str,
        code: QuantiseCode,
        stream: str = "",
        range_: Range | None = None,
        transposed: bool = False,
    ):
        super().__init__(noise, name, role, code, stream, range_)
        self.transposed = transposed

    def forward(self, value: Tensor) -> Tensor:
        """As a parametrization, for those who look at the weight."""
        if self.noise.clean:
            return value
        rest = (*self.tensors, *self.noise.place())
        return self.code.forward(value.t(), *rest).t() if self.transposed else self.code.forward(value, *rest)


@dataclass(frozen=True)
class NormCode(Code):
    """x / sqrt(mean x^2 + eps) over the features of a token: RMSNorm without weights."""

    eps: float
    features: int
    scaling: Scaling
    """How devices that have a part of the features each agree on the sum."""

    def _inverse(self, value: Tensor) -> Tensor:
        squares = self.scaling.sum(value.float().square().sum(-1, keepdim=True))
        return torch.rsqrt(squares / self.features + self.eps)

    def forward(self, value: Tensor, *rest: Any) -> Tensor:
        return (value.float() * self._inverse(value)).to(value.dtype)

    def regenerate(self, value: Tensor, *rest: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        inverse = self._inverse(value)
        normed = value.float() * inverse

        def pull(grad: Tensor) -> Tensor:
            grad = grad.float()
            along = self.scaling.sum((grad * normed).sum(-1, keepdim=True)) / self.features
            return ((grad - normed * along) * inverse).to(value.dtype)

        return normed.to(value.dtype), pull


class Norm(nn.Module):
    """The module of a `NormCode`.

    Args:
        hardware: it is switched off with the hardware. Of a model that was trained with it, it is a part, and stays.
    """

    tensors: tuple[Tensor, ...] = ()

    def __init__(self, code: NormCode, hardware: bool):
        super().__init__()
        self.code, self.hardware = code, hardware
