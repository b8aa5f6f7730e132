"""AdamW with moments of 8 bits or in bfloat16, on torchao's optimizers; parameters and arithmetic stay float32.

Each step reads a moment, updates it in float32, takes the parameter's step from the float32 value and stores the moment
rounded again. torchao compiles the step of each parameter, once per shape and decay; uncompiled it is about thirty
passes over memory.

8 bits are torchao's block-wise quantisation (Dettmers et al., arXiv 2110.02861): each 256 numbers that follow each other
in a shard share a float32 scale, and a code of one byte picks one of 256 values between -1 and 1 that lie closer the
smaller they are. Blocks begin at the shard's begin, so where shards are rows of a multiple of 256 numbers, every layout
has the same blocks; columns have others. Small tensors, and shards that are no multiple, keep float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torchao.optim
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchao.optim.quant_utils import dequant_with_qmap, quantize_8bit_with_qmap

from train.optimizer import distributed_like

MIN_QUANTISED = 4096
"""Numbers in the whole tensor from which on moments are quantised; torchao's limit, but there it is a shard's size, so that
a tensor's precision would depend on the layout."""


class _LowBitAdamW:
    """What both share: rates that are plain numbers, and uncompiled steps on request. Mixed into torchao's classes."""

    param_groups: list[dict[str, Any]]

    def __init__(self, params: Any, *, compiled: bool, **settings: Any):
        super().__init__(params, **settings)  # type: ignore[call-arg]
        self._compiled = compiled
        for group in self.param_groups:
            group["lr"] = float(group["lr"])

    def step(self, closure: None = None) -> None:
        # torchao takes the rate as a tensor: a number would be compiled into the step, anew at every step.
        rates = [group["lr"] for group in self.param_groups]
        stance = nullcontext() if self._compiled else torch.compiler.set_stance("force_eager")
        try:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = torch.tensor(rate, dtype=torch.float32)
            with stance:
                super().step(closure)  # type: ignore[misc]
        finally:
            for group, rate in zip(self.param_groups, rates):
                group["lr"] = rate

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        local = p.to_local() if isinstance(p, DTensor) else p
        return distributed_like(self._zeros(local, p.numel(), signed), p)

    def _zeros(self, local: Tensor, numel: int, signed: bool) -> Tensor:
        raise NotImplementedError


class AdamW8bit(_LowBitAdamW, torchao.optim.AdamW8bit):
    """AdamW with 8-bit moments: 2.03 bytes of state per parameter.

    Args:
        exact: parameters that keep float32 moments. The embedding is one: where a block spans rows, a rare token shares its
            scale with frequent ones, its second moment rounds to 0 before its first, and its update is divided by eps.
    """

    def __init__(self, params: Any, *, exact: Sequence[Tensor] = (), **settings: Any):
        self._exact = {id(p) for p in exact}
        super().__init__(params, **settings)

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        return torch.zeros_like(p) if id(p) in self._exact else super()._new_buffer(p, signed)

    def _zeros(self, local: Tensor, numel: int, signed: bool) -> Tensor:
        if numel < MIN_QUANTISED or local.numel() == 0 or local.numel() % self.block_size:
            return torch.zeros_like(local)
        return self._subclass_zeros(local, signed, self.block_size)


class AdamWBf16(_LowBitAdamW, torchao.optim._AdamW):
    """AdamW with moments in bfloat16, rounded to nearest: 4 bytes of state per parameter."""

    def _zeros(self, local: Tensor, numel: int, signed: bool) -> Tensor:
        return torch.zeros_like(local, dtype=torch.bfloat16)


@torch.no_grad()
def requantise_(moment: Any, values: Tensor) -> None:
    """Set a quantised moment to `values`; where those were read from the same blocks, to exactly the same values.

    A block's scale is its largest magnitude before rounding. Where that number is negative it is rounded to a value of
    -0.993 (the codes have 1.0 but not -1.0), so that quantising what was read would scale by 0.993 once more. Such a block
    is recognised: one of the scales that can have led to its largest magnitude gives all its numbers again.
    """
    moment.copy_(values)
    blocks = values.reshape(-1, moment.block_size)
    lowest = moment.qmap[0].abs()
    if lowest == 0:
        return  # no negative codes: the largest number is its scale
    infinity = torch.tensor(torch.inf, device=values.device)
    middle = blocks.abs().amax(1) / lowest
    up, down = torch.nextafter(middle, infinity), torch.nextafter(middle, -infinity)
    for scale in (middle, up, down, torch.nextafter(up, infinity), torch.nextafter(down, -infinity)):
        codes = quantize_8bit_with_qmap(blocks / scale[:, None].clip(1e-12), moment.qmap)
        exact = (dequant_with_qmap(codes, moment.qmap, scale) == blocks).all(1)
        moment.codes.copy_(torch.where(exact[:, None], codes, moment.codes.view_as(codes)).view_as(moment.codes))
        moment.scale.copy_(torch.where(exact, scale, moment.scale))
