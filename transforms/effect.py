"""What all effects are: a module that owns small tensors, and a frozen code of pure functions that compiled code sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transforms.context import Noise
from transforms.noise import stream_key


class Code:
    """The pure functions of an effect on one operand, and all that compiled code may depend on: equal codes share
    compiled code. Subclasses are frozen dataclasses.

    `own` are the effect's own tensors, as many as its module's `tensors`; `place` the context and the tokens.
    """

    def forward(self, value: Tensor, *rest: Any) -> Tensor:
        """What becomes of a value: `rest` are `own` and `place`."""
        return self.regenerate(value, *rest)[0]

    def regenerate(self, value: Tensor, *rest: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """The same again, and the function from its gradient to that of `value`: alone, or with a list of those of the
        effect's own tensors."""
        raise NotImplementedError

    def observe(self, value: Tensor, *rest: Any) -> None:
        """Take note of a value in the effect's own tensors; twice is as once, so that a recomputation does no harm."""


class Effect(nn.Module):
    """One effect on one operand of one layer.

    Args:
        name: Hugging Face name of the parameter or module, part of the key.
        role: "w", "x", "out", ...; part of the key.
        stream: tells apart several effects on one operand.
    """

    hardware = True
    """Whether it is switched off where the hardware is (`Noise.off`)."""
    persistent = False
    """Whether it belongs to the chip, and not to the step."""
    code: Any

    @property
    def random(self) -> bool:
        """Whether it depends on the noise."""
        return bool(self.code.stochastic)

    def __init__(self, noise: Noise, name: str, role: str, stream: str = ""):
        super().__init__()
        self.noise, self.name, self.role, self.stream = noise, name, role, stream
        noise.register(self)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its own tensors, in the order in which the code takes them."""
        return ()

    @property
    def label(self) -> str:
        """Where what it tracks or learns is kept in checkpoints, without the name of what."""
        return ".".join(["transforms", self.name.removesuffix(".weight"), self.role, *filter(None, [self.stream])])

    def key(self, seed: int, phase: str) -> list[int]:
        """Its key. Persistent effects belong to the chip, so training and validation share them."""
        if self.persistent and not phase.startswith("chip"):
            phase = "chip 0"
        return list(stream_key(seed, self.name, self.role, f"{phase}|{self.stream}"))

    def fill(self, seed: int, phase: str) -> None:
        """Write what follows from the seed and the phase into the effect's tensors."""

    def set_strength(self, strength: float) -> None:
        """Act with a part of the full strength, 0 to 1, from now on."""

    @torch.no_grad()
    def write(self, tensor: Tensor, values: list[int]) -> None:
        if not tensor.is_meta:
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))
