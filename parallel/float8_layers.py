"""Which layers gain from float8, and why the others do not. Torch-free, for configuration checks and plans."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.sizes import LlamaShape

if TYPE_CHECKING:
    from train.config import Float8Config


PART = "the part of each of"


@dataclass(frozen=True)
class Choice:
    """Of one kind of layer, the same in every block."""

    name: str
    """Within a block."""
    out_features: int
    in_features: int
    """Of the part that one tensor-parallel device holds."""
    reason: str
    """Why it stays as it is, or empty."""


def block_layers(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a block."""
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "self_attn.q_proj": (queries, shape.dim),
        "self_attn.k_proj": (keys, shape.dim),
        "self_attn.v_proj": (keys, shape.dim),
        "self_attn.o_proj": (shape.dim, queries),
        "mlp.gate_proj": (shape.ffn_dim, shape.dim),
        "mlp.up_proj": (shape.ffn_dim, shape.dim),
        "mlp.down_proj": (shape.dim, shape.ffn_dim),
    }


def choices(shape: LlamaShape, config: Float8Config, tensor_degree: int = 1) -> Iterator[Choice]:
    """What becomes of each layer of a block. The head stays as it is: its errors go straight into the loss."""
    for name, (out_features, in_features) in block_layers(shape).items():
        # By the whole matrix, so that a run is the same on every layout.
        reason = _reason(name, out_features, in_features, config)
        if name.endswith(("o_proj", "down_proj")):
            in_features //= tensor_degree
        else:
            out_features //= tensor_degree
        if not reason and (out_features % 16 or in_features % 16):
            reason = f"{PART} {tensor_degree} devices is no multiple of 16"
        yield Choice(name, out_features, in_features, reason)


def unmatched(shape: LlamaShape, config: Float8Config) -> list[str]:
    """Patterns of `float8.skip` that name no layer of a block."""
    names = [f"model.layers.0.{name}" for name in block_layers(shape)]
    return [pattern for pattern in config.skip if not fnmatch.filter(names, pattern)]


def _reason(name: str, out_features: int, in_features: int, config: Float8Config) -> str:
    if any(fnmatch.fnmatchcase(f"model.layers.0.{name}", pattern) for pattern in config.skip):
        return "float8.skip names it"
    if out_features % 16 or in_features % 16:
        return "tensor cores take multiples of 16"
    if config.min_size:
        return "" if min(out_features, in_features) >= config.min_size else f"smaller than {config.min_size}"
    # Where torchao measured no gain on an H100 (torchao 0.18, float8/README.md and its automatic filters).
    if config.recipe == "tensorwise":
        small = in_features <= 4096 and out_features <= 1024
    else:
        small = out_features <= 2048 or in_features <= 1024 or (out_features <= 4096 and in_features <= 2048)
    return "too small to gain on an H100" if small else ""
