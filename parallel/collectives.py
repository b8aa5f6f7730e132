"""Exchanges between devices inside a forward, with their gradients, eager and traced by torch.compile.

They return plain tensors that are there: an unfinished result (`AsyncCollectiveTensor`) that enters a compiled block
loses its gradient on torch 2.13.0 (pytorch issue 179849). Groups go by name, which is a constant to the compiler; a group
itself would be an input of the graph, whose size the partitioner cannot tell.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
from torch import Tensor

# torch 2.13 has renamed them
_all_gather: Any = getattr(funcol, "all_gather_single", None) or funcol.all_gather_tensor
_scatter_sum: Any = getattr(funcol, "reduce_scatter_single", None) or funcol.reduce_scatter_tensor


def _finished(tensor: Tensor) -> Tensor:
    return tensor.wait() if isinstance(tensor, funcol.AsyncCollectiveTensor) else tensor


def _gather(x: Tensor, dim: int, group: str) -> Tensor:
    # The collective puts the parts one after the other along dimension 0. Its own option to gather along another dimension
    # calls a function that Dynamo of torch 2.11 refuses to trace; what follows are the operations of that function.
    parts = _finished(_all_gather(x.contiguous(), 0, group))
    if x.shape[:dim].numel() == 1:  # in memory that is already the order
        return parts.view(*x.shape[:dim], -1, *x.shape[dim + 1 :])
    return torch.cat(parts.split(len(x)), dim)


def _reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    return _finished(_scatter_sum(x.contiguous(), "sum", dim, group))


class _Exchange(torch.autograd.Function):
    """A gather, whose gradient is a reduce-scatter, or the other way round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: str, gathers: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.gathers = dim, group, gathers
        return (_gather if gathers else _reduce_scatter)(x, dim, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return (_reduce_scatter if ctx.gathers else _gather)(grad, ctx.dim, ctx.group), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return _finished(funcol.all_reduce(x, "sum", group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        return grad, None


# Without gradients the functions themselves: Dynamo does not trace an autograd.Function there.


def gather(x: Tensor, dim: int, group: str) -> Tensor:
    """Every rank's part, side by side along `dim`. The gradient of a part is the sum over ranks of what they did with it."""
    return _Exchange.apply(x, dim, group, True) if torch.is_grad_enabled() else _gather(x, dim, group)


def reduce_scatter(x: Tensor, dim: int, group: str) -> Tensor:
    """The sum over ranks, of which each keeps its part along `dim`."""
    return _Exchange.apply(x, dim, group, False) if torch.is_grad_enabled() else _reduce_scatter(x, dim, group)


def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum over ranks on all of them, where all go on to compute the same from it: its gradient is theirs, not their sum."""
    return _Sum.apply(x, group) if torch.is_grad_enabled() else _finished(funcol.all_reduce(x, "sum", group))


def largest_over(x: Tensor, group: str) -> Tensor:
    """The maximum over ranks, without gradient."""
    return _finished(funcol.all_reduce(x.detach(), "max", group))
