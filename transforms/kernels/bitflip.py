"""Random bit errors on NVIDIA GPUs: Triton kernels that give the golden function's bits (`transforms/bitflip.py`).

*Chunk law.* A program holds 64 chunks of 128 elements. It copies them as one piece of memory, through the storage
format and the threshold, and then writes the elements that are hit once more: each of its 64 threads draws the words
of one chunk, 2 to 3 Philox calls at p = 2^-16, and reads and writes only hits. So the pass should cost its memory
traffic. Masks for a tile of elements were the other way: the compiler moves their random words into the layout of the
elements, where every thread draws those of several chunks again (5 times the Philox calls; with 17 slots 47 kB of
spills). Where value and storage have one format and no threshold is set, the second half alone flips in place, and is
its own inverse.

*Dense law.* Bound by integer arithmetic: every (bit, element) has 16 bits of its own. A program holds 16 chunks of
which call i serves elements i, i + 16, ..., i + 112, so the tile of calls is 16 by 16 and each half-word of it meets
one eighth of the chunk. Bits are a loop at run time (unrolled, 32 of them are 15,000 instructions); the lower 32 bits
of U, which decide ties, are drawn once for all of them.

*Shards.* Chunks are numbered as in the unsharded operand, at no cost where the shard begins and its rows follow each
other at multiples of 128. Elsewhere chunks do not start where rows do: a row may need one more, the first begins
before it, and what a program copies is no longer aligned.

With a threshold, `pull` takes a gradient back: the same kernels draw the same event again and write the gradient
instead of the value, so that a backward neither saves nor materialises the stored value.

Words and values are handled as integers, so that NaN takes the same path on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from transforms import sampling
from transforms.bitflip import STORAGE, BitflipCode
from transforms.kernels.philox import CHUNK, chunk_words, philox
from transforms.operands import positions_and_samples

CALLS_PER_BIT = tl.constexpr(sampling._CALLS_PER_BIT)
TIE_DRAW = tl.constexpr(sampling._TIE_DRAW)
STUCK_DRAW = tl.constexpr(sampling._STUCK_DRAW)
CALLS_PER_WORD = tl.constexpr(sampling.CHUNK // 4)
"""Calls of which each serves four elements with a whole word: ties and stuck values."""

# How the chunks of rows are numbered: from 0; from that of each row's first element; and where chunks do not start
# where rows do.
WHOLE, ALIGNED, SHIFTED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Mantissa bits name a format.
BFLOAT16, FLOAT16, FLOAT32 = tl.constexpr(7), tl.constexpr(10), tl.constexpr(23)

_MANTISSA = {dtype: mantissa for dtype, _, mantissa in STORAGE.values()}
_LANES, _PART = 64, 2048
"""Chunk law: chunks of a program, one for each of its threads, and elements that it copies at once."""
_DENSE_TILE = 16
"""Dense law: chunks of a program."""


@triton.jit
def _counter(
    row, chunk, length, step, group, first_sample, position, sample,
    OF_WEIGHT: tl.constexpr, PERSISTENT: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The four counter words at draw 0 of chunks of rows, as `BitflipCode.rows` and `sampling.words_of` define them.

    It takes what was loaded, not the pointers: were they arguments of a function on whose result an address depends,
    torch.compile would take them for outputs, and a block would copy its context for every operand.
    """
    low, high = chunk_words(chunk)
    nothing = tl.zeros_like(low)
    if PERSISTENT:
        return low, high, nothing, nothing
    elif OF_WEIGHT:
        return low, high, nothing + group.to(tl.uint32), nothing + step.to(tl.uint32)
    elif TOKENS:
        return low, high + position.to(tl.uint32), sample.to(tl.uint32), nothing + step.to(tl.uint32)
    else:
        position, sample = row % length, first_sample + row // length
        return low, high + position.to(tl.uint32), sample.to(tl.uint32), nothing + step.to(tl.uint32)


# A `return` in a branch known at compile time does not spare Triton the lines below it, hence the `else` branches.


@triton.jit
def _to_single(word, FORMAT: tl.constexpr):
    """The float32 bits of the value that a word of a format holds. Of a 16-bit word the upper half is ignored."""
    if FORMAT == FLOAT32:
        return word
    elif FORMAT == BFLOAT16:
        return word << 16
    else:
        return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _from_single(bits, FORMAT: tl.constexpr):
    """The word of a format nearest to a float32 value, to even in ties, given its bits."""
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if FORMAT == FLOAT32:
        return bits
    elif FORMAT == BFLOAT16:
        return tl.where(nan, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    else:
        rounded = bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return tl.where(nan, 0x7E00, rounded)


@triton.jit
def _convert(word, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    if SOURCE == TARGET:
        return word
    else:
        return _from_single(_to_single(word, SOURCE), TARGET)


@triton.jit
def _bits(value, FORMAT: tl.constexpr):
    """The bits of values as int32, whatever their width."""
    if FORMAT == FLOAT32:
        return value.to(tl.int32, bitcast=True)
    else:
        return value.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _from_bits(bits, like, FORMAT: tl.constexpr):
    if FORMAT == FLOAT32:
        return bits.to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.int16).to(like, bitcast=True)


@triton.jit
def _below(bits, limit, FORMAT: tl.constexpr):
    """|value| < limit, with the limit rounded to the value's format, as torch compares a tensor with a number."""
    limit = tl.full([1], limit, tl.float32)
    word = _convert(limit.to(tl.int32, bitcast=True), FLOAT32, FORMAT)
    MAGNITUDE: tl.constexpr = 0x7FFFFFFF if FORMAT == FLOAT32 else 0x7FFF
    # Magnitudes are ordered like their words, NaN above infinity. Nothing is below a limit that is 0, negative or NaN.
    return ((bits & MAGNITUDE) < (word & MAGNITUDE)) & (limit > 0)


@triton.jit
def _write(
    out, grad, offset, inside, word, limit,
    VALUE: tl.constexpr, STORAGE_FORMAT: tl.constexpr, LIMITED: tl.constexpr, PULL: tl.constexpr,
):  # fmt: skip
    """Decode words, apply the threshold, and write the value or, where `PULL`, the gradient that passes."""
    bits = _convert(word, STORAGE_FORMAT, VALUE)
    if PULL:
        result = tl.load(grad + offset, mask=inside)
    else:
        result = _from_bits(bits, out.dtype.element_ty, VALUE)
    if LIMITED:
        result = tl.where(_below(bits, limit, VALUE), result, tl.zeros_like(result))
    tl.store(out + offset, result, mask=inside)


@triton.jit
def _locate(item, chunks, begin, stride, SHARD: tl.constexpr):
    """Of a chunk, given its number among the chunks of all rows: its row, the column at which it starts, negative where
    that is before the row, and its number in the unsharded operand, whose elements from begin + stride row on are here."""
    row, chunk = item // chunks, item % chunks
    column = chunk.to(tl.int64) * CHUNK
    if SHARD == WHOLE:
        return row, column, chunk
    else:
        first = row.to(tl.int64) * stride + begin
        if SHARD == SHIFTED:
            column -= first % CHUNK
        return row, column, first // CHUNK + chunk


@triton.jit
def _start(item, width, chunks, begin, stride, SHARD: tl.constexpr):
    """Where what a row has of a chunk starts in memory."""
    row, column, _ = _locate(item, chunks, begin, stride, SHARD)
    if SHARD == SHIFTED:
        # A row has `chunks` chunks whether it needs the last or not.
        column = tl.minimum(tl.maximum(column, 0), width)
    return row.to(tl.int64) * width + column


@triton.jit
def _count(word, thresholds, SLOTS: tl.constexpr):
    """How many cells of a chunk are hit: how many of the thresholds its first word exceeds."""
    count = tl.zeros_like(word).to(tl.int32)
    for slot in tl.static_range(SLOTS):
        count += (word > tl.load(thresholds + slot).to(tl.uint32)).to(tl.int32)
    return count


@triton.jit
def _stuck_word(counter, key, element):
    """What the cells of one element of every chunk are stuck at."""
    s0, s1, s2, s3 = philox(counter, (element % CALLS_PER_WORD + STUCK_DRAW).to(tl.uint32), key)
    which = element // CALLS_PER_WORD
    stuck = tl.where(which < 2, tl.where(which == 0, s0, s1), tl.where(which == 2, s2, s3))
    return stuck.to(tl.int32, bitcast=True)


@triton.jit
def _flip(hit, cell, keep, kept, FIRST_BIT: tl.constexpr, THINNED: tl.constexpr):
    """The bit that a slot flips in its element, 0 where it is no hit; `kept` are the thresholds that thin hits."""
    bit = cell // CHUNK
    if THINNED:
        # In int64: the threshold of a bit that never fails is -1.
        hit = hit & (keep.to(tl.int64) <= tl.load(kept + bit))
    return tl.where(hit, (tl.zeros_like(cell) + 1) << (bit + FIRST_BIT), 0).to(tl.int32, bitcast=True)


@triton.jit
def _patch(
    source, grad, out, row, column, width, cell, flip, failed, counter, key, limit,
    STUCK: tl.constexpr, VALUE: tl.constexpr, STORAGE_FORMAT: tl.constexpr, LIMITED: tl.constexpr, PULL: tl.constexpr,
    SHARD: tl.constexpr,
):  # fmt: skip
    """Write one element of every chunk whose slot flips a bit there; `failed` are all its failing bits so far."""
    element = (cell % CHUNK).to(tl.int64)
    inside = (flip != 0) & (element < width - column)
    if SHARD == SHIFTED:
        inside &= element >= -column
    offset = row.to(tl.int64) * width + column + element
    word = _convert(_bits(tl.load(source + offset, mask=inside), VALUE), VALUE, STORAGE_FORMAT)
    if STUCK:
        failed &= word ^ _stuck_word(counter, key, (cell % CHUNK).to(tl.int32))
    _write(out, grad, offset, inside, word ^ failed, limit, VALUE, STORAGE_FORMAT, LIMITED, PULL)


@triton.jit
def _chunk_kernel(
    value, grad, out, table, context, tokens, rows, width, length, chunks, begin, stride, limit,
    FIRST_BIT: tl.constexpr, NUM_BITS: tl.constexpr, DRAWS: tl.constexpr, THINNED: tl.constexpr,
    OF_WEIGHT: tl.constexpr, PERSISTENT: tl.constexpr, TOKENS: tl.constexpr, STUCK: tl.constexpr,
    VALUE: tl.constexpr, STORAGE_FORMAT: tl.constexpr, LIMITED: tl.constexpr, PULL: tl.constexpr,
    SHARD: tl.constexpr, IN_PLACE: tl.constexpr, LANES: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Chunk law, or where DRAWS is 0 nothing but the round trip through the storage format and the threshold.

    `rows` of `width` elements have `chunks` chunks each; `length` rows make a sample. `begin` and `stride` as in
    `sampling.Span`. The chunks of a program are one piece of memory, copied in parts of PART elements. In place,
    nothing is copied and `value` is not touched: compiled code may pass two tensors where `out` was `value`.
    """
    item = tl.program_id(0) * LANES
    if not IN_PLACE:
        start = _start(item, width, chunks, begin, stride, SHARD)
        end = _start(tl.minimum(item + LANES, rows * chunks), width, chunks, begin, stride, SHARD)
        for part in tl.static_range(LANES * CHUNK // PART):
            offset = start + part * PART + tl.arange(0, PART)
            word = _convert(_bits(tl.load(value + offset, mask=offset < end), VALUE), VALUE, STORAGE_FORMAT)
            _write(out, grad, offset, offset < end, word, limit, VALUE, STORAGE_FORMAT, LIMITED, PULL)
    if DRAWS > 0:
        SLOTS: tl.constexpr = 2 * DRAWS - 1
        thresholds, kept = table + 2, table + 2 + SLOTS
        cells_of_chunk = tl.full([LANES], CHUNK * NUM_BITS, tl.uint32)
        item += tl.arange(0, LANES)
        row, column, chunk = _locate(item, chunks, begin, stride, SHARD)
        step, group, first_sample = tl.load(context), tl.load(context + 1), tl.load(context + 2)
        # Position and sample of the rows where tokens give them, otherwise not used.
        named = (row < rows) & TOKENS
        position = tl.load(tokens + row, mask=named, other=0)
        sample = tl.load(tokens + rows + row, mask=named, other=0)
        counter = _counter(
            row, chunk, length, step, group, first_sample, position, sample, OF_WEIGHT, PERSISTENT, TOKENS
        )
        key = (tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32))
        # Pairs of words are slots; the first pair is that of the count.
        w0, w1, w2, w3 = philox(counter, 0, key)
        count = tl.where(row < rows, _count(w0, thresholds, SLOTS), 0)
        cell = tl.umulhi(w2, cells_of_chunk)
        flip = _flip(count > 0, cell, w3, kept, FIRST_BIT, THINNED)
        if IN_PLACE:
            source = out
        else:
            source = value
            # Threads now overwrite elements that others have copied.
            tl.debug_barrier()
        _patch(
            source, grad, out, row, column, width, cell, flip, flip, counter, key, limit,
            STUCK, VALUE, STORAGE_FORMAT, LIMITED, PULL, SHARD,
        )  # fmt: skip
        # At p = 2^-16 a chunk has a second hit once in 2000, a program once in 30.
        if tl.max(count, 0) > 1:
            cells, flips, found = (cell,), (flip,), tl.full([LANES], 1, tl.int32)
            for slot in tl.static_range(1, SLOTS):
                if slot % 2 == 1:
                    w0, w1, w2, w3 = philox(counter, (slot + 1) // 2, key)
                    cell, keep = tl.umulhi(w0, cells_of_chunk), w1
                else:
                    cell, keep = tl.umulhi(w2, cells_of_chunk), w3
                hit = found < count
                for earlier in tl.static_range(slot):
                    hit = hit & (cell != cells[earlier])
                found += hit.to(tl.int32)
                flip = _flip(hit, cell, keep, kept, FIRST_BIT, THINNED)
                failed = flip
                if not IN_PLACE:
                    # The element is read from `value` again, without what earlier slots did to it.
                    for earlier in tl.static_range(slot):
                        failed ^= tl.where(cell % CHUNK == cells[earlier] % CHUNK, flips[earlier], 0)
                _patch(
                    source, grad, out, row, column, width, cell, flip, failed, counter, key, limit,
                    STUCK, VALUE, STORAGE_FORMAT, LIMITED, PULL, SHARD,
                )  # fmt: skip
                cells, flips = cells + (cell,), flips + (flip,)  # type: ignore[assignment]  # noqa: RUF005 - no unpacking


@triton.jit
def _fails(word, upper_half: tl.constexpr, high, low, tie, flag):
    """`flag` where the cell's 48-bit uniform is below its threshold."""
    half = word >> 16 if upper_half else word & 0xFFFF
    # U < T, that is upper < high, or equal and lower < low.
    return tl.where(half < high + (tie < low).to(tl.uint32), flag, 0)


@triton.jit
def _dense_kernel(
    value, grad, out, table, context, tokens, rows, width, length, chunks, begin, stride, limit,
    FIRST_BIT: tl.constexpr, NUM_BITS: tl.constexpr,
    OF_WEIGHT: tl.constexpr, PERSISTENT: tl.constexpr, TOKENS: tl.constexpr, STUCK: tl.constexpr,
    VALUE: tl.constexpr, STORAGE_FORMAT: tl.constexpr, LIMITED: tl.constexpr, PULL: tl.constexpr,
    SHARD: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Dense law; arguments as for the chunk law. Mask e of the eight is that of elements 16 e to 16 e + 15."""
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, first, chunk = _locate(item, chunks, begin, stride, SHARD)
    call = tl.arange(0, CALLS_PER_BIT)
    step, group, first_sample = tl.load(context), tl.load(context + 1), tl.load(context + 2)
    # Position and sample of the rows where tokens give them, otherwise not used.
    named = (row < rows) & TOKENS
    position = tl.load(tokens + row, mask=named, other=0)
    sample = tl.load(tokens + rows + row, mask=named, other=0)
    c0, c1, c2, c3 = _counter(
        row, chunk, length, step, group, first_sample, position, sample, OF_WEIGHT, PERSISTENT, TOKENS
    )
    counter = (c0[:, None] + call.to(tl.uint32)[None, :], c1[:, None], c2[:, None], c3[:, None])
    key = (tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32))
    # Of 32 calls the first 16 serve the even eighths with a word each, the others the odd ones.
    t0, t2, t4, t6 = philox(counter, TIE_DRAW, key)
    t1, t3, t5, t7 = philox(counter, TIE_DRAW + CALLS_PER_BIT, key)
    m0 = tl.zeros([TILE, CALLS_PER_BIT], tl.int32)
    m1, m2, m3, m4, m5, m6, m7 = m0, m0, m0, m0, m0, m0, m0
    for plane in range(NUM_BITS):
        high = tl.load(table + 2 + plane).to(tl.uint32)
        low = tl.load(table + 2 + NUM_BITS + plane).to(tl.uint32)
        bit = FIRST_BIT + plane
        flag = tl.full([1, 1], 1, tl.int32) << bit
        w0, w1, w2, w3 = philox(counter, bit * CALLS_PER_BIT, key)
        m0 |= _fails(w0, False, high, low, t0, flag)
        m1 |= _fails(w0, True, high, low, t1, flag)
        m2 |= _fails(w1, False, high, low, t2, flag)
        m3 |= _fails(w1, True, high, low, t3, flag)
        m4 |= _fails(w2, False, high, low, t4, flag)
        m5 |= _fails(w2, True, high, low, t5, flag)
        m6 |= _fails(w3, False, high, low, t6, flag)
        m7 |= _fails(w3, True, high, low, t7, flag)
    masks = (m0, m1, m2, m3, m4, m5, m6, m7)
    if STUCK:
        s0, s2, s4, s6 = philox(counter, STUCK_DRAW, key)
        s1, s3, s5, s7 = philox(counter, STUCK_DRAW + CALLS_PER_BIT, key)
        stuck = (s0, s1, s2, s3, s4, s5, s6, s7)
    for eighth in tl.static_range(8):
        column = call + eighth * CALLS_PER_BIT
        inside = (row < rows)[:, None] & (first[:, None] + column[None, :] < width)
        if SHARD == SHIFTED:
            inside &= first[:, None] + column[None, :] >= 0
        offset = (row.to(tl.int64) * width + first)[:, None] + column[None, :]
        word = _convert(_bits(tl.load(value + offset, mask=inside), VALUE), VALUE, STORAGE_FORMAT)
        failed = masks[eighth]
        if STUCK:
            failed &= word ^ stuck[eighth].to(tl.int32, bitcast=True)
        _write(out, grad, offset, inside, word ^ failed, limit, VALUE, STORAGE_FORMAT, LIMITED, PULL)


def _place(
    code: BitflipCode, value: Tensor, context: Tensor, tokens: Tensor | None
) -> tuple[Tensor, dict[str, int], dict[str, Any]]:
    """Position and sample of the rows (or the context, where these follow from it), the sizes, and the flags."""
    if code.of_weight or code.persistent:
        tokens = None
    elif tokens is not None:
        tokens = torch.stack(positions_and_samples(value, context, tokens)).flatten(1)
    elif value.dim() != 3:
        raise ValueError(f"an input of shape {tuple(value.shape)} is not (batch, sequence, features)")
    length = 1 if value.dim() < 2 else value.shape[-2]
    span = code.span(value)
    if code.law.name == "none":
        span = sampling.Span(span.width)
    shard = SHIFTED if span.skip else ALIGNED if span.start or span.stride else WHOLE
    sizes = {"rows": value.numel() // span.width, "width": span.width, "length": length, "chunks": span.chunks}
    sizes |= {"begin": span.start, "stride": span.stride}
    flags = {"OF_WEIGHT": code.of_weight, "PERSISTENT": code.persistent, "TOKENS": tokens is not None}
    return context if tokens is None else tokens, sizes, {**flags, "SHARD": shard.value}


def _launch(
    grad: Tensor | None, value: Tensor, out: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, text: str
) -> None:
    """Write to `out` what is stored, or with a gradient how much of it passes. `out` may be `value`."""
    code = BitflipCode.read(text)
    place, sizes, flags = _place(code, value, context, tokens)
    tensors = (value, value if grad is None else grad, out, table, context, place)
    arguments = {
        **sizes,
        "limit": code.limits[list(_MANTISSA).index(value.dtype)],
        "FIRST_BIT": code.law.first_bit,
        "NUM_BITS": code.law.num_bits,
        **flags,
        "STUCK": code.stuck,
        "VALUE": _MANTISSA[value.dtype],
        "STORAGE_FORMAT": STORAGE[code.storage][2],
        "LIMITED": code.zero_above is not None,
        "PULL": grad is not None,
    }
    chunks = sizes["rows"] * sizes["chunks"]
    if code.law.name == "dense":
        grid = (triton.cdiv(chunks, _DENSE_TILE),)
        wrap_triton(_dense_kernel)[grid](*tensors, **arguments, TILE=_DENSE_TILE, num_warps=4)
    else:
        grid = (triton.cdiv(chunks, _LANES),)
        law = {"DRAWS": code.law.draws, "THINNED": code.law.thinned}
        tile = {"IN_PLACE": out is value, "LANES": _LANES, "PART": _PART}
        wrap_triton(_chunk_kernel)[grid](*tensors, **arguments, **law, **tile, num_warps=_LANES // 32)


@triton_op("newcompute::bitflip_store", mutates_args={})
def _store(value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, code: str) -> Tensor:
    value = value.contiguous()
    out = torch.empty_like(value)
    _launch(None, value, out, table, context, tokens, code)
    return out


@triton_op("newcompute::bitflip_pull", mutates_args={})
def _pull(grad: Tensor, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, code: str) -> Tensor:
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    _launch(grad, value.contiguous(), out, table, context, tokens, code)
    return out


@triton_op("newcompute::bitflip_in_place", mutates_args={"value"})
def _in_place(value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, code: str) -> None:
    _launch(None, value, value, table, context, tokens, code)


def store(code: BitflipCode, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
    """What the memory returns for `value`, after the threshold: `BitflipCode.forward` on a GPU."""
    if code.law.name == "none" and code.zero_above is None and STORAGE[code.storage][0] == value.dtype:
        return value.clone()  # an operation must not return its argument
    if value.numel() == 0:
        return torch.empty_like(value)
    return torch.ops.newcompute.bitflip_store(value, table, context, tokens, code.text)


def pull(
    code: BitflipCode, grad: Tensor, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None
) -> Tensor:
    """The gradient of `value` from that of `store(value)`: none where the threshold cleared the element."""
    if code.zero_above is None or grad.numel() == 0:
        return grad
    return torch.ops.newcompute.bitflip_pull(grad, value, table, context, tokens, code.text)


def flip_in_place(code: BitflipCode, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None) -> None:
    """Flip the failing bits of `value` where it lies; a second call restores it.

    Raises:
        ValueError: the effect is more than an exclusive or, or it is not sparse, or `value` is not contiguous.
    """
    if code.law.name == "none" or value.numel() == 0:
        return
    if code.law.name != "chunk" or code.stuck or code.zero_above is not None:
        raise ValueError("only flips of the chunk law without a threshold can be made and undone in place")
    if STORAGE[code.storage][0] != value.dtype or not value.is_contiguous():
        raise ValueError(f"in place a value must be contiguous and in its storage format, {code.storage}")
    torch.ops.newcompute.bitflip_in_place(value, table, context, tokens, code.text)
