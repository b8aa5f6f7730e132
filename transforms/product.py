"""The product of an analog engine: tiles, noise, conversion, and the digital sum.

    y = sum over tiles t of A( x_t w_t^T + e_t ) + b

where a tile is a range of consecutive inputs that one physical array multiplies (all of them where `tile` is 0), e_t its
noise and A the converter: a quantiser of `transforms/quantise.py` over a tracked range.

*Shot noise.* Light carries the product of a weight and an input as photons. With `photons` of them, on average, for a
multiply-accumulate at full scale (|x| = r_x and |w| = r_w, the ranges of the operands), Poisson statistics on the positive
and the negative rail give a sum the variance

    Var e = r_x r_w sum_k |x_k w_k| / photons

which is drawn from a normal distribution (a sum of many Poisson counts).

Backward is straight-through: where the converter clipped a tile's sum, that tile gets no gradient. Of a single tile one bit
for each element is kept for this; the sums of several tiles are computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from transforms.context import Noise
from transforms.effect import Own, RangedEffect, Slots
from transforms.formats import Integer
from transforms.operands import HEADS, LANES, Operand, lane_numbers, positions_and_samples
from transforms.quantise import QuantiseCode, passing
from transforms.quantise import within as inside
from transforms.ranges import Range
from transforms.scales import Scaling, finite_magnitude

Place: TypeAlias = tuple[Tensor | None, Tensor | None]
"""Context and tokens."""
Drawn: TypeAlias = Callable[[Tensor, bool], Tensor]
"""(key, whether normal) -> a random number for each of some sums: normal, or uniform in [0, 1)."""


@dataclass(frozen=True)
class ProductCode(Slots, Operand):
    """What happens to the sums that an array makes, and how wide it is."""

    converter: QuantiseCode | None
    """Over a tracked range."""
    tile: int = 0
    photons: float = 0.0
    blended: bool = False
    """A strength below 1 weakens noise and conversion."""
    weight: Scaling | None = None
    """How devices that share a weight agree on its largest value."""
    first_column: int = 0
    first_tile: int = 0
    """Of the first of these inputs."""
    text: str = field(init=False, compare=False, repr=False)
    """What its kernel depends on besides, as an argument of an operation: levels on each side of 0, whether rounding is
    stochastic, photons. Empty where it has none."""
    of_weight = False
    persistent = False
    rounds = False  # sums inside a product are not counted
    first_row = columns = 0

    def __post_init__(self) -> None:
        code, text = self.converter, ""
        if code is not None and code.scaling.kind == "range" and isinstance(code.form, Integer) and code.form.signed:
            text = json.dumps([code.form.largest, code.stochastic, self.photons])
        object.__setattr__(self, "text", text)

    def has_kernel(self, acc: Tensor) -> bool:
        """Whether one kernel converts these sums, notes the largest and packs what it clips."""
        return acc.is_cuda and self.text != ""

    @property
    def stochastic(self) -> bool:
        return self.photons > 0 or (self.converter is not None and self.converter.stochastic)

    @property
    def slots(self) -> tuple[str, ...]:
        ranged = self.converter is not None
        has = {
            "keys": self.stochastic,
            "used": ranged,
            "seen": ranged,
            "full_scale": self.photons > 0,
            "strength": self.blended,
        }
        return tuple(name for name, present in has.items() if present)

    def tiles(self, width: int) -> Iterator[slice]:
        step = self.tile or width
        return (slice(begin, min(begin + step, width)) for begin in range(0, width, step))

    def converted(
        self, acc: Tensor, own: Own, drawn: Drawn, variance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums after noise and conversion, float32, and which of them were not clipped.

        Args:
            drawn: the random numbers of these sums.
            variance: of the noise.
        """
        acc = acc.float()
        if variance is not None:
            assert own.keys is not None
            noise = variance.sqrt() * drawn(own.keys[2:], True)
            acc = acc + (noise if own.strength is None else noise * own.strength)
        if self.converter is None:
            return acc, None
        uniform = None
        if self.converter.stochastic:
            assert own.keys is not None
            uniform = drawn(own.keys[:2], False)
        assert own.used is not None
        return self.converter.quantised(acc, own, uniform), inside(acc, own.used)

    def convert(
        self, acc: Tensor, own: Sequence[Tensor], place: Place, tile: int = 0, variance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`converted` of the sums (..., out) of a linear layer.

        Args:
            own: as `Product.tensors`.
            place: context and tokens.
        """

        def drawn(key: Tensor, normal: bool) -> Tensor:
            context, tokens = place
            assert context is not None
            position, sample = positions_and_samples(acc, context, tokens)
            if acc.dim() > 3 and self.first_tile + tile >= LANES // HEADS:
                raise ValueError(
                    f"inputs of heads, {tuple(acc.shape)}, may have {LANES // HEADS} tiles: choose a larger tile"
                )
            lanes = torch.full_like(position, self.first_tile + tile)
            where = (position, sample, context[0])
            whole = lane_numbers(key, lanes, self.first_column + acc.shape[-1], where, normal)
            return whole[..., self.first_column :]  # those of the columns that stand here

        return self.converted(acc, self.read(own), drawn, variance)

    def through(
        self, acc: Tensor, own: Sequence[Tensor], place: Place, observing: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The conversion of finished sums, in their dtype, and which of them were not clipped."""
        if self.has_kernel(acc):
            return kernels.convert(self, acc, own, place, observing)
        if observing:
            self.observe(acc, own)
        found, kept = self.convert(acc, own, place)
        return found.to(acc.dtype), kept

    def observe(self, acc: Tensor, own: Sequence[Tensor]) -> None:
        seen = self.read(own).seen
        if seen is not None and acc.numel():
            seen.copy_(torch.maximum(seen, finite_magnitude(acc.detach()).amax().float()))

    def multiply(
        self, x: Tensor, weight: Tensor, own: Sequence[Tensor], place: Place, observing: bool
    ) -> tuple[Tensor, Tensor | None]:
        """x (..., in) and weight (out, in) -> the sum (..., out), and which sums were not clipped, packed; of several tiles
        the backward finds that out again, since one bit for each of them would be more than the sum itself."""
        total, packed, parts = None, None, list(self.tiles(x.shape[-1]))
        full_scale = self.full_scale(weight, own)
        for i, part in enumerate(parts):
            acc, magnitudes = self.tile_sum(x[..., part], weight[:, part])
            if self.has_kernel(acc):
                last = i + 1 == len(parts)
                options: dict[str, Any] = {"tile": i, "total": total, "single": not last, "packs": not self.tile}
                options |= {"magnitudes": magnitudes, "full_scale": full_scale}
                total, packed = kernels.convert(self, acc, own, place, observing, **options)
                continue
            if observing:
                self.observe(acc, own)
            converted, kept = self.convert(acc, own, place, i, self.variance(full_scale, magnitudes))
            total = converted if total is None else total + converted
            packed = None if kept is None or self.tile else pack(kept)
        assert total is not None
        return total.to(x.dtype), None if self.tile else packed

    def full_scale(self, weight: Tensor, own: Sequence[Tensor]) -> Tensor | None:
        """What the largest input and weight multiply to, for shot noise."""
        of_input = self.read(own).full_scale
        if of_input is None:
            return None
        assert self.weight is not None
        return of_input * self.weight.largest(weight)

    def tile_sum(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum of one tile, and for shot noise that of magnitudes."""
        return F.linear(x, weight), F.linear(x.abs(), weight.abs()) if self.photons else None

    def variance(self, full_scale: Tensor | None, magnitudes: Tensor | None) -> Tensor | None:
        """Of the noise on a sum."""
        return None if magnitudes is None or full_scale is None else full_scale * magnitudes.float() / self.photons

    def gradients(
        self,
        grad: Tensor,
        multiplied: tuple[Tensor, Tensor],
        chosen: tuple[Tensor, Tensor],
        packed: Tensor | None,
        own: Sequence[Tensor],
        place: Place,
    ) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """Functions that give the gradients of x and of the weight; each is computed only if called.

        Args:
            multiplied: x and weight of the forward's product.
            chosen: those of the gradients' products.
            packed: as `multiply` returned it.
        """
        parts = list(self.tiles(multiplied[0].shape[-1]))
        x, weight = multiplied
        kept: list[Tensor | None] = [None] * len(parts)
        if packed is not None:
            kept = [unpack(packed, grad.shape[-1])]
        elif self.tile and self.converter is not None:
            full_scale = self.full_scale(weight, own)
            for i, part in enumerate(parts):
                acc, magnitudes = self.tile_sum(x[..., part], weight[:, part])
                if self.has_kernel(acc):
                    _, kept[i] = kernels.convert(
                        self, acc, own, place, False, tile=i, magnitudes=magnitudes, full_scale=full_scale
                    )
                else:
                    kept[i] = self.convert(acc, own, place, i, self.variance(full_scale, magnitudes))[1]
        masked = [passing(grad, mask, self.read(own).strength) for mask in kept]
        x, weight = chosen

        def of_x() -> Tensor:
            return torch.cat([g @ weight[:, part] for g, part in zip(masked, parts)], -1)

        def of_weight() -> Tensor:
            flat = [g.reshape(-1, g.shape[-1]).t() for g in masked]
            return torch.cat([g @ x[..., part].reshape(g.shape[1], -1) for g, part in zip(flat, parts)], -1)

        return of_x, of_weight


_BITS = 32


def pack(mask: Tensor) -> Tensor:
    """(..., N) bool as (..., N / 32) int32, the last filled up. Words, not bytes: Inductor vectorises them on CPU."""
    missing = -mask.shape[-1] % _BITS
    bits = F.pad(mask, (0, missing)) if missing else mask
    place = torch.arange(_BITS, device=mask.device, dtype=torch.int32)
    return (bits.unflatten(-1, (-1, _BITS)).to(torch.int32) << place).sum(-1, dtype=torch.int32)


def unpack(packed: Tensor, width: int) -> Tensor:
    """What was packed."""
    place = torch.arange(_BITS, device=packed.device, dtype=torch.int32)
    return ((packed[..., None] >> place) & 1).flatten(-2)[..., :width] != 0


class Product(RangedEffect):
    """The module of a `ProductCode`.

    Args:
        range_: of the converter.
        operands: whose ranges make the full scale of shot noise, but for that of a linear layer's weight.
    """

    kinds = ("", " noise")

    def __init__(
        self,
        noise: Noise,
        name: str,
        code: ProductCode,
        stream: str = "",
        range_: Range | None = None,
        operands: Sequence[Range] = (),
        role: str = "acc",
    ):
        super().__init__(noise, name, role, code, stream, range_)
        self.of_operands = tuple(operands)  # other modules'

    @property
    def full_scale(self) -> Tensor:
        """Product of the operands' ranges, (1,) float32."""
        return torch.stack([range_.in_use for range_ in self.of_operands]).prod(0)


if torch.cuda.is_available():
    # Triton is imported only where it can run; it comes last, since the kernels import the code above.
    from transforms.kernels import convert as kernels
