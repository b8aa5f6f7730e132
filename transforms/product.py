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
from transforms.effect import Effect
from transforms.formats import Integer
from transforms.noise import stream_key
from transforms.operands import Draw, Operand, lane_normals, lane_uniforms, positions_and_samples
from transforms.quantise import QuantiseCode
from transforms.ranges import Range
from transforms.scales import Scaling

Place: TypeAlias = tuple[Tensor | None, Tensor | None]
"""Context and tokens."""


@dataclass(frozen=True)
class ProductCode(Operand):
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

    def tiles(self, width: int) -> Iterator[slice]:
        step = self.tile or width
        return (slice(begin, min(begin + step, width)) for begin in range(0, width, step))

    def convert(
        self, acc: Tensor, own: Sequence[Tensor], place: Place, tile: int = 0, variance: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Sums (..., out) after noise and conversion, float32, and which of them were not clipped.

        Args:
            own: as `Product.tensors`.
            place: context and tokens.
            variance: of the noise.
        """
        acc, (context, tokens) = acc.float(), place
        if self.stochastic:
            assert context is not None
            position, sample = positions_and_samples(acc, context, tokens)
            lanes = torch.full_like(position, self.first_tile + tile)
            where = (position, sample, context[0])
        if variance is not None:
            noise = self.drawn(lane_normals, own[0][2:], lanes, acc, where)
            strength = own[-1] if self.blended else 1.0
            acc = acc + variance.sqrt() * noise * strength
        if self.converter is None:
            return acc, None
        uniform = self.drawn(lane_uniforms, own[0][:2], lanes, acc, where) if self.converter.stochastic else None
        return convert(self.converter, acc, own[self.stochastic], uniform, own[-1] if self.blended else None)

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

    def drawn(self, draw: Draw, key: Tensor, lanes: Tensor, acc: Tensor, where: tuple) -> Tensor:
        """A number for each sum, in the columns that stand here."""
        whole = draw(key, lanes, self.first_column + acc.shape[-1], where)
        return whole[..., self.first_column :]

    def observe(self, acc: Tensor, own: Sequence[Tensor]) -> None:
        if self.converter is not None and acc.numel():
            seen = own[self.stochastic + 1]
            seen.copy_(torch.maximum(seen, acc.detach().abs().amax().float()))

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
        if not self.photons:
            return None
        assert self.weight is not None
        # The inputs' range comes behind what is the converter's own.
        return own[-2 if self.blended else -1] * self.weight.largest(weight)

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
        masked = [passing(grad, mask, own[-1] if self.blended else None) for mask in kept]
        x, weight = chosen

        def of_x() -> Tensor:
            return torch.cat([g @ weight[:, part] for g, part in zip(masked, parts)], -1)

        def of_weight() -> Tensor:
            flat = [g.reshape(-1, g.shape[-1]).t() for g in masked]
            return torch.cat([g @ x[..., part].reshape(g.shape[1], -1) for g, part in zip(flat, parts)], -1)

        return of_x, of_weight


def convert(
    code: QuantiseCode, acc: Tensor, range_: Tensor, uniform: Tensor | None, strength: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What a converter makes of sums, float32, and which of them were within its range; all, before it is known."""
    scale = code.scaling.scale(acc, code.form, range_)
    found = code.form.round(acc / scale, uniform) * scale
    found = torch.where(range_ > 0, found, acc)
    if strength is not None:
        found = torch.where(strength < 1, torch.lerp(acc, found, strength), found)
    return found, (acc.abs() <= range_) | (range_ <= 0)


def passing(grad: Tensor, kept: Tensor | None, strength: Tensor | None) -> Tensor:
    """The gradient of sums from that of what a converter made of them: none where it clipped, but for the part that passes
    unchanged while it warms up."""
    if kept is None:
        return grad
    return torch.where(kept, grad, 0 if strength is None else (grad * (1 - strength)).to(grad.dtype))


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


class Product(Effect):
    """The module of a `ProductCode`.

    Args:
        range_: of the converter.
        full_scale: ranges of the operands, for shot noise, but for that of a linear layer's weight.
    """

    def __init__(
        self,
        noise: Noise,
        name: str,
        code: ProductCode,
        stream: str = "",
        range_: Range | None = None,
        full_scale: Sequence[Range] = (),
        role: str = "acc",
    ):
        super().__init__(noise, name, role, stream)
        self.code, self.range = code, range_
        self.of_operands = tuple(full_scale)  # other modules'
        if code.stochastic:
            self.register_buffer("table", torch.empty(4, dtype=torch.int64), persistent=False)
        if code.blended:
            self.register_buffer("strength", torch.ones(1), persistent=False)
        if range_ is not None:
            noise.track(self.label, range_)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """(4,) int64, keys of rounding and noise; the converter's range in use and the largest sum seen; the inputs' range;
        the strength. Each where it is needed."""
        own = [self.table] if self.code.stochastic else []
        own += self.range.tensors if self.range is not None else []
        if self.code.photons:
            full_scale = torch.ones_like(self.of_operands[0].used)
            for range_ in self.of_operands:
                full_scale = full_scale * range_.in_use
            own += [full_scale]
        own += [self.strength] if self.code.blended else []
        return tuple(own)

    @property
    def noted(self) -> int | None:
        return self.code.stochastic + 1 if self.range is not None else None

    def fill(self, seed: int, phase: str) -> None:
        if self.code.stochastic:
            rounding = self.key(seed, phase)
            noise = stream_key(seed, self.name, f"{self.role} noise", f"{phase}|{self.stream}")
            self.write(self.table, [*rounding, *noise])
        if self.code.blended:
            self.set_strength(1.0)

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        if self.code.blended and not self.strength.is_meta:
            self.strength.fill_(strength)


if torch.cuda.is_available():
    # Triton is imported only where it can run; it comes last, since the kernels import the code above.
    from transforms.kernels import convert as kernels
