"""Scales: what a value is divided by before it is rounded to a format of few bits.

A scale belongs to a tensor, to a row (an output channel of a weight, a token of an activation), or to a block of
neighbours along the row. It comes from the values themselves, so that the largest finite one just fits, or from a range
that is tracked or learned (`transforms/ranges.py`). Where a row or a tensor is split over tensor-parallel devices they
agree on its largest value, and so all layouts round alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor

from transforms.formats import Float, Format, named

_E4M3 = named("fp8_e4m3")
_SMALLEST = torch.finfo(torch.float32).tiny
_FLOAT32_BIAS = 127
_E8M0 = (-127, 127)
"""Exponents of the shared scale of a microscaling block (OCP Microscaling v1.0, section 5.4.1)."""


def finite_magnitude(value: Tensor) -> Tensor:
    """|value|, with 0 in place of infinity and NaN: neither may set the scale or the range of its neighbours."""
    magnitude = value.abs()
    if torch.compiler.is_compiling():  # one comparison, fused into the reduction that follows
        return torch.where(magnitude < torch.inf, magnitude, 0)
    return torch.nan_to_num_(magnitude, 0.0, 0.0)  # one pass without new memory (docs/log.md)


@dataclass(frozen=True)
class Scaling:
    """How values get their scale: `kind` is "none", "tensor", "row", "block", "mean" (of magnitudes, per tensor),
    "power" (of two, per block: OCP Microscaling v1.0, section 6.3), "two_level" (NVFP4) or "range"."""

    kind: str
    block: int = 0
    """Neighbours that share a scale, where it is one of blocks."""
    of_weight: bool = False
    group: str = ""
    """Name of the process group over which the tensor is split; empty where it is whole."""
    rows_split: bool = False
    """Whether each of those processes has a part of every row."""
    elements: int = 0
    """Of the unsharded weight, for its mean."""
    least: float = 0.0
    """Smallest value of what a scale is made from."""

    def blocks(self, value: Tensor) -> Tensor:
        """(..., K) as (..., blocks, block), the last filled up with zeros; unchanged where scales are not of blocks."""
        if not self.block:
            return value
        missing = -value.shape[-1] % self.block
        value = F.pad(value, (0, missing)) if missing else value
        return value.unflatten(-1, (-1, self.block))

    def unblocked(self, blocks: Tensor, width: int) -> Tensor:
        """What `blocks` came from."""
        return blocks.flatten(-2)[..., :width] if self.block else blocks

    def scale(self, blocks: Tensor, form: Format, range_: Tensor | None) -> Tensor:
        """Float32, broadcasts against `blocks`.

        Args:
            blocks: float32, as `blocks` has made them.
            range_: (1,) the largest value that a format shall hold, where `kind` is "range".
        """
        if self.kind == "range":
            assert range_ is not None
            return (range_ / form.max).clamp(min=_SMALLEST)
        if self.kind == "none":
            return blocks.new_ones(1)
        if self.kind == "mean":
            return self.mean(blocks).clamp(min=self.least)
        if self.kind == "tensor":
            return self._fitting(self.largest(blocks), form)
        largest = finite_magnitude(blocks).amax(-1, keepdim=True)
        if self.kind == "row":
            return self._fitting(self._agreed(largest, "max") if self.rows_split else largest, form)
        if self.kind == "block":
            return self._fitting(largest, form)
        assert isinstance(form, Float)
        if self.kind == "power":
            # A float32 subnormal reads as exponent -127 here and ends at the smallest scale, which is right for it.
            exponent = (largest.view(torch.int32) >> 23) - _FLOAT32_BIAS - form.max_exponent
            field = exponent.clamp(*_E8M0) + _FLOAT32_BIAS
            return torch.where(field > 0, field << 23, 1 << 22).view(torch.float32)  # 2^-127 is itself subnormal
        return self._two_level(blocks, largest, form)

    def divided(self, blocks: Tensor, scale: Tensor) -> Tensor:
        """The blocks over their scale."""
        if self.kind != "power":
            return blocks / scale
        # A product with the inverse, as exact: the inverse of a subnormal scale is an ordinary number, so that a device
        # that flushes subnormals still divides 0 by something other than 0. No format has scales so large that it is not.
        inverse = (2 * _FLOAT32_BIAS - (scale.view(torch.int32) >> 23)) << 23
        return blocks * inverse.view(torch.float32)

    def largest(self, value: Tensor) -> Tensor:
        """Largest finite magnitude in the whole tensor, a scalar."""
        return self._agreed(finite_magnitude(value).amax(), "max")

    def mean(self, value: Tensor) -> Tensor:
        """Mean magnitude of the whole tensor; infinity and NaN count as 0. Summed in float64: in whatever order devices and
        kernels sum, the float32 result is equal."""
        total = self._agreed(finite_magnitude(value).sum(dtype=torch.float64), "sum")
        return (total / (self.elements or value.numel())).float()

    def sum(self, of_rows: Tensor) -> Tensor:
        """The sums of whole rows, from those of what is here of them."""
        return self._agreed(of_rows, "sum") if self.rows_split else of_rows

    def _fitting(self, largest: Tensor, form: Format) -> Tensor:
        return (largest.clamp(min=self.least) / form.max).clamp(min=_SMALLEST)

    def _two_level(self, blocks: Tensor, largest: Tensor, form: Format) -> Tensor:
        """A block's scale is itself stored as E4M3, relative to one of the tensor or, for activations, of the row."""
        inner = _E4M3
        if self.of_weight:
            whole = self._agreed(largest.amax(), "max")
        else:
            whole = largest.amax(-2, keepdim=True)
            whole = self._agreed(whole, "max") if self.rows_split else whole
        outer = whole / (form.max * inner.max)
        outer = torch.where(outer > 0, outer, 1.0)
        scale = inner.round(largest / form.max / outer)
        return torch.where(scale > 0, scale, 1.0) * outer

    def _agreed(self, value: Tensor, how: str) -> Tensor:
        """The maximum or sum over the devices that share the tensor."""
        if not self.group:
            return value
        result = funcol.all_reduce(value, how, self.group)
        return result.wait() if isinstance(result, funcol.AsyncCollectiveTensor) else result
