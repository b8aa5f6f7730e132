"""What a `[[transforms]]` table may say: one class per `kind`, every field with its meaning. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

WIDTH = {"bfloat16": 16, "float16": 16, "float32": 32}
"""Bits of each storage format."""

Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Layered(Spec):
    modules: list[str] = []
    """Layers to transform, by their Hugging Face names: globs ("*.mlp.*", "lm_head"), or "re:" and a regular expression
    for the whole name. Default: every linear layer inside the blocks, without embeddings and output head."""

    @field_validator("modules")
    @classmethod
    def _compile(cls, patterns: list[str]) -> list[str]:
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return patterns


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


class BitflipSpec(Layered):
    """Random bit errors of the memory that holds the operands of a linear layer."""

    kind: Literal["bitflip"]
    storage: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Format in which the memory holds the values, whatever the training computes in."""
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


TransformSpec = Annotated[BitflipSpec | LoraSpec, Field(discriminator="kind")]
KINDS = ("bitflip", "lora")
