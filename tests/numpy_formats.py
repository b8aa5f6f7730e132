"""Formats of few bits a second time, in numpy and float64: tables of all their numbers, and a search for the nearest.

Nothing here shares a formula with `transforms/`: magnitudes are listed code by code, and rounding looks them up.
"""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""OCP Microscaling Formats (MX) Specification v1.0, section 5.3.3."""


def magnitudes(exponent_bits: int, mantissa_bits: int, special: str = "") -> np.ndarray:
    """The finite numbers with a sign bit of 0, ascending, which is the order of their codes."""
    bias, found = 2 ** (exponent_bits - 1) - 1, []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            last = exponent == 2**exponent_bits - 1
            if last and (special == "ieee" or (special == "nan" and mantissa == 2**mantissa_bits - 1)):
                continue
            if exponent == 0:
                found.append(mantissa / 2**mantissa_bits * 2.0 ** (1 - bias))
            else:
                found.append((1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias))
    return np.array(found)


E4M3, E5M2 = magnitudes(4, 3, "nan"), magnitudes(5, 2, "ieee")
E2M3, E3M2, E3M4 = magnitudes(2, 3), magnitudes(3, 2), magnitudes(3, 4)


def integers(largest: int) -> np.ndarray:
    return np.arange(largest + 1.0)


def nearest(value: np.ndarray, table: np.ndarray, one_digit: bool = False) -> np.ndarray:
    """The nearest of a table's numbers and their negatives; in the middle between two the one with an even code.

    Args:
        one_digit: of powers of two only: but for 0 no digit is even, and the larger is taken (IEEE 754-2019, section 4.3.1).
    """
    size = np.abs(value).astype(np.float64)
    above = np.searchsorted(table, size).clip(1, len(table) - 1)
    below = above - 1
    to_below, to_above = size - table[below], table[above] - size
    even = above > 1 if one_digit else above % 2 == 0
    up = (to_above < to_below) | ((to_above == to_below) & even)
    return np.copysign(np.where(up, table[above], table[below]), value)


def by_rows(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    """A scale for each row that fits its largest value."""
    scale = np.abs(value).max(-1, keepdims=True) / table[-1]
    return nearest(value / scale, table) * scale


def by_groups(value: np.ndarray, table: np.ndarray, size: int) -> np.ndarray:
    return by_rows(value.reshape(-1, size), table).reshape(value.shape)


def microscaled(value: np.ndarray, table: np.ndarray) -> np.ndarray:
    """OCP Microscaling Formats (MX) Specification v1.0, section 6.3, blocks of 32; scales are E8M0 (section 5.4.1)."""
    blocks = value.reshape(-1, 32)
    scale = microscale(np.abs(blocks).max(-1, keepdims=True), table)
    return (nearest(blocks / scale, table) * scale).reshape(value.shape)


def microscale(largest: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The power of two for blocks with these largest magnitudes. frexp has fractions from 1/2: both exponents are one up."""
    exponent = np.frexp(largest.astype(np.float64))[1] - np.frexp(table[-1])[1]
    return 2.0 ** np.where(largest > 0, exponent, -127).clip(-127, 127)


def nvfp4(value: np.ndarray, of_rows: bool) -> np.ndarray:
    """Blocks of 16 with E4M3 scales, relative to one of the tensor or of each row."""
    blocks = value.reshape(len(value), -1, 16)
    largest = np.abs(blocks).max(-1, keepdims=True)
    outer = largest.max(1, keepdims=True) if of_rows else largest.max()
    outer = outer / (6 * 448)
    scale = nearest(largest / 6 / outer, E4M3) * outer
    return (nearest(blocks / scale, E2M1) * scale).reshape(value.shape)


def ternary(value: np.ndarray) -> np.ndarray:
    scale = np.abs(value).mean()
    return np.rint(value / scale).clip(-1, 1) * scale


def over(value: np.ndarray, range_: float, largest: int, floor: float = 0.0) -> np.ndarray:
    """-largest to largest over a range; magnitudes below `floor` of the range, but 0, become that."""
    step = range_ / largest
    found = nearest(value / step, integers(largest)) * step
    low = (found != 0) & (np.abs(found) < floor * range_)
    return np.where(low, np.copysign(floor * range_, found), found)


def decibel(signal: float, noise: float) -> float:
    return float(10 * np.log10(signal / noise))


def sqnr(exact: np.ndarray, found: np.ndarray) -> float:
    """Signal to quantisation noise in dB."""
    return decibel(np.square(exact, dtype=np.float64).mean(), np.square(found - exact, dtype=np.float64).mean())
