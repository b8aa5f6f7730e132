"""Initial weights that do not depend on the layout.

Element (row, column) of a parameter is drawn from Philox with the key (seed, clean name) and the counter (column // 4,
row), so that a rank fills only its own shard, on its own device, with the bits any other layout gives it. DTensor's own
initialisation on CPU would give every shard the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from parallel.names import LEARNED, named_parameters
from transforms.noise import philox_4x32, stream_key

if TYPE_CHECKING:
    from models.llama import Llama

ADAPTERS = ("lora_A", "lora_B")


def of_model(name: str) -> bool:
    """Whether a parameter is one of the model's own, and not of an adapter or of a hardware effect."""
    return not name.endswith(ADAPTERS) and not name.startswith(LEARNED)


TRUNCATION = 3.0
_QUANTILES = 4096
_CHUNK_WORDS = 1 << 20  # int64 temporaries of a few tens of MB, whatever the size of the parameter


def truncated_normal_table() -> Tensor:
    """Quantiles of the standard normal cut at 3 sigma, (4097,) float32.

    Drawing is "pick an interval of equal probability, then a point inside it": a gather and exactly rounded products
    and sums, so that every device gives the same bits. erfinv would not: its vector and scalar paths differ in the last
    place, and which one an element meets depends on where the shard begins.
    """
    normal = NormalDist()
    low, high = normal.cdf(-TRUNCATION), normal.cdf(TRUNCATION)
    edges = [normal.inv_cdf(low + (high - low) * i / _QUANTILES) for i in range(1, _QUANTILES)]
    return torch.tensor([-TRUNCATION, *edges, TRUNCATION], dtype=torch.float32)


def fill_truncated_normal_(local: Tensor, offsets: tuple[int, int], key: tuple[int, int], std: float) -> None:
    """Fill a shard (rows, columns) that begins at `offsets` in the whole parameter."""
    rows, columns = local.shape
    table = truncated_normal_table().to(local.device) * std
    first = offsets[1] // 4
    column_words = torch.arange(first, (offsets[1] + columns + 3) // 4, device=local.device)
    skip = offsets[1] - 4 * first
    rows_per_chunk = max(1, _CHUNK_WORDS // max(1, columns))
    for start in range(0, rows, rows_per_chunk):
        stop = min(start + rows_per_chunk, rows)
        row_words = torch.arange(offsets[0] + start, offsets[0] + stop, device=local.device)[:, None]
        words = torch.stack(philox_4x32((column_words, row_words, 0, 0), key), dim=-1).flatten(1)
        words = words[:, skip : skip + columns]
        interval, position = words >> 20, (words & 0xFFFFF).float() / (1 << 20)
        lower, upper = table[interval], table[interval + 1]
        local[start:stop] = lower + (upper - lower) * position


@torch.no_grad()
def load_weights(parts: Sequence[Llama], read: Callable[[str, int, int], Tensor]) -> None:
    """Set every parameter from `read(name, first row, number of rows)`, of which each rank asks for its own rows only.

    Adapters are no part of a file; they keep what `init_weights` gave them.
    """
    for name, parameter in named_parameters(*parts):
        if not of_model(name):
            continue
        local, (row, column) = _local_part(parameter)
        part = read(name, row, local.shape[0])
        local.copy_(part if part.ndim == 1 else part[:, column : column + local.shape[1]])


@torch.no_grad()
def init_weights(parts: Sequence[Llama], seed: int, adapters_only: bool = False) -> None:
    """Set every parameter to its initial value, in place; sharded or not, the values are the same bits.

    Matrices: normal of `model.initial_std(name)`, truncated at 3 sigma. Norms: 1. Padding of the vocabulary: 0. Adapters:
    A of variance 1 / in, B 0. What hardware effects learn: 0.
    """
    model = parts[0]
    for name, parameter in named_parameters(*parts):
        if adapters_only and of_model(name):
            continue  # comes from a file
        local, offsets = _local_part(parameter)
        if name.endswith("lora_B") or name.startswith(LEARNED):
            local.zero_()
            continue
        std = parameter.shape[1] ** -0.5 if name.endswith("lora_A") else model.initial_std(name)
        if std is None:
            local.fill_(1.0)
            continue
        fill_truncated_normal_(local, offsets, stream_key(seed, name, "init"), std)
        if model.is_vocabulary(name):
            local[max(0, model.shape.vocab_size - offsets[0]) :] = 0.0


def _local_part(parameter: nn.Parameter) -> tuple[Tensor, tuple[int, int]]:
    """This rank's part of a parameter and the global (row, column) where it begins."""
    if not isinstance(parameter, DTensor):
        return parameter.data, (0, 0)
    _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    row, column = (*offsets, 0)[:2]
    return parameter.to_local(), (row, column)
