"""The converter of an analog product on NVIDIA GPUs: what `ProductCode.convert`, `observe` and `pack` do, in one pass.

It reads the sums as the matrix product wrote them, once, and writes converted ones, a bit for each that was not
clipped, and the largest magnitude. Shot noise reads the sums of magnitudes beside them, and tiles the total so far.

A program has some chunks of 128 elements, numbered as random numbers are: along the columns of the unsharded operand,
so that a shard's first chunk may begin before its rows do. Call i of Philox serves elements i, i + 16, ..., i + 112,
hence a chunk is worked on by eighths of 16 columns, and random words stay in the thread that drew them. With 64 chunks
for 128 threads one has 8 neighbouring columns of each eighth: it moves 16 bytes of bfloat16 at a time, and packs its
own 8 bits.

Results are the golden ones bit for bit at full strength and without shot noise, so every operation rounds by itself. A
compiler may contract a product and a sum to one operation, and torch.compile has no way to forbid it; where it would
change a result a selection stands between the two (as it does in the golden function, for a range that is not known
yet). The blend of a warm-up contracts on purpose, as torch's does on most devices. Normal numbers agree up to their last
places, so a rounded sum with shot noise may differ where it was that close to a threshold.
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from transforms import operands
from transforms.kernels.philox import CHUNK, chunk_words, normals, philox, uniform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transforms.product import ProductCode

LANE = tl.constexpr(operands.LANE)
CALLS = tl.constexpr(16)
BITS = tl.constexpr(8)
WORD_BITS = 32
"""Of what masks are packed in (`product.pack`)."""
SMALLEST = tl.constexpr(torch.finfo(torch.float32).tiny)
"""Of a scale."""
INFINITY = tl.constexpr(0x7F800000)
"""The word of float32's infinity; those of NaN are larger."""
ROUNDER = tl.constexpr(2.0**23)
"""Plus and minus this a magnitude below it is rounded to an integer, to even in ties."""
PACKED, BYTES = tl.constexpr(0), tl.constexpr(1)
_TILE, _NOISY_TILE = 64, 32


@triton.jit
def _nearest(value, LEVELS: tl.constexpr):
    """Rounded to an integer and clamped; NaN and the sign of a zero remain."""
    magnitude = tl.abs(value)
    magnitude = tl.where(magnitude > LEVELS, LEVELS, magnitude)
    rounded = ((magnitude + ROUNDER) - ROUNDER).to(tl.int32, bitcast=True)
    return (rounded | (value.to(tl.int32, bitcast=True) & -0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _upwards(value, number, LEVELS: tl.constexpr):
    """Rounded up with the probability that makes the mean exact, and clamped; NaN remains."""
    rounded = tl.floor(value + number)
    rounded = tl.where(rounded > LEVELS, LEVELS, rounded)
    return tl.where(rounded < -LEVELS, -LEVELS, rounded)


@triton.jit
def _noisy(value, magnitude, full_scale, normal, strength, PHOTONS: tl.constexpr):
    """With shot noise. That a variance of 0 adds nothing keeps the compiler from contracting product and sum."""
    variance = tl.div_rn(full_scale * magnitude, tl.full([1, 1], PHOTONS, tl.float32))
    return value + tl.where(variance > 0, tl.sqrt_rn(variance) * normal * strength, variance)


@triton.jit
def _blended(exact, found, strength):
    """torch.lerp, where the strength is below 1."""
    small = strength < 0.5
    near = tl.where(small, exact, found)
    mixed = tl.fma(tl.where(small, strength, strength - 1.0) + tl.zeros_like(exact), found - exact, near)
    return tl.where(strength < 1, mixed, found)


@triton.jit
def _store_kept(kept, mask, row, rows, width, column, call, TILE: tl.constexpr, KEPT: tl.constexpr):
    """One eighth's bits (its first columns are multiples of 8, then), or bytes."""
    if KEPT == PACKED:
        bits = tl.where(mask, 1, 0) << (call % BITS)[None, :]
        packed = tl.sum(tl.reshape(bits, [TILE, CALLS // BITS, BITS]), 2)
        start = column[:, None] + BITS * tl.arange(0, CALLS // BITS)[None, :]
        inside = (row < rows)[:, None] & (start >= 0) & (start < width)
        offset = row.to(tl.int64)[:, None] * ((width + BITS - 1) // BITS) + start // BITS
        tl.store(kept + offset, packed.to(tl.uint8), mask=inside)
    else:
        start = column[:, None] + call[None, :]
        inside = (row < rows)[:, None] & (start >= 0) & (start < width)
        tl.store(kept + row.to(tl.int64)[:, None] * width + start, mask.to(tl.uint8), mask=inside)


@triton.jit
def _convert_kernel(
    acc, total, magnitudes, full_scale, table, range_, seen, strength, context, tokens, out, kept,
    rows, width, chunks, skip, first_chunk, length, heads, lane, first_position,
    LEVELS: tl.constexpr, STOCHASTIC: tl.constexpr, PHOTONS: tl.constexpr, BLENDED: tl.constexpr,
    TOTAL: tl.constexpr, OBSERVE: tl.constexpr, TOKENS: tl.constexpr, KEPT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`rows` of `width` elements have `chunks` chunks each, numbered from `first_chunk`, of whose elements the first
    `skip` are not here. Rows are (batch, heads, length); `lane` is that of the first head times LANE. Tokens are
    (2, batch, length), position and sample; without them positions count from `first_position`.
    """
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, chunk = item // chunks, item % chunks
    column = chunk * CHUNK - skip
    call = tl.arange(0, CALLS)
    base = row.to(tl.int64) * width + column
    if STOCHASTIC or PHOTONS > 0:
        token = (row // (length * heads)) * length + row % length
        if TOKENS:
            position = tl.load(tokens + token, mask=row < rows, other=0)
            sample = tl.load(tokens + rows // heads + token, mask=row < rows, other=0)
        else:
            position = first_position + (row % length).to(tl.int64)
            sample = tl.load(context + 2) + row // (length * heads)
        position += lane + (row // length % heads).to(tl.int64) * LANE
        first, second = chunk_words(first_chunk + chunk)
        step = tl.zeros_like(first) + tl.load(context).to(tl.uint32)
        counter = (
            first[:, None] + call.to(tl.uint32)[None, :],
            (second + position.to(tl.uint32))[:, None],
            sample.to(tl.uint32)[:, None],
            step[:, None],
        )
    if STOCHASTIC:
        words = philox(counter, 0, (tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32)))
    limit = tl.load(range_)
    known = limit > 0
    scale = tl.div_rn(limit, tl.full([], LEVELS, tl.float32))
    scale = tl.where(scale < SMALLEST, SMALLEST, scale)
    share = tl.load(strength) if BLENDED else 1.0
    largest = tl.zeros([TILE, CALLS], tl.int32)
    for parity in tl.static_range(2):
        if PHOTONS > 0:
            noise_key = (tl.load(table + 2).to(tl.uint32), tl.load(table + 3).to(tl.uint32))
            drawn = normals(counter, parity * CALLS, noise_key)
        for quarter in tl.static_range(4):
            eighth = 2 * quarter + parity
            here = column[:, None] + (call + eighth * CALLS)[None, :]
            inside = (row < rows)[:, None] & (here >= 0) & (here < width)
            offset = base[:, None] + (call + eighth * CALLS)[None, :]
            exact = tl.load(acc + offset, mask=inside, other=0.0).to(tl.float32)
            if OBSERVE:
                # Magnitudes are ordered like their words; infinity and NaN come last and set no range.
                word = exact.to(tl.int32, bitcast=True) & 0x7FFFFFFF
                largest = tl.maximum(largest, tl.where(word < INFINITY, word, 0))
            if PHOTONS > 0:
                magnitude = tl.load(magnitudes + offset, mask=inside, other=0.0).to(tl.float32)
                exact = _noisy(exact, magnitude, tl.load(full_scale), drawn[quarter], share, PHOTONS)
            value = tl.div_rn(exact, scale + tl.zeros_like(exact))
            if STOCHASTIC:
                rounded = _upwards(value, uniform(words[quarter], parity == 1), LEVELS)
            else:
                rounded = _nearest(value, LEVELS)
            found = tl.where(known, rounded * scale, exact)
            if BLENDED:
                found = _blended(exact, found, share)
            if TOTAL:
                found = tl.load(total + offset, mask=inside, other=0.0) + found
            tl.store(out + offset, found.to(out.dtype.element_ty), mask=inside)
            passes = tl.where(known, inside & (tl.abs(exact) <= limit), inside)
            _store_kept(kept, passes, row, rows, width, column + eighth * CALLS, call, TILE, KEPT)
    if OBSERVE:
        found_word = tl.max(tl.max(largest, 1), 0)
        words_seen = seen.to(tl.pointer_type(tl.int32), bitcast=True)
        # What is there can only grow: most programs have nothing to say.
        if found_word > tl.load(words_seen):
            tl.atomic_max(words_seen, found_word)


@cache
def _constants(text: str) -> dict[str, Any]:
    """Of `ProductCode.text`."""
    levels, stochastic, photons = json.loads(text)
    return {"LEVELS": float(levels), "STOCHASTIC": stochastic, "PHOTONS": float(photons)}


@triton_op("newcompute::convert", mutates_args={"seen"})
def _convert(
    acc: Tensor,
    total: Tensor | None,
    magnitudes: Tensor | None,
    full_scale: Tensor | None,
    table: Tensor | None,
    range_: Tensor,
    seen: Tensor | None,
    strength: Tensor | None,
    context: Tensor | None,
    tokens: Tensor | None,
    code: str,
    first_column: int,
    length: int,
    heads: int,
    first_lane: int,
    first_position: int,
    single: bool,
    packs: bool,
) -> tuple[Tensor, Tensor]:
    """Converted sums, float32 where `single`, else of their dtype; and which were not clipped, as bytes, or packed: words
    where they end within one, else their bytes."""
    acc, magnitudes = acc.contiguous(), None if magnitudes is None else magnitudes.contiguous()
    width = acc.shape[-1]
    rows, skip = acc.numel() // width, first_column % CHUNK.value
    out = torch.empty_like(acc, dtype=torch.float32 if single else acc.dtype)
    aligned = skip % BITS.value == 0 and width % WORD_BITS == 0
    size = triton.cdiv(width, BITS.value) if packs and aligned else width
    kept = torch.empty((*acc.shape[:-1], size), dtype=torch.uint8, device=acc.device)
    given = {
        "total": total, "magnitudes": magnitudes, "full_scale": full_scale, "table": table, "range_": range_,
        "seen": seen, "strength": strength, "context": context, "tokens": tokens,
    }  # fmt: skip
    pointers = {name: acc if tensor is None else tensor for name, tensor in given.items()}
    chunks = triton.cdiv(skip + width, CHUNK.value)
    constants = _constants(code)
    tile = _NOISY_TILE if constants["PHOTONS"] else _TILE
    wrap_triton(_convert_kernel)[(triton.cdiv(rows * chunks, tile),)](
        acc, **pointers, out=out, kept=kept,
        rows=rows, width=width, chunks=chunks, skip=skip, first_chunk=first_column // CHUNK.value,
        length=length, heads=heads, lane=first_lane * LANE.value, first_position=first_position,
        **constants, BLENDED=strength is not None, TOTAL=total is not None, OBSERVE=seen is not None,
        TOKENS=tokens is not None, KEPT=(PACKED if packs and aligned else BYTES).value, TILE=tile, num_warps=4,
    )  # fmt: skip
    if packs and not aligned:
        from transforms.product import pack

        kept = pack(kept != 0)
    return out, kept


def convert(
    code: ProductCode,
    acc: Tensor,
    own: Sequence[Tensor],
    place: tuple[Tensor | None, Tensor | None],
    observing: bool,
    *,
    tile: int = 0,
    heads: tuple[int, int] | None = None,
    total: Tensor | None = None,
    magnitudes: Tensor | None = None,
    full_scale: Tensor | None = None,
    single: bool = False,
    packs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums after noise and conversion, and which of them were not clipped: bool, or as `product.pack` has them.

    Args:
        acc: (..., out) of a linear layer, or a product of attention, (B, H, t, N), if `heads` are given.
        own: as `Product.tensors`.
        place: context and tokens.
        tile: number of the tile whose sums they are, among those that are here.
        heads: number of the first head, and of the first of these t queries among those of `place`.
        total: float32, the sum over the tiles before, to be added.
        magnitudes: sums of |x w| in the dtype of `acc`, and `full_scale` r_x r_w, (1,) float32: for shot noise.
        single: the result is float32, otherwise of the dtype of `acc`.

    Raises:
        ValueError: the rows cannot be matched to the batch's tokens.
    """
    of, (context, tokens) = code.read(own), place if code.stochastic else (None, None)
    length, lanes, lane, position = 1, 1, code.first_tile + tile, 0
    if heads is not None:
        lanes, length = acc.shape[1:3]
        lane, position = heads
        tokens = None if tokens is None else tokens[:, :, position : position + length].contiguous()
    elif tokens is not None:
        assert context is not None
        tokens = torch.stack(operands.positions_and_samples(acc, context, tokens))
        length = acc.numel() // acc.shape[-1] if acc.numel() else 1
    elif code.stochastic:
        if acc.dim() != 3:
            raise ValueError(f"an input of shape {tuple(acc.shape)} is not (batch, sequence, features)")
        length = acc.shape[-2]
    dtype = torch.float32 if single else acc.dtype
    if acc.numel() == 0:
        kept = torch.zeros((*acc.shape[:-1], -(-acc.shape[-1] // WORD_BITS)), dtype=torch.int32, device=acc.device)
        return acc.to(dtype, copy=True), kept if packs else torch.zeros_like(acc, dtype=torch.bool)
    found, kept = torch.ops.newcompute.convert(
        acc,
        total,
        magnitudes,
        full_scale,
        of.keys,
        of.used,
        of.seen if observing else None,
        of.strength,
        context,
        tokens,
        code.text,
        code.first_column,
        length,
        lanes,
        lane,
        position,
        single,
        packs,
    )
    if not packs:
        return found, kept.view(torch.bool)
    # Bytes in the order of memory are words of a little-endian machine.
    return found, kept if kept.dtype == torch.int32 else kept.view(torch.int32)
