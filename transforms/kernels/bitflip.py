"""Random bit errors on NVIDIA GPUs: Triton kernels that give the golden function's bits (`transforms/bitflip.py`).

*Chunk law.* One pass from memory to memory. A program holds 32 chunks, a tile of 32 by 128 elements, and draws one
lane of random words for each chunk: 2 to 3 Philox calls per 128 elements at p = 2^-16, so that the pass should cost
its memory traffic. A slot changes the tile only where some chunk of the program uses it, which the whole program
decides at once: a slot that nobody uses costs one reduction over 32 lanes. Where value and storage have one format and
no threshold is set there is also an in-place form that touches nothing but the elements that are hit; it is its own
inverse.

*Dense law.* Bound by integer arithmetic: every (bit, element) has 16 bits of its own. A program holds 16 chunks of
which call i serves elements i, i + 16, ..., i + 112, so the tile of calls is 16 by 16 and each half-word of it meets
one eighth of the chunk. Bits are a loop at run time (unrolled, 32 of them are 15,000 instructions); the lower 32 bits
of U, which decide ties, are drawn once for all of them.

With a threshold, `pull` takes a gradient back: the same kernels draw the same event again and write the gradient
instead of the value, so that a backward neither saves nor materialises the stored value.

Words and values are handled as integers, so that NaN takes the same path on every device: to bfloat16 it becomes
0x7FC0, to float16 it keeps its sign and the upper bits of its payload, as the golden function has it on x86.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from transforms import sampling
from transforms.bitflip import STORAGE, BitflipCode, positions_and_samples

CHUNK = tl.constexpr(sampling.CHUNK)
DRAWS_PER_CHUNK = tl.constexpr(sampling.DRAWS)
CHUNKS_PER_COUNTER_WORD = tl.constexpr(2**32 // sampling.DRAWS)
CALLS_PER_BIT = tl.constexpr(sampling._CALLS_PER_BIT)
TIE_DRAW = tl.constexpr(sampling._TIE_DRAW)
STUCK_DRAW = tl.constexpr(sampling._STUCK_DRAW)
CALLS_PER_WORD = tl.constexpr(sampling.CHUNK // 4)
"""Calls of which each serves four elements with a whole word: ties and stuck values."""

# Mantissa bits name a format.
BFLOAT16, FLOAT16, FLOAT32 = tl.constexpr(7), tl.constexpr(10), tl.constexpr(23)
MULTIPLIER0, MULTIPLIER1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
INCREMENT0, INCREMENT1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)

_MANTISSA = {dtype: mantissa for dtype, _, mantissa in STORAGE.values()}
_CHUNK_TILE, _DENSE_TILE, _LANES = 32, 16, 128
"""Chunks of a program: chunk law, dense law, and in place, where each of its 128 threads has one."""


@triton.jit
def _philox(c0, c1, c2, c3, key0, key1):
    """Four words; see `transforms/noise.py`. The words of the counter and the key are uint32."""
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, MULTIPLIER0), c0 * MULTIPLIER0
        high1, low1 = tl.umulhi(c2, MULTIPLIER1), c2 * MULTIPLIER1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += INCREMENT0
        key1 += INCREMENT1
    return c0, c1, c2, c3


@triton.jit
def _counter(
    context, tokens, row, chunk, rows, length, OF_WEIGHT: tl.constexpr, PERSISTENT: tl.constexpr, TOKENS: tl.constexpr
):
    """The four counter words at draw 0 of chunks of rows, as `BitflipCode.rows` and `sampling.words_of` define them."""
    low = chunk.to(tl.uint32) * DRAWS_PER_CHUNK  # modulo 2^32; draws never carry
    high = (chunk // CHUNKS_PER_COUNTER_WORD).to(tl.uint32)
    if PERSISTENT:
        return low, high, tl.zeros_like(low), tl.zeros_like(low)
    step = tl.zeros_like(low) + tl.load(context).to(tl.uint32)
    if OF_WEIGHT:
        return low, high, tl.zeros_like(low) + tl.load(context + 1).to(tl.uint32), step
    if TOKENS:
        inside = row < rows
        position = tl.load(tokens + row, mask=inside, other=0).to(tl.uint32)
        sample = tl.load(tokens + rows + row, mask=inside, other=0).to(tl.uint32)
    else:
        position = (row % length).to(tl.uint32)
        sample = (tl.load(context + 2) + row // length).to(tl.uint32)
    return low, high + position, sample, step


@triton.jit
def _to_single(word, FORMAT: tl.constexpr):
    """The float32 bits of the value that a word of a format holds. Of a 16-bit word the upper half is ignored."""
    if FORMAT == FLOAT32:
        return word
    if FORMAT == BFLOAT16:
        return word << 16
    return word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _from_single(bits, FORMAT: tl.constexpr):
    """The word of a format nearest to a float32 value, to even in ties, given its bits."""
    if FORMAT == FLOAT32:
        return bits
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if FORMAT == BFLOAT16:
        return tl.where(nan, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    rounded = bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return tl.where(nan, ((bits >> 16) & 0x8000) | 0x7E00 | ((bits >> 13) & 0x1FF), rounded)


@triton.jit
def _convert(word, SOURCE: tl.constexpr, TARGET: tl.constexpr):
    if SOURCE == TARGET:
        return word
    return _from_single(_to_single(word, SOURCE), TARGET)


@triton.jit
def _bits(value, FORMAT: tl.constexpr):
    """The bits of values as int32, whatever their width."""
    if FORMAT == FLOAT32:
        return value.to(tl.int32, bitcast=True)
    return value.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _from_bits(bits, like, FORMAT: tl.constexpr):
    if FORMAT == FLOAT32:
        return bits.to(tl.float32, bitcast=True)
    return bits.to(tl.int16).to(like, bitcast=True)


@triton.jit
def _below(bits, limit, FORMAT: tl.constexpr):
    """|value| < limit, with the limit rounded to the value's format, as torch compares a tensor with a number."""
    limit = tl.full([1, 1], limit, tl.float32)
    word = _convert(limit.to(tl.int32, bitcast=True), FLOAT32, FORMAT)
    # Magnitudes are ordered like their words, NaN above infinity. Nothing is below a limit that is 0, negative or NaN.
    if FORMAT == FLOAT32:
        return ((bits & 0x7FFFFFFF) < (word & 0x7FFFFFFF)) & (limit > 0)
    return ((bits & 0x7FFF) < (word & 0x7FFF)) & (limit > 0)


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
def _count(word, thresholds, SLOTS: tl.constexpr):
    """How many cells of a chunk are hit: how many of the thresholds its first word exceeds."""
    count = tl.zeros_like(word).to(tl.int32)
    for slot in tl.static_range(SLOTS):
        count += (word > tl.load(thresholds + slot).to(tl.uint32)).to(tl.int32)
    return count


@triton.jit
def _flips(hit, cell, keep, kept, FIRST_BIT: tl.constexpr, THINNED: tl.constexpr):
    """What a slot changes in its element, 0 where it is no hit; `kept` are the thresholds that thin a bit's hits."""
    bit = cell // CHUNK
    if THINNED:
        # In int64: the threshold of a bit that never fails is -1.
        hit = hit & (keep.to(tl.int64) <= tl.load(kept + bit))
    return tl.where(hit, (tl.zeros_like(cell) + 1) << (bit + FIRST_BIT), 0).to(tl.int32, bitcast=True)


@triton.jit
def _add(mask, cell, flips):
    """Enter a slot of every chunk into the tile of masks, unless no chunk of the program has a hit there."""
    if tl.max((flips != 0).to(tl.int32), 0) > 0:
        element = (cell % CHUNK).to(tl.int32)
        column = tl.arange(0, CHUNK)
        mask ^= tl.where(column[None, :] == element[:, None], flips[:, None], 0)
    return mask


@triton.jit
def _chunk_masks(
    table, c0, c1, c2, c3, live,
    FIRST_BIT: tl.constexpr, NUM_BITS: tl.constexpr, DRAWS: tl.constexpr, THINNED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The chunk law: (TILE, 128) int32 masks of the bits that fail. Chunks that are not `live` have no hits."""
    SLOTS: tl.constexpr = 2 * DRAWS - 1
    CELLS: tl.constexpr = CHUNK * NUM_BITS
    kept = table + 2 + SLOTS
    key0, key1 = tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32)
    mask = tl.zeros([TILE, CHUNK], tl.int32)
    w0, w1, w2, w3 = _philox(c0, c1, c2, c3, key0, key1)
    count = tl.where(live, _count(w0, table + 2, SLOTS), 0)
    cell = tl.umulhi(w2, tl.full([TILE], CELLS, tl.uint32))
    mask = _add(mask, cell, _flips(count > 0, cell, w3, kept, FIRST_BIT, THINNED))
    # At p = 2^-16 a chunk has a second hit once in 2000, a program once in 70.
    if tl.max(count, 0) > 1:
        cells = (cell,)
        found = tl.full([TILE], 1, tl.int32)
        for draw in tl.static_range(1, DRAWS):
            w0, w1, w2, w3 = _philox(c0 + draw, c1, c2, c3, key0, key1)
            words, keeps = (w0, w2), (w1, w3)
            for half in tl.static_range(2):
                cell = tl.umulhi(words[half], tl.full([TILE], CELLS, tl.uint32))
                hit = found < count
                for earlier in tl.static_range(2 * draw - 1 + half):
                    hit = hit & (cell != cells[earlier])
                found += hit.to(tl.int32)
                mask = _add(mask, cell, _flips(hit, cell, keeps[half], kept, FIRST_BIT, THINNED))
                cells = cells + (cell,)  # noqa: RUF005 - Triton has no unpacking
    return mask


@triton.jit
def _chunk_kernel(
    value, grad, out, table, context, tokens, rows, width, length, chunks, limit,
    FIRST_BIT: tl.constexpr, NUM_BITS: tl.constexpr, DRAWS: tl.constexpr, THINNED: tl.constexpr,
    OF_WEIGHT: tl.constexpr, PERSISTENT: tl.constexpr, TOKENS: tl.constexpr, STUCK: tl.constexpr,
    VALUE: tl.constexpr, STORAGE_FORMAT: tl.constexpr, LIMITED: tl.constexpr, PULL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Chunk law, or where DRAWS is 0 nothing but the round trip through the storage format and the threshold.

    `rows` of `width` elements have `chunks` chunks each; `length` rows make a sample.
    """
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, chunk = item // chunks, item % chunks
    column = tl.arange(0, CHUNK)
    first = chunk.to(tl.int64) * CHUNK
    inside = (row < rows)[:, None] & (first[:, None] + column[None, :] < width)
    offset = (row.to(tl.int64) * width + first)[:, None] + column[None, :]
    word = _convert(_bits(tl.load(value + offset, mask=inside), VALUE), VALUE, STORAGE_FORMAT)
    if DRAWS > 0:
        c0, c1, c2, c3 = _counter(context, tokens, row, chunk, rows, length, OF_WEIGHT, PERSISTENT, TOKENS)
        failed = _chunk_masks(table, c0, c1, c2, c3, row < rows, FIRST_BIT, NUM_BITS, DRAWS, THINNED, TILE)
        if STUCK:
            key0, key1 = tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32)
            draw = (STUCK_DRAW + column % CALLS_PER_WORD).to(tl.uint32)
            s0, s1, s2, s3 = _philox(c0[:, None] + draw[None, :], c1[:, None], c2[:, None], c3[:, None], key0, key1)
            which = (column // CALLS_PER_WORD)[None, :]
            stuck = tl.where(which < 2, tl.where(which == 0, s0, s1), tl.where(which == 2, s2, s3))
            failed &= word ^ stuck.to(tl.int32, bitcast=True)
        word ^= failed
    _write(out, grad, offset, inside, word, limit, VALUE, STORAGE_FORMAT, LIMITED, PULL)


@triton.jit
def _fails(word, upper_half: tl.constexpr, high, low, tie, flag):
    """`flag` where the cell's 48-bit uniform is below its threshold."""
    half = word >> 16 if upper_half else word & 0xFFFF
    # U < T, that is upper < high, or equal and lower < low.
    return tl.where(half < high + (tie < low).to(tl.uint32), flag, 0)


@triton.jit
def _dense_kernel(
    value, grad, out, table, context, tokens, rows, width, length, chunks, limit,
    FIRST_BIT: tl.constexpr, NUM_BITS: tl.constexpr,
    OF_WEIGHT: tl.constexpr, PERSISTENT: tl.constexpr, TOKENS: tl.constexpr, STUCK: tl.constexpr,
    VALUE: tl.constexpr, STORAGE_FORMAT: tl.constexpr, LIMITED: tl.constexpr, PULL: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Dense law; arguments as for the chunk law. Mask e of the eight is that of elements 16 e to 16 e + 15."""
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, chunk = item // chunks, item % chunks
    call = tl.arange(0, CALLS_PER_BIT)
    first = chunk.to(tl.int64) * CHUNK
    c0, c1, c2, c3 = _counter(context, tokens, row, chunk, rows, length, OF_WEIGHT, PERSISTENT, TOKENS)
    c0 = c0[:, None] + call.to(tl.uint32)[None, :]
    c1, c2, c3 = c1[:, None], c2[:, None], c3[:, None]
    key0, key1 = tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32)
    # Of 32 calls the first 16 serve the even eighths with a word each, the others the odd ones.
    t0, t2, t4, t6 = _philox(c0 + TIE_DRAW, c1, c2, c3, key0, key1)
    t1, t3, t5, t7 = _philox(c0 + (TIE_DRAW + CALLS_PER_BIT), c1, c2, c3, key0, key1)
    m0 = tl.zeros([TILE, CALLS_PER_BIT], tl.int32)
    m1, m2, m3, m4, m5, m6, m7 = m0, m0, m0, m0, m0, m0, m0
    for plane in range(NUM_BITS):
        high = tl.load(table + 2 + plane).to(tl.uint32)
        low = tl.load(table + 2 + NUM_BITS + plane).to(tl.uint32)
        bit = FIRST_BIT + plane
        flag = tl.full([1, 1], 1, tl.int32) << bit
        w0, w1, w2, w3 = _philox(c0 + bit * CALLS_PER_BIT, c1, c2, c3, key0, key1)
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
        s0, s2, s4, s6 = _philox(c0 + STUCK_DRAW, c1, c2, c3, key0, key1)
        s1, s3, s5, s7 = _philox(c0 + (STUCK_DRAW + CALLS_PER_BIT), c1, c2, c3, key0, key1)
        stuck = (s0, s1, s2, s3, s4, s5, s6, s7)
    for eighth in tl.static_range(8):
        column = call + eighth * CALLS_PER_BIT
        inside = (row < rows)[:, None] & (first[:, None] + column[None, :] < width)
        offset = (row.to(tl.int64) * width + first)[:, None] + column[None, :]
        word = _convert(_bits(tl.load(value + offset, mask=inside), VALUE), VALUE, STORAGE_FORMAT)
        failed = masks[eighth]
        if STUCK:
            failed &= word ^ stuck[eighth].to(tl.int32, bitcast=True)
        _write(out, grad, offset, inside, word ^ failed, limit, VALUE, STORAGE_FORMAT, LIMITED, PULL)


@triton.jit
def _flip_element(value, start, remaining, cell, flips, VALUE: tl.constexpr):
    element = (cell % CHUNK).to(tl.int64)
    hit = (flips != 0) & (element < remaining)
    pointer = value + start + element
    bits = _bits(tl.load(pointer, mask=hit), VALUE) ^ flips
    tl.store(pointer, _from_bits(bits, value.dtype.element_ty, VALUE), mask=hit)


@triton.jit
def _in_place_kernel(
    value, table, context, tokens, rows, width, length, chunks,
    FIRST_BIT: tl.constexpr, NUM_BITS: tl.constexpr, DRAWS: tl.constexpr, THINNED: tl.constexpr,
    OF_WEIGHT: tl.constexpr, PERSISTENT: tl.constexpr, TOKENS: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Chunk law on the elements that are hit alone.

    A thread owns a chunk and takes its slots one after the other, so two hits in one element both count: the second
    reads what the first wrote.
    """
    SLOTS: tl.constexpr = 2 * DRAWS - 1
    CELLS: tl.constexpr = CHUNK * NUM_BITS
    item = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row, chunk = item // chunks, item % chunks
    first = chunk.to(tl.int64) * CHUNK
    start, remaining = row.to(tl.int64) * width + first, width - first
    kept = table + 2 + SLOTS
    key0, key1 = tl.load(table).to(tl.uint32), tl.load(table + 1).to(tl.uint32)
    c0, c1, c2, c3 = _counter(context, tokens, row, chunk, rows, length, OF_WEIGHT, PERSISTENT, TOKENS)
    w0, w1, w2, w3 = _philox(c0, c1, c2, c3, key0, key1)
    count = tl.where(row < rows, _count(w0, table + 2, SLOTS), 0)
    cell = tl.umulhi(w2, tl.full([TILE], CELLS, tl.uint32))
    _flip_element(value, start, remaining, cell, _flips(count > 0, cell, w3, kept, FIRST_BIT, THINNED), VALUE)
    if tl.max(count, 0) > 1:
        cells = (cell,)
        found = tl.full([TILE], 1, tl.int32)
        for draw in tl.static_range(1, DRAWS):
            w0, w1, w2, w3 = _philox(c0 + draw, c1, c2, c3, key0, key1)
            words, keeps = (w0, w2), (w1, w3)
            for half in tl.static_range(2):
                cell = tl.umulhi(words[half], tl.full([TILE], CELLS, tl.uint32))
                hit = found < count
                for earlier in tl.static_range(2 * draw - 1 + half):
                    hit = hit & (cell != cells[earlier])
                found += hit.to(tl.int32)
                flips = _flips(hit, cell, keeps[half], kept, FIRST_BIT, THINNED)
                _flip_element(value, start, remaining, cell, flips, VALUE)
                cells = cells + (cell,)  # noqa: RUF005


def _place(
    code: BitflipCode, value: Tensor, context: Tensor, tokens: Tensor | None
) -> tuple[Tensor, dict[str, int], dict[str, bool]]:
    """Position and sample of the rows (or the context, where these follow from it), the sizes, and the flags."""
    width = value.numel() if code.of_weight else value.shape[-1]
    if code.of_weight or code.persistent:
        tokens = None
    elif tokens is not None:
        tokens = torch.stack(positions_and_samples(value, context, tokens)).flatten(1)
    elif value.dim() != 3:
        raise ValueError(f"an input of shape {tuple(value.shape)} is not (batch, sequence, features)")
    length = 1 if value.dim() < 2 else value.shape[-2]
    sizes = {"rows": value.numel() // width, "width": width, "length": length, "chunks": -(-width // sampling.CHUNK)}
    flags = {"OF_WEIGHT": code.of_weight, "PERSISTENT": code.persistent, "TOKENS": tokens is not None}
    return context if tokens is None else tokens, sizes, flags


def _transform(
    grad: Tensor | None, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, text: str
) -> Tensor:
    """What is stored, or with a gradient how much of it passes."""
    code = BitflipCode.read(text)
    value = value.contiguous()
    source = value if grad is None else grad.contiguous()
    out = torch.empty_like(source)
    if value.numel() == 0:
        return out
    tokens, sizes, flags = _place(code, value, context, tokens)
    chunks = sizes["rows"] * sizes["chunks"]
    law = {"FIRST_BIT": code.law.first_bit, "NUM_BITS": code.law.num_bits}
    formats = {"VALUE": _MANTISSA[value.dtype], "STORAGE_FORMAT": STORAGE[code.storage][2]}
    threshold = {"LIMITED": code.zero_above is not None, "PULL": grad is not None}
    common = {
        **sizes,
        "limit": float(code.zero_above or 0.0),
        **law,
        **flags,
        "STUCK": code.stuck,
        **formats,
        **threshold,
    }
    tensors = (value, source, out, table, context, tokens)
    if code.law.name == "dense":
        grid = (triton.cdiv(chunks, _DENSE_TILE),)
        wrap_triton(_dense_kernel)[grid](*tensors, **common, TILE=_DENSE_TILE, num_warps=4)
    else:
        grid = (triton.cdiv(chunks, _CHUNK_TILE),)
        rest = {"DRAWS": code.law.draws, "THINNED": code.law.thinned, "TILE": _CHUNK_TILE}
        wrap_triton(_chunk_kernel)[grid](*tensors, **common, **rest, num_warps=4)
    return out


@triton_op("newcompute::bitflip_store", mutates_args={})
def _store(value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, code: str) -> Tensor:
    return _transform(None, value, table, context, tokens, code)


@triton_op("newcompute::bitflip_pull", mutates_args={})
def _pull(grad: Tensor, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, code: str) -> Tensor:
    return _transform(grad, value, table, context, tokens, code)


@triton_op("newcompute::bitflip_in_place", mutates_args={"value"})
def _in_place(value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, code: str) -> None:
    of = BitflipCode.read(code)
    tokens, sizes, flags = _place(of, value, context, tokens)
    grid = (triton.cdiv(sizes["rows"] * sizes["chunks"], _LANES),)
    wrap_triton(_in_place_kernel)[grid](
        value,
        table,
        context,
        tokens,
        **sizes,
        FIRST_BIT=of.law.first_bit,
        NUM_BITS=of.law.num_bits,
        DRAWS=of.law.draws,
        THINNED=of.law.thinned,
        **flags,
        VALUE=_MANTISSA[value.dtype],
        TILE=_LANES,
        num_warps=4,
    )


def store(code: BitflipCode, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
    """What the memory returns for `value`, after the threshold: `BitflipCode.forward` on a GPU."""
    if code.law.name == "none" and code.zero_above is None and STORAGE[code.storage][0] == value.dtype:
        return value
    return torch.ops.newcompute.bitflip_store(value, table, context, tokens, code.text)


def pull(
    code: BitflipCode, grad: Tensor, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None
) -> Tensor:
    """The gradient of `value` from that of `store(value)`: none where the threshold cleared the element."""
    if code.zero_above is None:
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
