"""float8 matrix products, by torchao: inputs, weights and gradients are scaled and cast for each product.

Scales are rounded to powers of two in both recipes. A float8 number keeps its mantissa under such a scale, so that a
device which scales its own part of a matrix by its own largest value rounds as one that has the whole: the layout shows
only in numbers that are too small for a float8 exponent. On devices without float8 products torchao emulates them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args
from torchao.float8.float8_utils import _round_scale_down_to_power_of_2
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from parallel.float8_layers import choices
from parallel.tensor import ColumnLinear, RowLinear, local

if TYPE_CHECKING:
    from models.llama import Llama
    from parallel.mesh import Mesh
    from train.config import Config


class _Float8Split:
    """The product of a layer that is split over tensor-parallel devices."""

    def multiply(self: Any, x: Tensor) -> Tensor:
        return matmul_with_hp_or_float8_args.apply(x, local(self.weight).t(), self.linear_mm_config, self.config)


class Float8ColumnLinear(_Float8Split, ColumnLinear):
    pass


class Float8RowLinear(_Float8Split, RowLinear):
    pass


_SPLIT: dict[type, type] = {ColumnLinear: Float8ColumnLinear, RowLinear: Float8RowLinear}


def convert(model: Llama, config: Config, device: torch.device, tensor_degree: int = 1) -> None:
    """Replace the layers that gain, in place; after tensor parallelism, before transforms.

    With the tensorwise recipe FSDP gathers weights as float8, half the bytes, but for those that are split.
    """
    recipe = config.float8.recipe
    options = Float8LinearConfig() if recipe == "tensorwise" else Float8LinearConfig.from_recipe_name(recipe)
    options = replace(options, emulate=not _has_float8(device), round_scales_to_power_of_2=True, pad_inner_dim=False)
    template = Float8Linear.from_float(nn.Linear(16, 16, bias=False, device="meta"), options)
    gathered = replace(options, enable_fsdp_float8_all_gather=recipe == "tensorwise")
    chosen = [choice.name for choice in choices(model.shape, config.float8, tensor_degree) if not choice.reason]
    for block in model.model.layers.values():
        for name in chosen:
            parent = block.get_submodule(name.rpartition(".")[0])
            layer = block.get_submodule(name)
            if type(layer) in _SPLIT:
                layer.__class__ = _SPLIT[type(layer)]
                layer.config, layer.linear_mm_config = options, template.linear_mm_config
                continue
            setattr(parent, name.rpartition(".")[2], Float8Linear.from_float(layer, gathered))


@torch.no_grad()
def precompute_scales(parts: Sequence[nn.Module], mesh: Mesh) -> None:
    """Before the first step and after each: the scales of weights that FSDP gathers as float8, with one exchange for all.

    As `torchao.float8.precompute_float8_dynamic_scale_for_fsdp`, with scales rounded down to powers of two.
    """
    layers = [module for part in parts for module in part.modules() if isinstance(module, Float8Linear)]
    # The object itself, not a view of it: FSDP reads the scale there.
    held = [layer.weight._local_tensor for layer in layers if isinstance(layer.weight, DTensor)]
    wrapped = [part for part in held if isinstance(part, WeightWithDynamicFloat8CastTensor)]
    if not wrapped:
        return
    # A shard may be empty.
    parts_of_all = [w._tensor if w.numel() else w._tensor.new_zeros(1) for w in wrapped]
    largest = torch.stack(torch._foreach_norm(parts_of_all, ord=float("inf")))
    group = mesh.parameters.get_group("shard")
    if group.size() > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    dtype = layers[0].config.cast_config_weight.target_dtype
    scales = (torch.finfo(dtype).max / largest.clamp(min=1e-12).double()).float()
    for weight, scale in zip(wrapped, _round_scale_down_to_power_of_2(scales)):
        weight._precomputed_scale = scale


def _has_float8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
