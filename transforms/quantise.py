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
from transforms.effect import Code, Effect
from transforms.formats import Format
from transforms.operands import Operand, uniforms
from transforms.ranges import Range
from transforms.scales import Scaling


@dataclass(frozen=True)
class QuantiseCode(Code, Operand):
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
    def saves_value(self) -> bool:
        return self.tracked or self.learned or self.fixed > 0

    def unpack(self, own: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """(key, range in use, logarithm of its learned factor, strength) among the effect's own tensors."""
        rest = list(own)
        key = rest.pop(0) if self.stochastic else None
        range_ = factor = strength = None
        if self.tracked or self.learned:
            range_ = rest.pop(0)
            rest.pop(0)  # what was seen
        if self.learned:
            factor = rest.pop(0)
        if self.blended:
            strength = rest.pop(0)
        return key, range_, factor, strength

    def quantised(self, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        """The rounded values in float32, and the range beyond which they saturate, (1,) float32, or None."""
        *own, context, tokens = rest
        key, range_, factor, strength = self.unpack(tuple(own))
        exact = value.float()
        if range_ is not None and factor is not None:
            range_ = range_ * factor.float().exp()
        if self.fixed:
            range_ = torch.full((1,), self.fixed, device=value.device)
        uniform = None
        if key is not None:
            uniform = self.scaling.blocks(uniforms(self, value, key, context, tokens))
        blocks = self.scaling.blocks(exact)
        scale = self.scaling.scale(blocks, self.form, range_)
        found = self.scaling.unblocked(self.form.round(blocks / scale, uniform) * scale, value.shape[-1])
        if self.floor:
            least = self.floor * (scale * self.form.max)
            found = torch.where((found != 0) & (found.abs() < least), torch.copysign(least, found), found)
        if range_ is not None:
            # Before anything was seen nothing is known of the range: the value passes.
            found = torch.where(range_ > 0, found, exact)
        if strength is not None:
            found = torch.where(strength < 1, torch.lerp(exact, found, strength), found)
        return found, range_

    def forward(self, value: Tensor, *rest: Any) -> Tensor:
        return self.quantised(value, *rest)[0].to(value.dtype)

    def regenerate(self, value: Tensor, *rest: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        found, range_ = self.quantised(value, *rest)
        if range_ is None:
            return found.to(value.dtype), lambda grad: grad
        inside = (value.abs() <= range_) | (range_ <= 0)
        strength = self.unpack(tuple(rest[:-2]))[3]
        # While warming up the part of a value that passes unchanged does so beyond the range as well.
        unchanged = 0.0 if strength is None else 1 - strength

        def pull(grad: Tensor) -> Any:
            passed = torch.where(inside, grad, (grad * unchanged).to(grad.dtype))
            if not self.learned:
                return passed
            exact = value.float()
            slope = torch.where(range_ > 0, torch.where(inside, found - exact, found - unchanged * exact), 0)
            total = (grad.float() * slope).sum() / math.sqrt(self.form.max * self.features)
            grads: list[Tensor | None] = [None] * (len(rest) - 2)
            grads[-2 if self.blended else -1] = total.view(1)
            return passed, grads

        return found.to(value.dtype), pull

    def observe(self, value: Tensor, *rest: Any) -> None:
        if not (self.tracked or self.learned) or value.numel() == 0:
            return
        seen = rest[2 if self.stochastic else 1]
        magnitude = value.detach().abs()
        if self.learned and self.of_weight:
            # LSQ's first step, 2 mean|w| / sqrt(n), as a range.
            found = 2 * math.sqrt(self.form.max) * self.scaling.mean(magnitude)
        else:
            found = magnitude.amax().float()
        seen.copy_(torch.maximum(seen, found))


class Quantise(Effect):
    """The module of a `QuantiseCode`.

    Args:
        range_: what is tracked or learned, where the scale is a range.
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
        super().__init__(noise, name, role, stream)
        self.code, self.transposed = code, transposed
        if range_ is not None:
            # Named by what it belongs to, not by its place among the effects, which adapters shift (`parallel/names.py`).
            self.add_module(f"range_{role}{stream}", range_)
        self.of_range = (range_,)
        if code.stochastic:
            self.register_buffer("table", torch.empty(2, dtype=torch.int64), persistent=False)
        if code.blended:
            self.register_buffer("strength", torch.ones(1), persistent=False)
        if range_ is not None:
            noise.track(self.label, range_)

    @property
    def range(self) -> Range | None:
        return self.of_range[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        own = [self.table] if self.code.stochastic else []
        own += self.range.tensors if self.range is not None else []
        own += [self.strength] if self.code.blended else []
        return tuple(own)

    def forward(self, value: Tensor) -> Tensor:
        """As a parametrization, for those who look at the weight."""
        if self.noise.clean:
            return value
        rest = (*self.tensors, *self.noise.place())
        return self.code.forward(value.t(), *rest).t() if self.transposed else self.code.forward(value, *rest)

    @property
    def noted(self) -> int | None:
        return self.code.stochastic + 1 if self.range is not None else None

    def fill(self, seed: int, phase: str) -> None:
        if self.code.stochastic:
            self.write(self.table, self.key(seed, phase))
        if self.code.blended:
            self.set_strength(1.0)

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        if self.code.blended and not self.strength.is_meta:
            self.strength.fill_(strength)


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
