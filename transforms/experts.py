"""The experts of a mixture as linear layers: slices of stacked parameters, each with effects of its own.

Hugging Face keeps the weights of all experts of a block in two parameters of three dimensions, up (or gate and up) and down,
and multiplies them in a function that can be replaced (its experts interface). An `Expert` is one slice of one of them with
its effects; `evals/experts.py` is the function that routes tokens through them. A slice is named after its parameter and its
number, "model.layers.0.mlp.experts.down_proj.3", and so are the keys of its noise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EXPERTS = "transformed_experts"
"""The attribute of a module of experts that holds those with effects, by parameter and number."""


_NUMBER = re.compile(r"(expert[^0-9]*\.)\d+(?=\.|$)")


def without_expert(name: str) -> str:
    """The name of a layer, or of what belongs to it, with a star for the number of its expert: equal for all of a block."""
    return _NUMBER.sub(r"\1*", name)


@dataclass(frozen=True)
class Slice:
    """One expert's part of a stacked parameter, before it has effects."""

    experts: nn.Module
    parameter: str
    number: int


class Expert(nn.Module):
    """The matmul of one expert's slice: stored (out, in), or (in, out) where the parameter is transposed."""

    def __init__(self, of: Slice):
        super().__init__()
        self.of = (of,)  # in a tuple: not a submodule
        self.stored_transposed = bool(of.experts.is_transposed)
        self.weight_effects = nn.ModuleList()

    @property
    def weight(self) -> Tensor:
        (of,) = self.of
        return getattr(of.experts, of.parameter)[of.number]

    @property
    def bias(self) -> Tensor | None:
        (of,) = self.of
        return getattr(of.experts, f"{of.parameter}_bias")[of.number] if of.experts.has_bias else None


def stacks(module: nn.Module) -> list[str]:
    """The stacked parameters of a module that follows the experts interface; none of any other module.

    Only what that interface documents is taken: two parameters of known names, orientation and biases.
    """
    if not all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts")):
        return []
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    found: list[Any] = [module._parameters.get(name) for name in names]
    if not all(isinstance(p, Tensor) and p.dim() == 3 and len(p) == module.num_experts for p in found):
        return []
    return names


def slices(name: str, module: nn.Module) -> Iterator[tuple[str, str, Slice]]:
    """(name of the parameter, name of the slice, slice) of every expert of a module; nothing of other modules."""
    for parameter in stacks(module):
        whole = f"{name}.{parameter}"
        for number in range(int(module.num_experts)):
            yield whole, f"{whole}.{number}", Slice(module, parameter, number)


def expert_of(part: Slice) -> Expert:
    """The expert that has this slice's effects; made where there is none yet."""
    if not hasattr(part.experts, EXPERTS):
        part.experts.add_module(EXPERTS, nn.ModuleDict())
    made = getattr(part.experts, EXPERTS)
    if part.parameter not in made:
        made[part.parameter] = nn.ModuleDict()
    key = str(part.number)
    if key not in made[part.parameter]:
        made[part.parameter][key] = Expert(part).to(getattr(part.experts, part.parameter).device)
    return made[part.parameter][key]


def with_effects(experts: nn.Module, parameter: str, number: int) -> Expert | None:
    """The expert of this number, where it has effects."""
    made: Any = getattr(experts, EXPERTS, None)
    if made is None or parameter not in made or str(number) not in made[parameter]:
        return None
    return made[parameter][str(number)]


def tokens_of(
    place: tuple[Tensor | None, Tensor | None], rows: Tensor, total: int
) -> tuple[Tensor | None, Tensor | None]:
    """The place of some rows of a batch that is flattened to `total` tokens.

    Without tokens a batch counts as one sequence.

    Raises:
        ValueError: the experts see other rows than the batch's tokens.
    """
    context, tokens = place
    if tokens is None:
        if context is None:
            return place
        return context, torch.stack([rows, context[2].expand_as(rows)])[:, None]
    if tokens[0].numel() != total:
        raise ValueError(f"experts see {total} rows, which do not belong to a batch of tokens {tuple(tokens[0].shape)}")
    return context, tokens.flatten(1)[:, rows][:, None]
