"""Philox 4x32 and its counters as functions of Triton kernels, word for word those of `transforms/noise.py` and
`transforms/sampling.py`; and the uniform and normal numbers of `transforms/operands.py`.

Kernels import these names as they are: where torch.compile copies a kernel's source it copies what it calls under the
name of its definition.
"""

from __future__ import annotations

import triton
import triton.language as tl

from transforms import sampling

CHUNK = tl.constexpr(sampling.CHUNK)
DRAWS_PER_CHUNK = tl.constexpr(sampling.DRAWS)
CHUNKS_PER_COUNTER_WORD = tl.constexpr(2**32 // sampling.DRAWS)
MULTIPLIER0, MULTIPLIER1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
INCREMENT0, INCREMENT1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
RADIAN = tl.constexpr(2 * 3.141592653589793 * 2.0**-24)
"""Of a whole turn in 2^24 parts."""


@triton.jit
def philox(counter, draw, key):
    """The four words of a draw, given the counter of draw 0; see `transforms/noise.py`. All words are uint32."""
    c0, c1, c2, c3 = counter[0] + draw, counter[1], counter[2], counter[3]
    key0, key1 = key[0], key[1]
    for _ in tl.static_range(7):
        high0, low0 = tl.umulhi(c0, MULTIPLIER0), c0 * MULTIPLIER0
        high1, low1 = tl.umulhi(c2, MULTIPLIER1), c2 * MULTIPLIER1
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += INCREMENT0
        key1 += INCREMENT1
    return c0, c1, c2, c3


@triton.jit
def chunk_words(chunk):
    """What a chunk's number is in the first two counter words, at draw 0."""
    low = chunk.to(tl.uint32) * DRAWS_PER_CHUNK  # modulo 2^32; draws never carry
    return low, (chunk // CHUNKS_PER_COUNTER_WORD).to(tl.uint32)


@triton.jit
def uniform(word, upper_half: tl.constexpr):
    """A number of [0, 1) from one half of a word."""
    half = word >> 16 if upper_half else word & 0xFFFF
    return half.to(tl.int32).to(tl.float32) * 0.0000152587890625


@triton.jit
def normals(counter, call, key):
    """Four of each call, by Box and Muller: call i of a chunk's 32 is for its elements i, i + 32, i + 64 and i + 96."""
    w0, w1, w2, w3 = philox(counter, call, key)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return n0, n1, n2, n3


@triton.jit
def _box_muller(of_radius, of_angle):
    position = ((of_radius >> 8).to(tl.int32).to(tl.float32) + 0.5) * 0.000000059604644775390625
    radius = tl.sqrt_rn(-2.0 * tl.log(position))
    cosine, sine = _cosine_and_sine((of_angle >> 8).to(tl.int32).to(tl.float32) * RADIAN)
    return radius * cosine, radius * sine


@triton.jit
def _cosine_and_sine(angle):
    """Of angles from 0 to 2 pi. The device library's functions reduce any angle, for which they keep a table in local
    memory and a branch each; both together here take 20 operations.

    The nearest quarter of a turn is subtracted in three parts, the first two so short that their products are exact;
    for what remains, at most pi/4, minimax polynomials are within 2^-28 of sin(r) / r and of cos(r).
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    rest = angle - quarter * 1.5707931518554688
    rest = (rest - quarter * 0.0000031749368645250797) - quarter * 0.0000000000025632829192545614
    square = rest * rest
    odd = (
        (-0.000195169763173908 * square + 0.008332176133990288) * square - 0.16666655242443085
    ) * square * rest + rest
    even = (0.000024438089894829318 * square - 0.0013887364184483886) * square + 0.04166664555668831
    even = even * square * square + (1.0 - 0.5 * square)
    which = quarter.to(tl.int32)
    swapped = (which & 1) == 1
    cosine, sine = tl.where(swapped, odd, even), tl.where(swapped, even, odd)
    cosine = tl.where(((which + 1) & 2) == 2, -cosine, cosine)
    return cosine, tl.where((which & 2) == 2, -sine, sine)
