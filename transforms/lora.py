"""Low-rank adapters (Hu et al., "LoRA", arXiv 2106.09685, section 4.1) as one more effect on a weight.

    W_eff = W + (alpha / rank) B A,    A: (rank, in), B: (out, rank)

B starts at zero, so that training starts from the weights as they are. Hardware effects follow: they see W_eff, as the
memory of a deployed model would hold it after the merge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transforms.effect import Code


@dataclass(frozen=True)
class LowRankCode(Code):
    """The pure functions of an adapter; its tensors are A and B."""

    scale: float

    def forward(self, weight: Tensor, a: Tensor, b: Tensor, *place: Tensor | None) -> Tensor:
        return torch.addmm(weight, b, a, alpha=self.scale)

    def regenerate(
        self, weight: Tensor, a: Tensor, b: Tensor, *place: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, list[Tensor | None]]]]:
        def pull(grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            return grad, [self.scale * (b.t() @ grad), self.scale * (grad @ a.t())]

        return self.forward(weight, a, b), pull


class LowRank(nn.Module):
    """The adapter of one weight (out, in); a parametrization of it."""

    hardware = False

    def __init__(self, weight: Tensor, rank: int, alpha: float, transposed: bool = False):
        super().__init__()
        rows, columns = weight.shape[::-1] if transposed else weight.shape
        self.transposed = transposed
        self.code = LowRankCode(alpha / rank)
        self.lora_A = nn.Parameter(weight.new_empty(rank, columns))
        self.lora_B = nn.Parameter(weight.new_zeros(rows, rank))
        nn.init.normal_(self.lora_A, std=self.initial_std)

    @property
    def initial_std(self) -> float:
        return 1 / math.sqrt(self.lora_A.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.lora_A, self.lora_B

    def forward(self, weight: Tensor) -> Tensor:
        if self.transposed:
            return self.code.forward(weight.t(), self.lora_A, self.lora_B).t()
        return self.code.forward(weight, self.lora_A, self.lora_B)


def merge(weights: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """Weights by name with every `NAME.lora_A` and `NAME.lora_B` added into `NAME.weight`."""
    merged = {name: tensor for name, tensor in weights.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, a in weights.items():
        if name.endswith(".lora_A"):
            layer = name.removesuffix(".lora_A")
            b = weights[f"{layer}.lora_B"]
            merged[f"{layer}.weight"] = torch.addmm(merged[f"{layer}.weight"], b, a, alpha=alpha / rank)
    return merged
