"""From the table of a device to the stages that it is made of: each device is a short description.

The stages of a linear layer, in order: effects on the weight and on the input (storage formats, their faults, converters),
the product (tiles, noise, conversion, digital sum), and effects on the output. Of attention: effects on queries, keys, values
and probabilities, and its two products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from transforms.attention import AttentionEffects
from transforms.bitflip import STORAGE, Bitflip, bit_probabilities
from transforms.context import Noise
from transforms.effect import Effect
from transforms.formats import Integer, named
from transforms.product import Product, ProductCode
from transforms.quantise import Norm, NormCode, Quantise, QuantiseCode
from transforms.ranges import Range
from transforms.scales import Scaling
from transforms.specs import (
    BLOCKS,
    BitflipSpec,
    CellFaults,
    Hardware,
    OpticalSpec,
    Quantised,
    QuantiseSpec,
    inputs_together,
)

NORM_EPS = 1e-5
"""Of the norm before a BitNet layer."""
LEAST_MAGNITUDE = 1e-5
"""What BitNet's scales are at least made from."""


class DeviceError(ValueError):
    """A device cannot take the place of this layer as it is split over processes."""


@dataclass
class Site:
    """One layer, or what this process has of it."""

    noise: Noise
    name: str
    """Hugging Face name."""
    stream: str
    """Tells apart several transforms of one layer."""
    out_features: int
    """Of the unsharded layer."""
    in_features: int
    transposed: bool = False
    """The weight is stored (in, out)."""
    first_row: int = 0
    first_column: int = 0
    local_in: int = 0
    """Inputs that are here."""
    group: str = ""
    """Name of the tensor-parallel process group, where the layer is split over one."""
    mesh: DeviceMesh | None = None
    splits_inputs: bool = False

    @property
    def window(self) -> tuple[int, int, int]:
        return (self.first_row, self.first_column, self.in_features if self.group else 0)

    def weight_scaling(self, kind: str, block: int = 0, least: float = 0.0) -> Scaling:
        return Scaling(kind, block, True, self.group, self.splits_inputs, self.out_features * self.in_features, least)

    def input_scaling(self, kind: str, block: int = 0, least: float = 0.0) -> Scaling:
        group = self.group if self.splits_inputs else ""
        return Scaling(kind, block, False, group, self.splits_inputs, 0, least)

    def range(self, decay: float, learned: bool) -> Range:
        """A new range; the parameter of a learned one is on all tensor-parallel devices, with a part of its gradient each."""
        if not learned:
            return Range(decay)
        factor = torch.zeros(1)
        if self.mesh is not None:
            factor = distribute_tensor(factor, self.mesh, [Replicate()], src_data_rank=None)
        return Range(decay, nn.Parameter(factor))


@dataclass
class Stages:
    """The effects of one transform on one linear layer."""

    weight: list[Effect] = field(default_factory=list)
    input: list[Effect] = field(default_factory=list)
    product: Product | None = None
    output: list[Effect] = field(default_factory=list)
    clean_gradients: bool = False
    """Gradients use the operands as they are before the hardware."""


def stages(spec: Hardware, site: Site) -> Stages:
    """What a transform does to a linear layer.

    Raises:
        DeviceError: inputs that belong together would be on two devices.
    """
    together, what = inputs_together(spec, site.in_features)
    if site.splits_inputs and site.local_in % together:
        raise DeviceError(
            f"{site.name}: each tensor-parallel device has {site.local_in} of its inputs, and {what} takes {together}: choose "
            "a smaller parallel.tensor or another tile"
        )
    return _OF_KIND[spec.kind](spec, site)


def attention_stages(spec: Hardware, noise: Noise, name: str, stream: str, first_head: int) -> AttentionEffects | None:
    """What a transform does to an attention, if anything."""
    if isinstance(spec, OpticalSpec) and spec.attention:
        return _optical_attention(spec, noise, name, stream, first_head)
    if isinstance(spec, QuantiseSpec) and spec.attention is not None:
        return _quantised_attention(spec, spec.attention, noise, name, stream, first_head)
    return None


def _bitflip(spec: BitflipSpec, site: Site) -> Stages:
    def effect(role: str, name: str, faults: CellFaults | None, window: tuple[int, int, int], scaling: Scaling) -> list:
        if faults is None:
            return []
        probabilities = bit_probabilities(spec.storage, faults.sign_exponent, faults.mantissa, faults.bits)
        return [
            Bitflip(
                site.noise,
                name,
                role,
                spec.storage,
                probabilities,
                faults.zero_above,
                spec.lifetime == "persistent",
                spec.fault == "stuck_at",
                site.stream,
                site.transposed and role == "w",
                window,
                None if spec.storage in STORAGE else scaling,
            )
        ]

    columns, rows = (0, site.first_column, 0), (0, site.first_row, 0)
    outputs = Scaling("row", group="" if site.splits_inputs else site.group, rows_split=not site.splits_inputs)
    return Stages(
        weight=effect("w", f"{site.name}.weight", spec.weight, site.window, site.weight_scaling(spec.scale)),
        input=effect("x", site.name, spec.input, columns, site.input_scaling("row")),
        output=effect("out", site.name, spec.output, rows, outputs),
    )


def _scaling(operand: Quantised, site: Site, of_weight: bool) -> Scaling:
    least = LEAST_MAGNITUDE if operand.format == "ternary" or not of_weight else 0.0
    kind: str = operand.scale or "row"
    block = 0
    if operand.format in BLOCKS:
        kind, block = ("two_level" if operand.format == "nvfp4" else "power"), BLOCKS[operand.format]
    elif operand.format == "ternary":
        kind = "mean"
    elif kind == "group":
        kind, block = "block", min(operand.group_size, site.in_features)
    elif kind in ("tracked", "learned"):
        kind = "range"
    make = site.weight_scaling if of_weight else site.input_scaling
    return make(kind, block, 0.0 if block else least)


def _operand(operand: Quantised, site: Site, role: str, decay: float) -> Quantise:
    """An operand of few bits."""
    of_weight = role == "w"
    form, scaling = named(operand.format), _scaling(operand, site, of_weight)
    learned, tracked = operand.scale == "learned", operand.scale == "tracked"
    code = QuantiseCode(
        form,
        scaling,
        stochastic=operand.rounding == "stochastic",
        fixed=form.max if operand.scale == "none" else 0.0,
        tracked=tracked,
        learned=learned,
        blended=site.noise.warmup > 0,
        of_weight=of_weight,
        first_row=site.first_row if of_weight else 0,
        first_column=site.first_column,
        columns=site.in_features if of_weight and site.group else 0,
        features=site.in_features * (site.out_features if of_weight else 1),
    )
    range_ = site.range(decay, learned) if learned or tracked else None
    name = f"{site.name}.weight" if of_weight else site.name
    return Quantise(site.noise, name, role, code, site.stream, range_, site.transposed and of_weight)


def _quantise(spec: QuantiseSpec, site: Site) -> Stages:
    found = Stages(clean_gradients=spec.gradients == "clean")
    if spec.weight is not None:
        found.weight.append(_operand(spec.weight, site, "w", spec.range_decay))
    if spec.norm:
        code = NormCode(NORM_EPS, site.in_features, site.input_scaling("row"))
        found.input.append(Norm(code, hardware=not site.noise.trained))
    if spec.input is not None:
        found.input.append(_operand(spec.input, site, "x", spec.range_decay))
    return found


def _quantised_attention(
    spec: QuantiseSpec, operand: Quantised, noise: Noise, name: str, stream: str, first_head: int
) -> AttentionEffects:
    form = named(operand.format)
    tracked = operand.scale == "tracked"
    scaling = Scaling(
        {"tracked": "range", None: "row"}.get(operand.scale, operand.scale or "row"), least=LEAST_MAGNITUDE
    )
    effects: dict[str, Any] = {}
    for which, role in (("query", "q"), ("key", "k"), ("value", "v")):
        fixed = form.max if operand.scale == "none" else 0.0
        code = QuantiseCode(form, scaling, fixed=fixed, tracked=tracked, blended=noise.warmup > 0)
        effects[which] = Quantise(noise, name, role, code, stream, Range(spec.range_decay) if tracked else None)
    # Probabilities have no sign: all codes are for 0 to 1.
    levels = Integer((1 << form.bits) - 1, signed=False) if isinstance(form, Integer) else form
    code = QuantiseCode(levels, Scaling("range"), fixed=1.0, blended=noise.warmup > 0)
    effects["probabilities"] = Quantise(noise, name, "p", code, stream)
    return AttentionEffects({**effects, "scores": None, "context": None}, first_head, spec.gradients == "clean")


def _levels(count: int) -> Integer:
    """Of so many levels as many as are symmetric about 0."""
    return Integer((count - 1) // 2)


def _converter(spec: OpticalSpec, noise: Noise) -> QuantiseCode:
    """Of what the detectors read."""
    form = _levels(spec.output_levels or spec.levels)
    stochastic = spec.rounding == "stochastic"
    return QuantiseCode(form, Scaling("range"), stochastic, tracked=True, blended=noise.warmup > 0)


def _optical(spec: OpticalSpec, site: Site) -> Stages:
    noise, blended = site.noise, site.noise.warmup > 0
    learned = spec.ranges == "learned"
    weight = QuantiseCode(
        _levels(spec.weight_levels or spec.levels),
        site.weight_scaling("tensor"),
        floor=spec.lut_floor,
        blended=blended,
        of_weight=True,
    )
    of_input = site.range(spec.range_decay, learned)
    inputs = QuantiseCode(
        _levels(spec.input_levels or spec.levels),
        Scaling("range"),
        tracked=not learned,
        learned=learned,
        blended=blended,
        features=site.in_features,
    )
    product = ProductCode(
        _converter(spec, noise),
        spec.tile,
        spec.photons or 0.0,
        blended,
        site.weight_scaling("tensor"),
        first_column=site.first_row,
        first_tile=site.first_column // spec.tile if spec.tile else 0,
    )
    return Stages(
        weight=[Quantise(noise, f"{site.name}.weight", "w", weight, site.stream, transposed=site.transposed)],
        input=[Quantise(noise, site.name, "x", inputs, site.stream, of_input)],
        product=Product(noise, site.name, product, site.stream, Range(spec.range_decay), [of_input]),
        clean_gradients=spec.gradients == "clean",
    )


def _optical_attention(spec: OpticalSpec, noise: Noise, name: str, stream: str, first_head: int) -> AttentionEffects:
    blended = noise.warmup > 0
    inputs, weights = (_levels(count or spec.levels) for count in (spec.input_levels, spec.weight_levels))
    ranges = {role: Range(spec.range_decay) for role in ("q", "k", "v")}
    effects: dict[str, Any] = {}
    for which, role, form in (("query", "q", inputs), ("key", "k", weights), ("value", "v", weights)):
        code = QuantiseCode(
            form, Scaling("range"), floor=0.0 if role == "q" else spec.lut_floor, tracked=True, blended=blended
        )
        effects[which] = Quantise(noise, name, role, code, stream, ranges[role])
    unsigned = Integer((spec.input_levels or spec.levels) - 1, signed=False)
    code = QuantiseCode(unsigned, Scaling("range"), fixed=1.0, blended=blended)
    effects["probabilities"] = Quantise(noise, name, "p", code, stream)
    for which, operands in (("scores", ["q", "k"]), ("context", ["v"])):
        product = ProductCode(_converter(spec, noise), 0, spec.photons or 0.0, blended)
        scale = [ranges[role] for role in operands]
        effects[which] = Product(noise, name, product, stream, Range(spec.range_decay), scale, which)
    return AttentionEffects(effects, first_head, spec.gradients == "clean")


_OF_KIND: dict[str, Callable[[Any, Site], Stages]] = {
    "bitflip": _bitflip,
    "quantise": _quantise,
    "optical": _optical,
}
