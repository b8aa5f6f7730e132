"""Uniform and normal numbers on NVIDIA GPUs: `operands.drawn_rows` as one kernel, which writes them and nothing else.

A program has 64 chunks of 128 elements, and writes 16 bytes of a thread at a time; a thread draws the uniform numbers
that it writes. Uniform numbers are those of the golden function bit for bit; normal ones agree up to their last places,
as far as logarithms of devices do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from transforms.kernels.philox import CHUNK, chunk_words, normals, philox, uniform

CALLS = tl.constexpr(16)
"""Width of the tile of calls: those that serve a chunk with uniform numbers; normal ones take two such tiles."""
_TILE = 64


@triton.jit
def _draw_kernel(
    key, position, sample, step, out, rows, width, chunks, NORMAL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first `width` numbers of every row. Element 16 e + i of a chunk is of call i, or if normal i + 16 (e mod 2)."""
    item = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row, chunk = item // chunks, item % chunks
    call = tl.arange(0, CALLS)
    first, second = chunk_words(chunk)
    second += tl.load(position + row, mask=row < rows, other=0).to(tl.uint32)
    third = tl.load(sample + row, mask=row < rows, other=0).to(tl.uint32)
    fourth = tl.zeros_like(first) + tl.load(step).to(tl.uint32)
    counter = (first[:, None] + call.to(tl.uint32)[None, :], second[:, None], third[:, None], fourth[:, None])
    words = (tl.load(key).to(tl.uint32), tl.load(key + 1).to(tl.uint32))
    if not NORMAL:
        drawn = philox(counter, 0, words)
    for parity in tl.static_range(2):
        if NORMAL:
            drawn = normals(counter, parity * CALLS, words)
        for quarter in tl.static_range(4):
            column = chunk[:, None] * CHUNK + (call + (2 * quarter + parity) * CALLS)[None, :]
            number = drawn[quarter] if NORMAL else uniform(drawn[quarter], parity == 1)
            tl.store(out + row[:, None] * width + column, number, mask=(row < rows)[:, None] & (column < width))


@triton_op("newcompute::draw_on_gpu", mutates_args={})
def _draw(key: Tensor, position: Tensor, sample: Tensor, step: Tensor, width: int, normal: bool) -> Tensor:
    out = torch.empty((len(position), width), dtype=torch.float32, device=key.device)
    chunks = triton.cdiv(width, CHUNK.value)
    grid = (triton.cdiv(len(position) * chunks, _TILE),)
    tensors = (key.contiguous(), position.contiguous(), sample.contiguous(), step, out)
    wrap_triton(_draw_kernel)[grid](
        *tensors, rows=len(position), width=width, chunks=chunks, NORMAL=normal, TILE=_TILE, num_warps=4
    )
    return out


def draw(key: Tensor, position: Tensor, sample: Tensor, step: Tensor, width: int, normal: bool) -> Tensor:
    """`operands.drawn_rows` on a GPU."""
    if len(position) == 0 or width == 0:
        return key.new_empty((len(position), width), dtype=torch.float32)
    return torch.ops.newcompute.draw_on_gpu(key, position, sample, step, width, normal)
