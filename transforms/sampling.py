"""Which cells (bits of a storage word) fail: two sampling laws, both exact, both pure functions of where a cell stands.

Elements are numbered in chunks of 128: along the features of an activation, or along the flat (out, in) index of a
weight. Where `num_bits` neighbouring bits of a word can fail, a chunk has 128 num_bits cells. A shard's elements keep
the numbers that they have in the unsharded operand: a chunk that its edge cuts is drawn whole, and the rest dropped.

*Chunk law*, for transient faults where fewer than 2% of the elements are hit: one word gives the number of hits in a
chunk by the inverse CDF of the binomial distribution at the largest probability; further words give cells, of which the
first that are distinct count; one more word per hit keeps a hit with probability p(bit) / max p. Random words go with
chunks, not elements: 12 of them per 128 bfloat16 elements at p = 2^-16.

*Dense law*, otherwise: cell (element, bit) has a 48-bit uniform U and fails where U < p 2^48. Its upper 16 bits are its
own (one Philox call serves 8 elements), the lower 32 are shared by the bits of an element and matter only in ties, so
that bits of one element are independent to 2^-32. The same U at another p: faults(p) grow with p. So persistent faults
always take this law.

Probabilities are resolved to 2^-32 (chunk law: the count; what K slots cannot hold has probability below 2^-32).
The functions here are the golden version in plain torch, written in shapes that Inductor vectorises on CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from transforms.noise import philox_4x32

CHUNK = 128
CHUNK_LAW_BELOW = 0.02
"""Element rate below which the chunk law samples transient faults."""
DRAWS = 1024
"""Philox calls reserved for each chunk: counter word 0 is chunk * DRAWS + draw."""
_CALLS_PER_BIT = CHUNK // 8
_TIE_DRAW, _STUCK_DRAW = 32 * _CALLS_PER_BIT, 32 * _CALLS_PER_BIT + CHUNK // 4
_ALL = 0xFFFFFFFF


@dataclass(frozen=True)
class Law:
    """How cells are sampled: all that two layers must share to share compiled code. Probabilities are in a table."""

    name: str
    """ "chunk", "dense", or "none" where nothing can fail."""
    first_bit: int = 0
    """Lowest bit that can fail; 0 is the least significant."""
    num_bits: int = 0
    """Bits from there on that can fail."""
    draws: int = 0
    """Chunk law: Philox calls per chunk; they hold 2 draws - 1 hits."""
    thinned: bool = False
    """Chunk law: the bits' probabilities differ."""

    @property
    def slots(self) -> int:
        return 2 * self.draws - 1

    @property
    def cells(self) -> int:
        return CHUNK * self.num_bits


def element_rate(probabilities: Sequence[float]) -> float:
    """Probability that a bit of an element fails, were all that can to fail with the largest probability."""
    top = max(probabilities, default=0.0)
    active = sum(p > 0 for p in probabilities)
    return -math.expm1(active * math.log1p(-top)) if top < 1 else 1.0


def choose_law(probabilities: Sequence[float], persistent: bool = False) -> Law:
    """The law for cells that fail with these probabilities, one per bit, least significant first."""
    active = [bit for bit, p in enumerate(probabilities) if p > 0]
    if not active:
        return Law("none")
    first, num = active[0], active[-1] - active[0] + 1
    chosen = list(probabilities[first : first + num])
    if persistent or element_rate([max(chosen)] * num) >= CHUNK_LAW_BELOW:
        return Law("dense", first, num)
    return Law("chunk", first, num, _slots(CHUNK * num, max(chosen)) // 2 + 1, min(chosen) < max(chosen))


def _binomial_tails(cells: int, p: float, count: int) -> list[float]:
    """P(X > k) for k = 0 .. count - 1, each summed over its own terms, so that nothing cancels."""
    log_p, log_q, log_all = math.log(p), math.log1p(-p), math.lgamma(cells + 1)
    terms = [
        math.exp(log_all - math.lgamma(k + 1) - math.lgamma(cells - k + 1) + k * log_p + (cells - k) * log_q)
        for k in range(min(cells, count + 64) + 1)
    ]
    return [math.fsum(terms[k + 1 :]) for k in range(count)]


def _slots(cells: int, p: float) -> int:
    """Fewest slots whose distinct cells are fewer than a chunk's hits less than once in 2^32."""
    tails = _binomial_tails(cells, p, 64)
    distinct = [1.0]  # probability of 0, 1, ... distinct cells among the slots so far
    for slots in range(1, 64):
        stay = [q * m / cells for m, q in enumerate(distinct)]
        grow = [q * (1 - m / cells) for m, q in enumerate(distinct)]
        distinct = [a + b for a, b in zip([*stay, 0.0], [0.0, *grow])]
        if math.fsum(q * tail for q, tail in zip(distinct, tails)) < 2.0**-32:
            return slots
    raise AssertionError(f"the chunk law is not for p = {p}")


def make_table(law: Law, probabilities: Sequence[float]) -> list[int]:
    """Thresholds of a law in the order in which the masks read them, computed in float64.

    Chunk law: for each slot k the highest word with which at most k cells are hit; where thinned, for each bit the
    highest word that keeps a hit. Dense law: for each bit its threshold p 2^48 without the last 32 bits, then those.

    Raises:
        ValueError: another bit can fail than the law says, or too often for it.
    """
    chosen = list(probabilities[law.first_bit : law.first_bit + law.num_bits])
    if sum(p > 0 for p in probabilities) > sum(p > 0 for p in chosen):
        raise ValueError(f"only bits {law.first_bit} to {law.first_bit + law.num_bits - 1} can fail here")
    if law.name == "none":
        return []
    if law.name == "dense":
        thresholds = [round(p * 2**48) for p in chosen]
        return [t >> 32 for t in thresholds] + [t & _ALL for t in thresholds]
    top = max(chosen)
    if element_rate([top] * law.num_bits) >= CHUNK_LAW_BELOW or (top and _slots(law.cells, top) > law.slots):
        raise ValueError(f"p = {top} is more than the {law.slots} slots of this law hold")
    if min(chosen) < top and not law.thinned:
        raise ValueError("the probabilities of this law's bits must be equal")
    tails = _binomial_tails(law.cells, top, law.slots) if top else [0.0] * law.slots
    keep = [round(p / (top or 1) * 2**32) - 1 for p in chosen] if law.thinned else []
    return [_ALL - min(_ALL, round(tail * 2**32)) for tail in tails] + keep


class Span(NamedTuple):
    """Which elements rows are: row r is those from start + stride r on, as the unsharded operand numbers them."""

    width: int
    """Elements of a row."""
    start: int = 0
    stride: int = 0

    @property
    def skip(self) -> int:
        """How many elements of its first chunk lie before a row, at most.

        Rows begin at every multiple of gcd(stride, 128) in a chunk, plus what `start` is beyond one of them; all at the
        same place where the stride is 0 or whole chunks.
        """
        unit = math.gcd(self.stride, CHUNK)
        return CHUNK - unit + self.start % unit

    @property
    def chunks(self) -> int:
        """Chunks that a row needs, at most."""
        return -(-(self.skip + self.width) // CHUNK)


Words = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Draws (D, 1, 1) -> the four Philox words of every draw, row and chunk, each (D, rows, chunks)."""


def words_of(
    key: Tensor, chunks: int, position: Tensor, sample: Tensor, step: Tensor, first: int | Tensor = 0
) -> Words:
    """Words of the chunks of rows of elements.

    An activation's row has one position and one sample; a weight is a single row, its flat (out, in) index, with
    position 0 and its group as the sample (or if only some of its columns are here, a range of that index for each
    row). Counter: chunk and draw as one number, whose part above 32 bits (which only a weight can have) goes to the
    second word, beside the position; then the sample and the step.

    Args:
        key: (2,) int64.
        position, sample: (rows,) int64, or (1,) for all rows.
        step: zero-dimensional int64.
        first: number of the first chunk, one for all rows or (rows,) int64.
    """
    if isinstance(first, Tensor):
        chunk = first[:, None] + torch.arange(chunks, device=key.device)
    else:
        chunk = torch.arange(first, first + chunks, device=key.device)

    def words(draw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number = chunk * DRAWS + draw
        return philox_4x32((number & _ALL, (number >> 32) + position[:, None], sample[:, None], step), (key[0], key[1]))

    return words


def failed_cells(law: Law, thresholds: Tensor, words: Words) -> Tensor:
    """The cells that fail.

    Args:
        thresholds: `make_table`, int64.

    Returns:
        (rows, chunks, 128) int32: for every element the mask of its bits that fail.
    """
    return (_chunk_law if law.name == "chunk" else _dense_law)(law, thresholds, words)


def _chunk_law(law: Law, thresholds: Tensor, words: Words) -> Tensor:
    device = thresholds.device
    w0, w1, w2, w3 = words(torch.arange(law.draws, device=device)[:, None, None])
    count = (w0[0] > thresholds[: law.slots, None, None]).sum(0, dtype=torch.int32)
    # Pairs of words are slots; the first pair is that of the count.
    cell = ((torch.stack([w0, w2], 1).flatten(0, 1)[1:] * law.cells) >> 32).to(torch.int32)  # (slots, rows, chunks)
    slot = torch.arange(law.slots, device=device)
    earlier = (slot[:, None] > slot)[..., None, None]
    fresh = ~((cell[:, None] == cell[None]) & earlier).any(1)
    rank = (fresh[None] & earlier).sum(1, dtype=torch.int32)
    hit = fresh & (rank < count)
    bit = cell >> 7
    if law.thinned:
        keep = torch.stack([w1, w3], 1).flatten(0, 1)[1:]
        hit = hit & (keep <= thresholds[law.slots :][bit])
    flips = torch.where(hit, 1 << (bit + law.first_bit), 0)
    # Distinct cells of an element are distinct bits: their sum is their union.
    mask = torch.zeros(*flips.shape[1:], CHUNK, dtype=torch.int32, device=device)
    return mask.scatter_add(-1, (cell & (CHUNK - 1)).movedim(0, -1).to(torch.int64), flips.movedim(0, -1))


def _dense_law(law: Law, thresholds: Tensor, words: Words) -> Tensor:
    device, bits = thresholds.device, law.num_bits
    bit = torch.arange(law.first_bit, law.first_bit + bits, device=device)
    planes = bit[:, None] * _CALLS_PER_BIT + torch.arange(_CALLS_PER_BIT, device=device)
    halves = [half for word in words(planes.view(-1, 1, 1)) for half in (word & 0xFFFF, word >> 16)]
    # Call i of a bit serves elements i, i + 16, ..., i + 112.
    upper = torch.stack([half.unflatten(0, (bits, -1)) for half in halves], 1).flatten(
        1, 2
    )  # (bits, 128, rows, chunks)
    ties = _TIE_DRAW + torch.arange(CHUNK // 4, device=device)[:, None, None]
    lower = torch.stack(words(ties), 0).flatten(0, 1)  # (128, rows, chunks): call i serves elements i, i + 32, ...
    high, low = thresholds.view(2, bits, 1, 1, 1)
    fails = (upper < high) | ((upper == high) & (lower < low))
    return torch.where(fails, (1 << bit).view(-1, 1, 1, 1), 0).sum(0).to(torch.int32).movedim(0, -1)


def stuck_values(words: Words, device: torch.device) -> Tensor:
    """What stuck cells read: 32 fair random bits for every element, (rows, chunks, 128) int32."""
    draw = _STUCK_DRAW + torch.arange(CHUNK // 4, device=device)[:, None, None]
    return torch.stack(words(draw), 0).flatten(0, 1).to(torch.int32).movedim(0, -1)
