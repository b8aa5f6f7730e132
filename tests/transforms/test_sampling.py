"""Which cells fail: rates, shapes and independence by statistics.

Seeds are fixed, so no test is random; bounds are 4 sigma, and chi-squares are held from above and from below.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from chances import KEY, ONES, exact_tails, with_bits

from transforms.bitflip import Bitflip, bit_probabilities
from transforms.context import Noise
from transforms.sampling import (
    CHUNK,
    Law,
    choose_law,
    element_rate,
    failed_cells,
    make_table,
    words_of,
)

CPU = torch.device("cpu")
WIDTH = {"bfloat16": 16, "float16": 16, "float32": 32}


def draw(law, probabilities, rows=64, chunks=64, step=0, key=KEY):
    """The masks of failing bits, (rows, chunks, 128), of `rows` positions of sample 0."""
    place = torch.arange(rows), torch.zeros(rows, dtype=torch.int64), torch.tensor(step)
    words = words_of(torch.tensor(key), chunks, *place)
    return failed_cells(law, torch.tensor(make_table(law, probabilities), dtype=torch.int64), words)


def within_4_sigma(count, trials, p):
    return abs(count - trials * p) <= 4 * math.sqrt(trials * p * (1 - p))


def fits(observed, expected):
    """Chi-square within 4 sigma (Wilson and Hilferty's normal approximation), rare outcomes taken together."""
    bins, rare = [], [0.0, 0.0]
    for seen, due in zip(observed, expected, strict=True):
        if due >= 8:
            bins.append((seen, due))
        else:
            rare = [rare[0] + seen, rare[1] + due]
    if rare[1] >= 1:
        bins.append(tuple(rare))
    freedom = len(bins) - 1
    chi_square = sum((seen - due) ** 2 / due for seen, due in bins)
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return abs(z) < 4


def binomial(cells, p, count):
    return [math.comb(cells, k) * p**k * (1 - p) ** (cells - k) for k in range(count)]


def bits_of(masks, width):
    """(bits, elements) bool."""
    return (masks.flatten()[None] >> torch.arange(width)[:, None]) & 1 != 0


# --- rates ------------------------------------------------------------------------------------------------------------


RATES = [
    *((f, "chunk", [0.019 / WIDTH[f]] * WIDTH[f]) for f in WIDTH),
    *((f, "chunk", bit_probabilities(f, 0.018 / WIDTH[f], 0.005 / WIDTH[f])) for f in WIDTH),
    *((f, "chunk", bit_probabilities(f, 0.0, 5e-4)) for f in WIDTH),
    *((f, "chunk", with_bits(WIDTH[f], {1: 3e-4, 2: 6e-4, 7: 1e-4, WIDTH[f] - 1: 6e-4})) for f in WIDTH),
    ("bfloat16", "chunk", with_bits(16, {14: 0.0199})),
    ("float32", "chunk", with_bits(32, {31: 0.0199})),
    *((f, "dense", [0.03] * WIDTH[f]) for f in WIDTH),
    *((f, "dense", bit_probabilities(f, 0.01, 0.3)) for f in WIDTH),
    *((f, "dense", with_bits(WIDTH[f], {0: 1.0, 3: 0.5, 4: 2e-3, 9: 1.0, WIDTH[f] - 1: 0.7})) for f in WIDTH),
    *((f, "dense", [1.0] * WIDTH[f]) for f in WIDTH),
    ("bfloat16", "dense", with_bits(16, {6: 0.02})),
]


@pytest.mark.parametrize(("storage", "name", "probabilities"), RATES)
def test_every_bit_fails_at_its_rate(storage, name, probabilities):
    law = choose_law(probabilities)
    assert law.name == name
    rows, chunks, slices = (256, 64, 4) if name == "chunk" else (32, 16, 2)
    counts = torch.zeros(WIDTH[storage], dtype=torch.int64)
    for step in range(slices):
        masks = draw(law, probabilities, rows, chunks, step)
        assert masks.shape == (rows, chunks, CHUNK)
        assert masks.dtype == torch.int32
        if storage != "float32":
            assert 0 <= int(masks.min()) <= int(masks.max()) < 2**16
        counts += torch.stack([((masks >> bit) & 1).sum() for bit in range(WIDTH[storage])])
    trials = slices * rows * chunks * CHUNK
    for count, p in zip(counts.tolist(), probabilities, strict=True):
        assert within_4_sigma(count, trials, p), (count, trials * p)
        assert p > 0 or count == 0
        assert p < 1 or count == trials
    if 0 < sum(probabilities) < sum(p > 0 for p in probabilities):
        variance = trials * sum(p * (1 - p) for p in probabilities)
        assert abs(int(counts.sum()) - trials * sum(probabilities)) <= 4 * math.sqrt(variance)


def test_no_probability_is_no_law():
    for probabilities in ([0.0] * 16, [0.0] * 32, []):
        for persistent in (False, True):
            assert choose_law(probabilities, persistent) == Law("none")
        assert make_table(Law("none"), probabilities) == []


def test_2_to_the_minus_16_hits_2441_of_ten_million_elements():
    probabilities = [2.0**-16] * 16
    law = choose_law(probabilities)
    assert (law.name, law.draws) == ("chunk", 3)
    hit, trials = 0, 0
    for step in range(128):
        masks = draw(law, probabilities, 256, 64, step)
        hit += int((masks != 0).sum())
        trials += masks.numel()
    rate = 1 - (1 - 2.0**-16) ** 16
    assert trials == 2**28
    assert rate == pytest.approx(2.441e-4, rel=1e-4)
    assert within_4_sigma(hit, trials, rate)


# --- chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_bits", "p"), [(1, 0.0199), (2, 0.0099), (7, 2e-3), (16, 2.0**-10), (32, 5e-4)])
def test_hits_of_a_chunk_are_binomial_in_uniform_distinct_cells(num_bits, p):
    probabilities = [0.0] * 3 + [p] * num_bits if num_bits < 32 else [p] * 32
    law = choose_law(probabilities)
    cells = CHUNK * num_bits
    assert (law.name, law.thinned, law.cells) == ("chunk", False, cells)
    hits, places, distances = [], [], []
    for step in range(8):
        masks = draw(law, probabilities, 256, 64, step).flatten(0, 1)
        chunk, element = masks.nonzero(as_tuple=True)
        hit, bit = bits_of(masks[chunk, element], 32).T.nonzero(as_tuple=True)
        chunk, cell = chunk[hit], (bit - law.first_bit) * CHUNK + element[hit]
        number = torch.bincount(chunk, minlength=len(masks))
        hits.append(number)
        places.append(cell)
        pairs = cell[number[chunk] == 2].view(-1, 2)
        apart = (pairs[:, 1] - pairs[:, 0]).abs()
        assert (apart > 0).all()
        distances.append(torch.minimum(apart, cells - apart))
    counts = torch.bincount(torch.cat(hits), minlength=40)
    assert fits(counts.tolist(), [counts.sum().item() * q for q in binomial(cells, p, len(counts))])
    where = torch.bincount(torch.cat(places), minlength=cells)
    total = where.sum().item()
    assert fits(where.tolist(), [total / cells] * cells)
    assert fits(where.view(num_bits, CHUNK).sum(0).tolist(), [total / CHUNK] * CHUNK)
    if num_bits > 1:
        assert fits(where.view(num_bits, CHUNK).sum(1).tolist(), [total / num_bits] * num_bits)
    # Two distinct uniform cells: every distance around the chunk is equally likely, the opposite cell half as much.
    apart = torch.bincount(torch.cat(distances), minlength=cells // 2 + 1)[1:]
    share = apart.sum().item() / (cells - 1)
    assert fits(apart.tolist(), [2 * share] * (cells // 2 - 1) + [share])


def test_thinned_hits_are_binomial_per_bit_and_independent():
    probabilities = [2e-4] * 7 + [0.0] * 2 + [1e-3] * 7
    law = choose_law(probabilities)
    assert law.thinned
    assert law.cells == 16 * CHUNK
    masks = torch.cat([draw(law, probabilities, 256, 64, step).flatten(0, 1) for step in range(4)])
    chunk, element = masks.nonzero(as_tuple=True)
    hit, bit = bits_of(masks[chunk, element], 16).T.nonzero(as_tuple=True)
    assert not ((bit == 7) | (bit == 8)).any()
    low, high = (torch.bincount(chunk[hit[side]], minlength=len(masks)) for side in (bit < 7, bit > 8))
    for number, p in ((low, 2e-4), (high, 1e-3)):
        seen = torch.bincount(number, minlength=30)
        assert fits(seen.tolist(), [len(masks) * q for q in binomial(7 * CHUNK, p, len(seen))])
    assert abs(correlation(low, high)) < 4 / math.sqrt(len(masks))


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_dense_hits_of_a_chunk_and_of_each_element_are_binomial(storage):
    width, p = WIDTH[storage], 0.004
    probabilities = [p] * width
    law = choose_law(probabilities)
    assert law.name == "dense"
    planes = torch.cat([bits_of(draw(law, probabilities, 32, 16, step), width) for step in range(6)], 1)
    elements = planes.shape[1]
    per_element = torch.bincount(planes.sum(0), minlength=8)
    assert fits(per_element.tolist(), [elements * q for q in binomial(width, p, len(per_element))])
    per_chunk = torch.bincount(planes.view(width, -1, CHUNK).sum((0, 2)), minlength=60)
    chunks = elements // CHUNK
    assert fits(per_chunk.tolist(), [chunks * q for q in binomial(width * CHUNK, p, len(per_chunk))])
    where = planes.view(width, -1, CHUNK).sum(1).flatten().float()
    assert fits(where.tolist(), [where.sum().item() / where.numel()] * where.numel())


# --- independence -----------------------------------------------------------------------------------------------------


def correlation(one, other):
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    return float((one @ other) / (one.norm() * other.norm()))


def flips(probabilities, shape, name="layer.0", role="x", stream="", seed=0, phase="train", persistent=False, **at):
    """Words that an effect flips in zeros of bfloat16, as a model with this one layer would have it."""
    noise = Noise(seed)
    effect = Bitflip(noise, name, role, "bfloat16", probabilities, persistent=persistent, stream=stream)
    noise.enter(phase)
    noise.begin(**{"step": 5, "first_sample": 0, "device": CPU, **at})
    return effect(torch.zeros(shape, dtype=torch.bfloat16)).view(torch.int16)


@pytest.mark.parametrize(("law", "p", "length"), [("dense", 0.5, 8), ("chunk", 1e-3, 512)])
def test_no_correlation_between_streams(law, p, length):
    """Everything that noise depends on, pair by pair, on inputs of 4 samples and weights with as many elements."""
    probabilities, shape, width = [p] * 16, (4, length, 512), 16
    assert choose_law(probabilities).name == law
    drawn = {
        "plain": {},
        "layer": {"name": "layer.1"},
        "seed": {"seed": 1},
        "step": {"step": 6},
        "far step": {"step": 5 + 2**16},
        "rank": {"first_sample": 4},
        "far rank": {"first_sample": 4096},
        "output": {"role": "out"},
        "validation": {"phase": "validation"},
        "chip 0": {"phase": "chip 0"},
        "chip 1": {"phase": "chip 1"},
        "second effect": {"stream": "1"},
        "weight": {"role": "w"},
        "weight, next group": {"role": "w", "group": 1},
        "weight, next step": {"role": "w", "step": 6},
        "weight of chip 1": {"role": "w", "phase": "chip 1"},
    }
    words = {}
    for what, changes in drawn.items():
        of_weight = changes.get("role") == "w"
        words[what] = flips(probabilities, (shape[0] * length, 512) if of_weight else shape, **changes).view(shape)
    plain = words["plain"]
    words["next position"] = plain.roll(1, 1)
    words["next sample"] = plain.roll(1, 0)
    words["next chunk"] = plain.roll(CHUNK, 2)
    words["next element"] = plain.roll(1, 2)
    words["element 16 on"] = plain.roll(16, 2)
    words["element 32 on"] = plain.roll(32, 2)
    if law == "dense":
        words["next bit"] = (plain << 1) | ((plain >> 15) & 1)
        sides = {what: bits_of(word, width).flatten().float() * 2 - 1 for what, word in words.items()}
    else:
        sides = {what: (word != 0).flatten().float() for what, word in words.items()}
    matrix = torch.corrcoef(torch.stack(list(sides.values())))
    bound = 4 / math.sqrt(next(iter(sides.values())).numel())
    for (i, one), (j, other) in itertools.combinations(enumerate(sides), 2):
        assert abs(float(matrix[i, j])) < bound, (one, other)


def test_bits_of_an_element_are_uncorrelated():
    planes = bits_of(flips([0.3] * 16, (4, 16, 512)), 16).float()
    matrix = torch.corrcoef(planes)
    assert (matrix - torch.eye(16)).abs().max() < 4.2 / math.sqrt(planes.shape[1])


@pytest.mark.parametrize("p", [1e-3, 0.5])
def test_noise_belongs_to_the_sample_not_to_the_batch(p):
    probabilities = [p] * 16
    whole = flips(probabilities, (4, 9, 300))
    for first in range(4):
        assert torch.equal(flips(probabilities, (1, 9, 300), first_sample=first), whole[first : first + 1])
    assert torch.equal(flips(probabilities, (4, 5, 300)), whole[:, :5])
    assert torch.equal(flips(probabilities, (4, 9, 256)), whole[..., :256])
    tokens = torch.stack([torch.arange(9).flip(0).expand(2, 9), torch.tensor([[3], [1]]).expand(2, 9)])
    assert torch.equal(flips(probabilities, (2, 9, 300), tokens=tokens), whole[[3, 1]].flip(1))
    assert torch.equal(flips(probabilities, (18, 300), tokens=tokens), whole[[3, 1]].flip(1).flatten(0, 1))
    assert torch.equal(flips(probabilities, (2, 1, 300), tokens=tokens[..., -1:]), whole[[3, 1], :1])
    assert torch.equal(flips(probabilities, (4, 9, 300), group=3), whole)


@pytest.mark.parametrize("p", [1e-3, 0.5])
def test_one_weight_draw_for_all_micro_batches(p):
    probabilities, shape = [p] * 16, (48, 77)
    once = flips(probabilities, shape, role="w")
    tokens = torch.ones(2, 3, 4, dtype=torch.int64)
    assert torch.equal(flips(probabilities, shape, role="w", first_sample=12, tokens=tokens), once)
    assert not torch.equal(flips(probabilities, shape, role="w", group=1), once)
    # Its cells are numbered along the flat index, whatever the rows.
    assert torch.equal(flips(probabilities, (77, 48), role="w").flatten(), once.flatten())


# --- persistent faults ------------------------------------------------------------------------------------------------

LADDER = [1e-9, 1e-5, 1e-4, 1e-3, 0.01, 0.019, 0.1, 0.25, 0.5, 0.50001, 0.9, 1.0]


@pytest.mark.parametrize("storage", WIDTH)
def test_persistent_faults_are_nested_in_p(storage):
    def faults(probabilities):
        law = choose_law(probabilities, persistent=True)
        assert law.name == "dense"
        return draw(law, probabilities, 1, 64)

    width = WIDTH[storage]
    steps = [(p, p) for p in LADDER]
    before = torch.zeros(1, 64, CHUNK, dtype=torch.int32)
    for sign_exponent, mantissa in steps:
        now = faults(bit_probabilities(storage, sign_exponent, mantissa))
        assert ((before & ~now) == 0).all()
        before = now
    assert bits_of(before, width).all()
    # Each bit by itself, whatever the others' probabilities are.
    steps = [(0.0, 1e-3), (1e-4, 1e-3), (1e-4, 0.3), (0.2, 0.3), (0.2, 1.0), (1.0, 1.0)]
    before = torch.zeros(1, 64, CHUNK, dtype=torch.int32)
    for sign_exponent, mantissa in steps:
        now = faults(bit_probabilities(storage, sign_exponent, mantissa))
        assert ((before & ~now) == 0).all()
        before = now
    alone = faults([0.3 if bit == 5 else 0.0 for bit in range(width)])
    assert torch.equal(alone, faults([0.3] * width) & (1 << 5))


def test_persistent_faults_stay_for_every_step_and_micro_batch():
    probabilities = [0.01] * 16
    for role, shape in (("w", (16, 300)), ("x", (3, 5, 300))):
        once = flips(probabilities, shape, role=role, persistent=True)
        tokens = torch.full((2, 3, 5), 7)
        for at in ({"step": 9}, {"first_sample": 30}, {"group": 2}, {"tokens": tokens}, {"phase": "validation"}):
            assert torch.equal(flips(probabilities, shape, role=role, persistent=True, **at), once)
        assert torch.equal(flips(probabilities, shape, role=role, persistent=True, phase="chip 0"), once)
        for other in ({"phase": "chip 1"}, {"name": "layer.1"}, {"seed": 1}, {"stream": "1"}):
            assert not torch.equal(flips(probabilities, shape, role=role, persistent=True, **other), once)
    # An input's buffer holds one token at a time.
    assert (once == once[0, 0]).all()


@pytest.mark.parametrize("storage", WIDTH)
def test_stuck_cells_read_the_same_value_whatever_is_stored(storage):
    width = WIDTH[storage]
    dtype = getattr(torch, storage)
    integer = torch.int32 if width == 32 else torch.int16

    def read(words, p, stuck=True):
        noise = Noise(0)
        effect = Bitflip(noise, "layer", "w", storage, [p] * width, persistent=True, stuck=stuck)
        noise.fill()
        noise.begin(0, 0, CPU)
        return effect(words.view(dtype)).view(integer)

    zeros, ones = torch.zeros(256, 128, dtype=integer), torch.full((256, 128), -1, dtype=integer)
    value = read(zeros, 1.0)
    assert torch.equal(read(ones, 1.0), value)
    for p in (0.01, 0.4):
        cells = read(zeros, p, stuck=False)
        assert torch.equal(read(zeros, p), value & cells)
        assert torch.equal(read(ones, p), (value & cells) | ~cells)
        stored = (torch.arange(256 * 128).view(256, 128) * 0x9E3779B1).to(integer)
        found = read(stored, p)
        assert torch.equal(found, (stored & ~cells) | (value & cells))
        assert torch.equal(read(found, p), found)
        changed, stuck = (int(bits_of(word, width).sum()) for word in (found ^ stored, cells))
        assert within_4_sigma(changed, stuck, 0.5)
    for plane in bits_of(value, width):
        assert within_4_sigma(int(plane.sum()), plane.numel(), 0.5)
    # Fair where a cell is weak, too: what it is stuck at does not depend on how easily it fails.
    weak = bits_of(read(zeros, 0.01, stuck=False), width)
    assert within_4_sigma(int(bits_of(value, width)[weak].sum()), int(weak.sum()), 0.5)


# --- choice of the law and its tables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bits", [1, 3, 7, 9, 16, 32])
def test_the_law_changes_where_two_percent_of_the_elements_are_hit(num_bits):
    limit = -math.expm1(math.log1p(-0.02) / num_bits)
    below, above = limit * (1 - 1e-12), limit * (1 + 1e-12)
    assert element_rate([below] * num_bits) < 0.02 <= element_rate([above] * num_bits)
    assert choose_law([below] * num_bits).name == "chunk"
    assert choose_law([above] * num_bits).name == "dense"
    assert choose_law([below] * num_bits, persistent=True).name == "dense"
    with pytest.raises(ValueError, match="more than"):
        make_table(choose_law([below] * num_bits), [above] * num_bits)


def test_the_largest_p_over_the_whole_range_of_bits_decides():
    assert choose_law([2e-3] + [0.0] * 14 + [1e-9]) == Law("dense", 0, 16)
    assert choose_law([2e-3] + [0.0] * 14 + [0.0]).name == "chunk"
    assert choose_law([0.0, 0.0, 1e-3, 0.0, 1e-3, 0.0]) == Law("chunk", 2, 3, choose_law([1e-3] * 3).draws, True)
    assert choose_law([0.0, 1.0, 0.0]) == Law("dense", 1, 1)


@pytest.mark.parametrize(
    ("num_bits", "p"),
    [(16, 2.0**-16), (16, 2.0**-10), (16, 1e-12), (16, 1e-15), (32, 1e-12), (1, 1e-12), (1, 2.0**-6), (9, 1e-3)],
)
def test_the_table_of_the_chunk_law_is_exact(num_bits, p):
    law = choose_law([p] * num_bits)
    tails = exact_tails(CHUNK * num_bits, p, law.slots)
    assert make_table(law, [p] * num_bits) == [ONES - min(ONES, round(tail * 2**32)) for tail in tails]


def test_tables_of_tiny_probabilities():
    # 2048 cells at 1e-12: 2048e-12 2^32 = 8.8 words of 2^32 are a hit.
    law = choose_law([1e-12] * 16)
    assert law.slots == 1
    assert make_table(law, [1e-12] * 16) == [ONES - 9]
    assert make_table(choose_law([1e-15] * 16), [1e-15] * 16) == [ONES]
    assert make_table(choose_law([5e-324] * 16), [5e-324] * 16) == [ONES]
    # Dense: 2^-48 is the finest.
    law = choose_law([1e-12, 1.0, 0.5, 2.0**-48, 2.0**-50], persistent=True)
    high, low = [0, 2**16, 2**15, 0, 0], [281, 0, 0, 1, 0]
    assert make_table(law, [1e-12, 1.0, 0.5, 2.0**-48, 2.0**-50]) == high + low


def test_thinning_keeps_the_ratio_of_probabilities():
    probabilities = [1e-3, 5e-4, 0.0, 1e-3 / 3]
    law = choose_law(probabilities)
    assert make_table(law, probabilities)[law.slots :] == [ONES, 2**31 - 1, -1, round(2**32 / 3) - 1]


def shortfall(cells, p, slots):
    """P(a chunk has more hits than its slots name distinct cells), in float64, every term positive."""
    distinct = [1.0] + [0.0] * slots
    for _ in range(slots):
        distinct = [
            distinct[k] * k / cells + (distinct[k - 1] * (1 - (k - 1) / cells) if k else 0.0) for k in range(slots + 1)
        ]
    pmf = [
        math.exp(
            math.lgamma(cells + 1)
            - math.lgamma(k + 1)
            - math.lgamma(cells - k + 1)
            + k * math.log(p)
            + (cells - k) * math.log1p(-p)
        )
        for k in range(min(cells, 120) + 1)
    ]
    return math.fsum(distinct[m] * math.fsum(pmf[m + 1 :]) for m in range(slots + 1))


@pytest.mark.parametrize("num_bits", [1, 2, 3, 4, 7, 8, 9, 10, 16, 23, 32])
def test_slots_fall_short_less_than_once_in_2_to_the_32(num_bits):
    limit = -math.expm1(math.log1p(-0.02) / num_bits) * (1 - 1e-12)
    worst = 0.0
    for power in range(200):
        p = limit * 0.93**power
        law = choose_law([p] * num_bits)
        assert law.name == "chunk"
        worst = max(worst, shortfall(law.cells, p, law.slots))
    assert worst < 2.0**-32, worst * 2**32


def test_probabilities_that_a_law_cannot_hold_are_errors():
    equal, thinned = choose_law([1e-5] * 16), choose_law([1e-5] * 15 + [2e-5])
    assert not equal.thinned
    assert thinned.thinned
    with pytest.raises(ValueError, match="equal"):
        make_table(equal, [1e-5] * 15 + [0.5e-5])
    with pytest.raises(ValueError, match="slots"):
        make_table(equal, [1e-3] * 16)
    with pytest.raises(ValueError, match="slots"):
        make_table(thinned, [1e-5] * 15 + [1e-3])
    with pytest.raises(ValueError, match="slots"):
        make_table(equal, [1.0] * 16)
    with pytest.raises(ValueError, match="only bits"):
        make_table(choose_law([0.0, 1e-5, 1e-5, 0.0]), [1e-5, 1e-5, 1e-5, 0.0])
    with pytest.raises(ValueError, match="only bits"):
        make_table(choose_law([0.0, 0.5, 0.5, 0.0]), [0.0, 0.5, 0.5, 1e-9])
    with pytest.raises(ValueError):
        make_table(Law("none"), [1e-9] * 16)
    assert make_table(equal, [0.0] * 16) == [ONES] * equal.slots
    assert len(make_table(thinned, [1e-5] * 16)) == thinned.slots + 16
    for law in (equal, thinned, choose_law([0.5] * 16)):
        assert not draw(law, [0.0] * 16, 64, 64).any()
