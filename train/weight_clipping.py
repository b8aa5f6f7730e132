"""Weight clipping: after each update no weight of a matrix is further from 0 than some of its own standard deviations.

    w <- clamp(w, -a s, a s),  s^2 = (sum w^2 - (sum w)^2 / n) / (n - 1)  over an output row, or the whole matrix

(Analog Foundation Models, arXiv 2505.09663; `LAYER_GAUSSIAN_PER_CHANNEL` and `LAYER_GAUSSIAN` of aihwkit-lightning.) A
device maps the largest weight of a row to its largest conductance, so that one outlier makes all others small against the
noise; without outliers there is less noise for the same weight.

Processes work on what they hold, in place. FSDP cuts matrices into whole rows, so that rows need no exchange but under
tensor parallelism; a matrix as a whole needs one along each axis that cuts it. Either way it is one for all matrices
together. Sums travel in float64: what rounds differently in another layout then hardly ever reaches a float32 bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from parallel.names import clean_name

if TYPE_CHECKING:
    from train.config import RobustConfig
    from transforms.context import Noise


class WeightClipping:
    """Clips the weights of a model, or of its stages here, when called; collective.

    Args:
        noise: of the model's hardware effects, where there are any: their layers are clipped. Without: the blocks' matrices.
        device: where exchanges take place, which may not be where weights are (`parallel.cpu_offload`).
    """

    def __init__(self, parts: Sequence[nn.Module], noise: Noise | None, config: RobustConfig, device: torch.device):
        self.limit, self.by_row, self.device = config.clip_weights, config.clip_per == "row", device
        self.weights = clipped_weights(parts, noise)
        self._axes = _cutting_axes(self.weights.values(), dims=(1,) if self.by_row else (0, 1))

    @torch.no_grad()
    def __call__(self) -> None:
        if not self.limit:
            return
        weights = list(self.weights.values())
        sums = [self._sums(_local(weight)).to(self.device) for weight in weights]
        for group, cut in self._axes:
            together = torch.cat([sums[i] for i in cut], dim=1)
            dist.all_reduce(together, group=group)
            for i, whole in zip(cut, together.split([sums[i].shape[1] for i in cut], dim=1)):
                sums[i] = whole
        for weight, (total, squares) in zip(weights, sums):
            count = weight.shape[1] if self.by_row else weight.numel()
            variance = (squares - total.square() / count).clamp(min=0) / max(count - 1, 1)
            local = _local(weight)
            bound = (self.limit * variance.sqrt()).to(local)[:, None]
            local.clamp_(-bound, bound)

    def _sums(self, local: Tensor) -> Tensor:
        """Sums of the weights and of their squares, (2, rows) or (2, 1) float64; no copy of the weights is made."""
        squares = torch.linalg.vector_norm(local, dim=1).double().square()
        rows = torch.stack([local.sum(1).double(), squares])
        return rows if self.by_row else rows.sum(1, keepdim=True)


def clipped_weights(parts: Sequence[nn.Module], noise: Noise | None) -> dict[str, nn.Parameter]:
    """The stored weights of the layers under hardware effects, or of all linear layers of the blocks, by their names."""
    layers = None
    if noise is not None:
        # Effects on attention's products alone are on no weight.
        layers = {layer for row in noise.applied if row.kind != "lora" for layer in row.layers} or None
    found, seen = {}, set()
    for part in parts:
        for name, parameter in part.named_parameters(remove_duplicate=False):
            layer, _, kind = clean_name(name).rpartition(".")
            wanted = layer.startswith("model.layers.") if layers is None else layer in layers
            # A head may share its weight with the embedding: clipped once.
            if wanted and kind == "weight" and parameter.ndim == 2 and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{layer}.weight"] = parameter
    return found


def _cutting_axes(weights: Any, dims: tuple[int, ...]) -> list[tuple[dist.ProcessGroup, list[int]]]:
    """The process groups along whose axis one of `dims` is cut, each with the numbers of the weights that are."""
    groups: dict[str, tuple[dist.ProcessGroup, list[int]]] = {}
    for i, weight in enumerate(weights):
        if not isinstance(weight, DTensor):
            continue
        mesh: DeviceMesh = weight.device_mesh
        for axis, placement in enumerate(weight.placements):
            if mesh.size(axis) > 1 and not isinstance(placement, Replicate) and placement.dim in dims:
                group = mesh.get_group(axis)
                groups.setdefault(group.group_name, (group, []))[1].append(i)
    return list(groups.values())


def _local(weight: Tensor) -> Tensor:
    """This process's part of a weight, the storage itself."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return getattr(local, "_tensor", local)  # torchao's wrapper of weights that are gathered as float8
