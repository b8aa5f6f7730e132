"""What a `[[transforms]]` table may say: one class per `kind`, every field with its meaning. Torch-free."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

WIDTH = {"bfloat16": 16, "float16": 16, "float32": 32, "int8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8}
"""Bits of each storage format."""

BLOCKS = {"mxfp8_e4m3": 32, "mxfp8_e5m2": 32, "mxfp6_e3m2": 32, "mxfp6_e2m3": 32, "mxfp4": 32, "nvfp4": 16}
"""Formats with a scale for each block of so many neighbours."""
FORMAT = re.compile(rf"int[2-8]|ternary|fp8_e4m3|fp8_e5m2|e[1-7]m\d|{'|'.join(BLOCKS)}")

DEFAULT_GROUP = 128
"""Neighbours that share a scale, where groups do."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def name_pattern(pattern: str) -> re.Pattern[str]:
    """What a pattern of layers' names means, for `fullmatch`: a regular expression after "re:", otherwise a glob."""
    return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))


def _listed(value: object) -> object:
    """A list of one text may be written as the text."""
    return [value] if isinstance(value, str) else value


Texts = Annotated[list[str], BeforeValidator(_listed)]


class Layered(Spec):
    modules: Texts = []
    """Layers to transform, by their Hugging Face names: globs ("*.mlp.*", "lm_head"), or "re:" and a regular expression
    for the whole name. Default: every linear layer inside the blocks, without embeddings and output head."""

    @field_validator("modules")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            try:
                name_pattern(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns


class HardwareSpec(Layered):
    """What every kind of hardware may say."""

    unmatched: Literal["refuse", "keep"] = "refuse"
    """Of a model whose blocks have weights outside linear layers, with more than 1% of all: refuse to leave them exact, or
    keep them so. Only without `modules`; what given patterns leave out is listed."""

    @model_validator(mode="after")
    def _unmatched_acts(self) -> HardwareSpec:
        if self.unmatched == "keep" and self.modules:
            raise ValueError(
                "unmatched is for the default choice of layers: with modules, what they leave out is only listed"
            )
        return self


class CellFaults(Spec):
    """How often the bits of one operand fail."""

    sign_exponent: Probability = 0.0
    """Probability for the sign and for each exponent bit."""
    mantissa: Probability = 0.0
    """Probability for each mantissa bit."""
    bits: list[Probability] = []
    """Instead of the two: one probability per bit of the storage format, the sign first."""
    zero_above: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Every value of at least this magnitude after the faults, and NaN, becomes 0; without it all values pass."""


class BitflipSpec(HardwareSpec):
    """Random bit errors of the memory that holds the operands of a linear layer."""

    kind: Literal["bitflip"]
    storage: Literal["bfloat16", "float16", "float32", "int8", "fp8_e4m3", "fp8_e5m2"] = "bfloat16"
    """Format in which the memory holds the values, whatever the training computes in."""
    scale: Literal["row", "tensor"] = "row"
    """Of 8-bit formats: what shares a scale, which is not stored in this memory. A row is an output channel of a weight
    or a token; activations always have a scale for each token."""
    weight: CellFaults | None = None
    """Faults of the weights' memory."""
    input: CellFaults | None = None
    """Faults of the memory of the layer's inputs."""
    output: CellFaults | None = None
    """Faults of the memory of the layer's outputs."""
    lifetime: Literal["transient", "persistent"] = "transient"
    """transient: new faults every step; persistent: one chip whose faulty cells stay, more of them at higher p."""
    fault: Literal["flip", "stuck_at"] = "flip"
    """What a faulty cell returns: the inverse of what was stored, or (persistent only) always the same value."""

    @model_validator(mode="after")
    def _check(self) -> BitflipSpec:
        operands = {"weight": self.weight, "input": self.input, "output": self.output}
        if not any(operands.values()):
            raise ValueError("give the faults of at least one of weight, input and output")
        for name, faults in operands.items():
            if faults is None or not faults.bits:
                continue
            if faults.sign_exponent or faults.mantissa:
                raise ValueError(f"{name}: give bits, or sign_exponent and mantissa")
            if len(faults.bits) != WIDTH[self.storage]:
                raise ValueError(
                    f"{name}.bits has {len(faults.bits)} entries, {self.storage} has {WIDTH[self.storage]}"
                )
        if self.scale != "row" and WIDTH[self.storage] > 8:
            raise ValueError(f"scale: {self.storage} stores values without a scale, leave it out")
        if self.fault == "stuck_at" and self.lifetime == "transient":
            raise ValueError('fault = "stuck_at" needs lifetime = "persistent": a cell that is stuck stays so')
        return self


class LoraSpec(Layered):
    """Low-rank adapters: the layer uses W + (alpha / rank) B A, W and all else is frozen. Applied before hardware effects."""

    kind: Literal["lora"]
    rank: Annotated[int, Field(gt=0)] = 32
    """Rank of B A."""
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 32.0
    """Scale of the update, relative to the rank."""


class Quantised(Spec):
    """A format of few bits for one operand."""

    format: str
    """int2 to int8, ternary, fp8_e4m3, fp8_e5m2, any eXmY (X exponent and Y mantissa bits), and with scales of blocks
    mxfp8_e4m3, mxfp8_e5m2, mxfp6_e3m2, mxfp6_e2m3, mxfp4, nvfp4."""
    scale: Literal["row", "tensor", "group", "none", "tracked", "learned"] | None = None
    """What shares a scale: a row (output channel, or token), the tensor (weights only), or a group of neighbours in a row;
    "none" takes values as they are; "tracked" and "learned" have a range per tensor that is the same for all tokens.
    Default: "row"; of ternary "tensor". Formats with scales of blocks have their own."""
    group_size: Annotated[int, Field(gt=0)] = DEFAULT_GROUP
    """Neighbours that share a scale, with scale = "group"."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """stochastic: up or down at random, so that the mean is exact."""

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if not FORMAT.fullmatch(name):
            raise ValueError(
                f"{name!r} is no format: int2 to int8, ternary, fp8_e4m3, fp8_e5m2, eXmY, {', '.join(BLOCKS)}"
            )
        return name

    @model_validator(mode="after")
    def _fits(self) -> Quantised:
        if self.format in BLOCKS and self.scale is not None:
            raise ValueError(f"{self.format} has a scale for each block of {BLOCKS[self.format]}: leave scale out")
        if self.format == "ternary" and self.scale not in (None, "tensor"):
            raise ValueError("ternary has one scale, the mean magnitude of the tensor: leave scale out")
        if self.group_size != DEFAULT_GROUP and self.scale != "group":
            raise ValueError('group_size needs scale = "group"')
        return self


class QuantiseSpec(HardwareSpec):
    """Operands of few bits: they are rounded to a format before they are multiplied."""

    kind: Literal["quantise"]
    weight: Quantised | None = None
    """Format of the weights."""
    input: Quantised | None = None
    """Format of the layer's inputs."""
    attention: Quantised | None = None
    """Format of queries, keys and values in the products of attention, with a scale for each head of a token ("row"), or
    tracked; the probabilities get as many levels as the format has bits for."""
    norm: bool = False
    """Normalise a layer's inputs before they are rounded (RMSNorm without weights), as BitNet b1.58 does."""
    range_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """What is left of a tracked range after a step; the rest is that step's largest value."""
    gradients: Literal["noisy", "clean"] = "noisy"
    """Which operands the gradients' products use: the rounded ones that the forward multiplied, or those before."""

    @model_validator(mode="after")
    def _check(self) -> QuantiseSpec:
        if not (self.weight or self.input or self.attention):
            raise ValueError("give the format of at least one of weight, input and attention")
        if self.norm and not (self.weight or self.input):
            raise ValueError("norm is for the inputs of linear layers: give the format of weight or input")
        for name in ("input", "attention"):
            operand = getattr(self, name)
            if operand is not None and (operand.scale == "tensor" or operand.format == "ternary"):
                raise ValueError(
                    f'{name}: a scale of the whole batch would let tokens see later ones: use scale = "row" or "tracked"'
                )
        if self.attention is not None:
            if self.attention.format in BLOCKS or self.attention.scale in ("group", "learned"):
                raise ValueError(
                    'attention: scale = "row", "tracked" or "none", with a format without scales of blocks'
                )
            if self.attention.rounding == "stochastic":
                raise ValueError("attention: queries, keys and values are rounded to the nearest only")
        return self


class OpticalSpec(HardwareSpec):
    """Products by light: operands pass converters of a number of levels, and so does what the detectors read."""

    kind: Literal["optical"]
    levels: Annotated[int, Field(ge=3, le=65536)] = 256
    """Levels of every converter. Zero is one of them: signed values have levels - 1 where levels is even."""
    input_levels: Annotated[int, Field(ge=3, le=65536)] | None = None
    """Instead, for inputs (and queries, and attention's probabilities)."""
    weight_levels: Annotated[int, Field(ge=3, le=65536)] | None = None
    """Instead, for weights (and keys and values)."""
    output_levels: Annotated[int, Field(ge=3, le=65536)] | None = None
    """Instead, for what the detectors read."""
    lut_floor: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Smallest magnitude but 0 that a weight's modulator can show, as a part of the largest."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Of the detectors' converters; those of operands round to the nearest."""
    photons: Annotated[float, Field(gt=0.0)] | None = None
    """Photons of a multiply-accumulate at full scale; without it no shot noise."""
    tile: Annotated[int, Field(ge=0)] = 0
    """Inputs that one array sums before conversion; 0: all."""
    ranges: Literal["tracked", "learned"] = "tracked"
    """Ranges of inputs: tracked from the largest values, or learned from there. Those of outputs are tracked."""
    range_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """What is left of a tracked range after a step; the rest is that step's largest value."""
    attention: bool = True
    """Also attention's two products run in light."""
    gradients: Literal["noisy", "clean"] = "noisy"
    """Which operands the gradients' products use: the converted ones that the forward multiplied, or those before."""


def matches(spec: Layered, name: str) -> bool:
    """Whether a transform's patterns take a layer of a block, by its Hugging Face name."""
    return not spec.modules or any(name_pattern(pattern).fullmatch(name) for pattern in spec.modules)


def adds_norms(specs: Sequence[Layered | Mapping[str, object]]) -> bool:
    """Whether a model that is trained under these transforms, or tables of them, has norms that its plain weights are without."""
    return any(spec.get("norm") if isinstance(spec, Mapping) else getattr(spec, "norm", False) for spec in specs)


def inputs_together(spec: Layered, in_features: int) -> tuple[int, str]:
    """How many neighbouring inputs of a layer have to be on one device, and what they share; 1 if nothing."""
    if isinstance(spec, OpticalSpec):
        return (spec.tile, "a tile") if spec.tile else (in_features if spec.photons else 1, "shot noise without a tile")
    sizes = [1]
    for operand in (spec.weight, spec.input) if isinstance(spec, QuantiseSpec) else ():
        if operand is not None:
            sizes.append(BLOCKS.get(operand.format, 1))
            sizes.append(min(operand.group_size, in_features) if operand.scale == "group" else 1)
    return max(sizes), "a scale"


Hardware = BitflipSpec | QuantiseSpec | OpticalSpec
TransformSpec = Annotated[Hardware | LoraSpec, Field(discriminator="kind")]
KINDS = ("bitflip", "quantise", "optical", "lora")
