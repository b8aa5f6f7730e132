"""Number formats of few bits: rounding to their grid, and their codes.

A format knows nothing of scales: values come already divided by one. Rounding is to the nearest, ties to even (between two
powers of two without mantissa bits, where no digit is even, to the larger: IEEE 754-2019, section 4.3.1), and saturates,
infinity too; NaN remains. Where uniform numbers are given rounding is stochastic: up with the probability that makes the
mean exact.

Floating point follows IEEE 754 down to subnormals. E4M3 and E5M2 have the special codes of the OCP 8-bit specification
(revision 1.0: E4M3 up to 448 with a NaN and no infinity, E5M2 up to 57344 with both); every other eXmY uses all its codes
for finite numbers, as the OCP Microscaling specification (v1.0, section 5.3) has it for E3M2, E2M3 and E2M1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_FLOAT32_BIAS = 127


@dataclass(frozen=True)
class Integer:
    """Symmetric integers -n to n, or 0 to n where not signed."""

    largest: int
    signed: bool = True

    @property
    def bits(self) -> int:
        return self.largest.bit_length() + self.signed

    @property
    def max(self) -> float:
        return float(self.largest)

    def round(self, value: Tensor, uniform: Tensor | None = None) -> Tensor:
        """The value's neighbour on the grid, float32."""
        rounded = torch.round(value) if uniform is None else torch.floor(value + uniform)
        return rounded.clamp(-self.max if self.signed else 0.0, self.max)

    def encode(self, rounded: Tensor) -> Tensor:
        """The code, two's complement in the low bits of int32, of values on the grid; NaN is stored as 0."""
        return torch.where(rounded == rounded, rounded, 0.0).to(torch.int32)

    def decode(self, code: Tensor) -> Tensor:
        """The value of a code, float32. Two's complement has one code more than the grid, -n - 1, which faults can make."""
        mask = (1 << self.bits) - 1
        sign = 1 << (self.bits - 1) if self.signed else 0
        return (((code & mask) ^ sign) - sign).to(torch.float32)


@dataclass(frozen=True)
class Float:
    """A sign, `exponent` bits and `mantissa` bits."""

    exponent: int
    mantissa: int
    special: str = ""
    """ "nan": the all-ones code is NaN (E4M3); "ieee": the highest exponent is for infinity and NaN (E5M2)."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def max_exponent(self) -> int:
        """Of the largest number."""
        top = (1 << self.exponent) - 1 - self.bias
        return top - 1 if self.special == "ieee" or (self.special == "nan" and not self.mantissa) else top

    @property
    def max(self) -> float:
        steps = (2 << self.mantissa) - (2 if self.special == "nan" else 1)
        return float(steps * 2.0 ** (self.max_exponent - self.mantissa))

    def _exponent_and_step(self, magnitude: Tensor) -> tuple[Tensor, Tensor]:
        """The exponent with which each magnitude is written, and the distance of its neighbours there."""
        exponent = (magnitude.view(torch.int32) >> 23) - _FLOAT32_BIAS
        exponent = exponent.clamp(1 - self.bias, self.max_exponent)
        return exponent, ((exponent - self.mantissa + _FLOAT32_BIAS) << 23).view(torch.float32)

    def round(self, value: Tensor, uniform: Tensor | None = None) -> Tensor:
        """The value's neighbour on the grid, float32; beyond the largest number that one, NaN remains."""
        magnitude = value.abs()
        _, step = self._exponent_and_step(magnitude)
        steps = magnitude / step  # exact, step is a power of two
        steps = torch.round(steps) if uniform is None else torch.floor(steps + uniform)
        return torch.copysign((steps * step).clamp(max=self.max), value)

    def encode(self, rounded: Tensor) -> Tensor:
        """The code, in the low bits of int32, of values on the grid."""
        magnitude = rounded.abs()
        exponent, step = self._exponent_and_step(magnitude)
        # With subnormals the codes of magnitudes count on through all binades.
        code = (magnitude / step).to(torch.int32) + ((exponent + self.bias - 1) << self.mantissa)
        code = torch.where(magnitude == magnitude, code, (1 << (self.bits - 1)) - 1)
        return code | torch.signbit(rounded).to(torch.int32) << (self.bits - 1)

    def decode(self, code: Tensor) -> Tensor:
        """The value of a code, float32; of special codes infinity and NaN."""
        field = (code >> self.mantissa) & ((1 << self.exponent) - 1)
        fraction = code & ((1 << self.mantissa) - 1)
        normal = field > 0
        steps = torch.where(normal, fraction + (1 << self.mantissa), fraction).to(torch.float32)
        exponent = torch.where(normal, field, 1) - self.bias - self.mantissa
        value = steps * ((exponent + _FLOAT32_BIAS) << 23).view(torch.float32)
        highest = field == (1 << self.exponent) - 1
        if self.special == "ieee":
            value = torch.where(highest, torch.where(fraction == 0, torch.inf, torch.nan), value)
        if self.special == "nan":
            value = torch.where(highest & (fraction == (1 << self.mantissa) - 1), torch.nan, value)
        return torch.where((code >> (self.bits - 1)) & 1 == 1, -value, value)


Format = Integer | Float

INTEGER = re.compile(r"int([2-8])")
FLOAT = re.compile(r"(?:fp8_)?e([1-7])m(\d)")
_MICROSCALING = {
    "mxfp8_e4m3": "e4m3",
    "mxfp8_e5m2": "e5m2",
    "mxfp6_e3m2": "e3m2",
    "mxfp6_e2m3": "e2m3",
    "mxfp4": "e2m1",
}


@cache
def named(name: str) -> Format:
    """The elements of a format by its name in a configuration, for instance "int4", "ternary", "e3m2" or "mxfp6_e3m2".

    Raises:
        ValueError: there is no such format.
    """
    if name == "ternary":
        return Integer(1)
    name = _MICROSCALING.get(name, "e2m1" if name == "nvfp4" else name)
    if match := INTEGER.fullmatch(name):
        return Integer((1 << (int(match[1]) - 1)) - 1)
    match = FLOAT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no number format: int2 to int8, ternary, fp8_e4m3, eXmY, mxfp4, nvfp4, ...")
    exponent, mantissa = int(match[1]), int(match[2])
    return Float(exponent, mantissa, {(4, 3): "nan", (5, 2): "ieee"}.get((exponent, mantissa), ""))
