"""Philox 4x32: random words as a pure function of a key and a counter.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Nothing is stored and nothing
advances: the word for a weight or an activation is computed from where it stands, so every layout, every recomputation
and every resumed run sees the same one. This is the golden version in plain torch; it runs on any device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# The paper's multipliers less 2^32: with a 32-bit factor these stay within int64, where the plain product would not.
_MULTIPLIERS = (0xD2511F53 - (1 << 32), 0xCD9E8D57 - (1 << 32))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox_4x32(
    counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int],
    key: tuple[Tensor | int, Tensor | int],
    rounds: int = 7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for every counter.

    Args:
        counter: four words, each an int or an int64 tensor of values below 2^32; they broadcast against each other.
        key: two words below 2^32, each an int or a zero-dimensional int64 tensor.
        rounds: 7 is the fewest that the authors call Crush-resistant, 10 their default.

    Returns:
        Four int64 tensors of values below 2^32. int64 carries them because torch has no full set of uint32 operations.
        With m = M - 2^32, the product a M = 2^32 a + a m has the upper word a + floor(a m / 2^32) and the lower word
        a m mod 2^32, and nothing overflows: signed overflow is undefined in C++, and compiled code does use that freedom.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, low0 = c0 + (product0 >> 32), product0 & _MASK32
        high1, low1 = c2 + (product1 >> 32), product1 & _MASK32
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK32, (k1 + _KEY_INCREMENTS[1]) & _MASK32
    return c0, c1, c2, c3


def stream_key(seed: int, name: str, role: str, stream: str = "") -> tuple[int, int]:
    """The 64-bit key of one stream of noise, as two words: the 8-byte digest blake2b(seed | name | role | stream).

    `name` is the parameter's or module's Hugging Face name, so that a run and its export draw the same.
    """
    digest = hashlib.blake2b(f"{seed}|{name}|{role}|{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
