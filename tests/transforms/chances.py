"""What the tests of random cells share: a key, and chances in exact arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import cache

from transforms.noise import stream_key

ONES = 0xFFFFFFFF
KEY = stream_key(3, "model.layers.0.mlp.up_proj", "x", "train|")


def with_bits(width, changes):
    return [changes.get(bit, 0.0) for bit in range(width)]


@cache
def exact_tails(cells, p, count):
    """P(X > k) to a hundred digits."""
    with localcontext(prec=100):
        p, left, tails = Decimal(p), Decimal(1), []
        for k in range(count):
            left -= math.comb(cells, k) * p**k * (1 - p) ** (cells - k)
            tails.append(left)
        return tails
