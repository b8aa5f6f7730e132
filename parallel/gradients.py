"""The global gradient norm, over parameters that are sharded and copied along different axes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


def clip(parameters: Iterable[nn.Parameter], max_norm: float, device: torch.device) -> Tensor:
    """Scale all gradients so that their global norm is at most `max_norm` (0 leaves them); the norm before that, a scalar.

    One sum over all processes: each adds the squares of what it holds, divided by the number of copies of it.
    """
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        grad = parameter.grad
        if grad is not None:
            grad = grad.to_local() if isinstance(grad, DTensor) else grad
            by_copies.setdefault(_copies(parameter), []).append(grad)
    square = torch.zeros((), device=device)
    for copies, grads in by_copies.items():
        square += torch.stack(torch._foreach_norm(grads)).to(device).float().square().sum() / copies
    if dist.get_world_size() > 1:
        dist.all_reduce(square)
    norm = square.sqrt()
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grads in by_copies.values():
            torch._foreach_mul_(grads, factor.to(grads[0].device))
    return norm


def _copies(parameter: nn.Parameter) -> int:
    """Processes that hold the same part of a parameter."""
    if not isinstance(parameter, DTensor):
        return 1
    count = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements):
        count *= size if isinstance(placement, Replicate) else 1
    return count
