"""Quantised weights as files that transformers loads by itself: integers of few bits and their scales.

Three layouts, chosen so that the loaded model multiplies what the evaluated one does:

    bitnet   ternary weights, four to a byte, and inputs rounded to int8 per token: the `BitLinear` of transformers
    torchao  integers of 2 to 8 bits, one to a byte, inputs as they are: torchao's tensor subclasses in safetensors
    metal    integers of 2, 4 or 8 bits, as many to a byte as fit, inputs as they are: transformers' format of the MLX
             kernels, which anything but an Apple GPU turns into plain weights when it loads them

The codes written are the caller's own. torchao is not asked to quantise: its symmetric mapping divides the range of
int8 by 255/2 where the usual formula has 127, and would give other codes. For the same reason its int8 inputs (scale
max|x| / 127.5 per token) are not offered. Its own layouts of two codes to a byte run on GPUs or XPUs only.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.hf import SHARD_BYTES, write_files, write_json

BITNET, TORCHAO, METAL = "bitnet", "torchao", "metal"
PER_BYTE = 4
"""Ternary codes in a byte of the bitnet layout."""
METAL_BITS = (2, 4, 8)
METAL_GROUPS = (128, 64, 32)
"""Group sizes of the MLX kernels."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight W = scale * codes of one linear layer.

    Raises:
        ValueError: the shapes do not fit each other.
    """

    codes: Tensor
    """(out, in) int8, from -(2^(bits-1) - 1) to 2^(bits-1) - 1; with 2 bits -1, 0, 1."""
    scale: Tensor
    """(out / rows, in / columns): one for each block; (1, 1) per tensor, (out, 1) per row, (out, in / G) per group of G."""
    bits: int
    """2 to 8."""

    def __post_init__(self) -> None:
        shape, scales = tuple(self.codes.shape), tuple(self.scale.shape)
        whole = len(scales) == 2 and all(n and size % n == 0 for size, n in zip(shape, scales))
        if self.codes.dtype != torch.int8 or len(shape) != 2 or not whole:
            raise ValueError(f"{self.codes.dtype} codes {shape} and scales {scales}: expected int8 and equal blocks")

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        (out, inputs), (rows, columns) = self.codes.shape, self.scale.shape
        return out // rows, inputs // columns


@dataclass(frozen=True)
class Layout:
    """How packed layers are stored and what else they do to their input."""

    name: str
    """ "bitnet", "torchao" or "metal"."""
    norm_eps: float | None = None
    """bitnet: epsilon of an RMS norm of the input before it is rounded; None for no norm."""


def write_packed(
    folder: Path,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, PackedWeight],
    other_layers: list[str],
    layout: Layout,
) -> int:
    """Write a model's weights, packed, and add the `quantization_config` to the folder's `config.json`.

    Args:
        tensors: the model's weights by their Hugging Face names, in the type to store; those of `layers` are not used
            but for their type.
        layers: the packed weights by the names of their layers.
        other_layers: names of the linear layers that are not packed.

    Returns the bytes written.

    Raises:
        ValueError: a layer's shape does not fit the layout.
    """
    stored = {name: tensor.detach() for name, tensor in tensors.items()}
    metadata: dict[str, str] = {}
    other_layers = patterns_of(other_layers, layers)
    if layout.name == BITNET:
        config = _bitnet_config(layout, other_layers)
        for name, packed in layers.items():
            stored |= _bitnet_tensors(name, packed, layout, stored.pop(f"{name}.weight").dtype)
    elif layout.name == METAL:
        config = _metal_config(layers, other_layers)
        for name, packed in layers.items():
            dtype = stored[f"{name}.weight"].dtype
            stored |= _metal_tensors(name, packed, config["bits"], config["group_size"], dtype)
    else:
        config = _torchao_config(layers, other_layers)
        for name, packed in layers.items():
            stored[f"{name}.weight"] = torchao_weight(packed, stored[f"{name}.weight"].dtype)
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        # The head of every file describes the tensors of all: transformers merges the heads, and the last one wins.
        stored, metadata = flatten_tensor_state_dict(stored)
    total = write_files(folder, _groups(stored), metadata)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", settings | {"quantization_config": config})
    return total


def patterns_of(left_out: list[str], packed: Iterable[str]) -> list[str]:
    """Names of layers that are not packed as `modules_to_not_convert` has them, so that no packed layer is left out as well.

    transformers takes each as a regular expression for the beginning of a layer's name, and as its end. Up to 5.17 at least a
    beginning need not end with a part of the name, so that "up_proj" leaves out "up_proj_2". A name that begins or ends that
    of a packed layer therefore says where it ends; all others are written plainly.
    """
    names = list(packed)
    return [
        re.escape(name) + r"(?=\.|$)" if any(n.startswith(name) or n.endswith(name) for n in names) else name
        for name in left_out
    ]


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Tensors in groups of one file's size."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        num_bytes = tensor.numel() * tensor.element_size()
        if group and size + num_bytes > SHARD_BYTES:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += num_bytes
    yield group


def pack_ternary(codes: Tensor) -> Tensor:
    """(out, in) int8 of -1, 0, 1 as (out / 4, in) uint8: bits 2k and 2k + 1 hold code + 1 of the k-th quarter of rows.

    That is the layout of transformers' `integrations/bitnet.py`.
    """
    quarters = (codes + 1).to(torch.uint8).view(PER_BYTE, -1, codes.shape[1])
    packed = torch.zeros_like(quarters[0])
    for k, quarter in enumerate(quarters):
        packed |= quarter << (2 * k)
    return packed


def _bitnet_tensors(name: str, packed: PackedWeight, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    out, inputs = packed.codes.shape
    if packed.bits != 2 or packed.scale.numel() != 1:
        raise ValueError(f"{name}: the bitnet layout holds ternary codes with one scale per tensor")
    if out % PER_BYTE:
        raise ValueError(
            f"{name} has {out} rows: the bitnet layout packs rows by four; leave the layer out (modules), or use a "
            "width that 4 divides"
        )
    # BitLinear divides by its scale, which is therefore the inverse of ours.
    tensors = {
        f"{name}.weight": pack_ternary(packed.codes),
        f"{name}.weight_scale": (1 / packed.scale).view(1).to(dtype),
    }
    if layout.norm_eps is not None:
        tensors[f"{name}.rms_norm.weight"] = torch.ones(inputs, dtype=dtype)
    return tensors


def _bitnet_config(layout: Layout, other_layers: list[str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": other_layers,
        "use_rms_norm": layout.norm_eps is not None,
    }
    return config if layout.norm_eps is None else config | {"rms_norm_eps": layout.norm_eps}


def _metal_config(layers: Mapping[str, PackedWeight], other_layers: list[str]) -> dict[str, Any]:
    """The format has one width and one group size for all layers."""
    bits = min(n for n in METAL_BITS if n >= max(packed.bits for packed in layers.values()))
    fitting = [n for n in METAL_GROUPS if all(packed.block[1] % n == 0 for packed in layers.values())]
    if not fitting:
        columns = sorted({packed.block[1] for packed in layers.values()})
        raise ValueError(
            f"scales are shared by {', '.join(map(str, columns))} inputs: the metal layout has groups of "
            f"{', '.join(map(str, METAL_GROUPS))}, one of which has to divide these; take --packed torchao"
        )
    return {
        "quant_method": "metal",
        "bits": bits,
        "group_size": fitting[0],
        "modules_to_not_convert": other_layers,
    }


def _metal_tensors(name: str, packed: PackedWeight, bits: int, group: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """W = scale * unsigned code + offset by groups; 32 / bits codes to a word, the first in the lowest bits."""
    zero = 1 << (bits - 1)
    codes = (packed.codes.long() + zero).unflatten(1, (-1, 32 // bits))
    words = (codes << (bits * torch.arange(32 // bits))).sum(-1)
    scale = _row_scales(packed).repeat_interleave(packed.block[1] // group, 1).to(dtype)
    return {f"{name}.weight": words.to(torch.uint32), f"{name}.scales": scale, f"{name}.qbiases": -zero * scale}


def torchao_weight(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as torchao's tensor subclass of this precision, which computes in `dtype`."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    if packed.bits == 8:
        return Int8Tensor(packed.codes, packed.scale.float(), list(packed.block), dtype)
    scale = _row_scales(packed).to(dtype)
    block = [1, packed.block[1]]
    zero = torch.zeros_like(scale, dtype=torch.int8)
    return IntxUnpackedToInt8Tensor(packed.codes, scale, zero, getattr(torch, f"int{packed.bits}"), block, dtype, None)


def _row_scales(packed: PackedWeight) -> Tensor:
    """(out, in / columns): a scale of more than one row is repeated, for want of such a granularity in torchao."""
    return packed.scale.repeat_interleave(packed.block[0], 0)


def _torchao_config(layers: Mapping[str, PackedWeight], other_layers: list[str]) -> dict[str, Any]:
    """What would quantise the layers so; a reader gets the kind of each tensor from the files' heads."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import FqnToConfig

    of_layer = OrderedDict((name, _torchao_kind(packed)) for name, packed in layers.items())
    as_text = {json.dumps(config_to_dict(kind), sort_keys=True) for kind in of_layer.values()}
    kind = next(iter(of_layer.values())) if len(as_text) == 1 else FqnToConfig(of_layer)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(kind)},
        "modules_to_not_convert": other_layers,
    }


def _torchao_kind(packed: PackedWeight) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, PerRow, PerTensor

    rows, columns = packed.block
    whole_rows = columns == packed.codes.shape[1]
    if packed.bits == 8:
        per_rows = PerRow() if rows == 1 else PerTensor()
        return Int8WeightOnlyConfig(granularity=per_rows if whole_rows else PerGroup(columns))
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{packed.bits}"), granularity=PerAxis(0) if whole_rows else PerGroup(columns)
    )
