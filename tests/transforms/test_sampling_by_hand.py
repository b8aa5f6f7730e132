"""Which cells fail, by a second implementation of the laws on plain integers."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch
from chances import KEY, ONES, exact_tails, with_bits

from transforms.bitflip import bit_probabilities
from transforms.sampling import CHUNK, DRAWS, Law, choose_law, failed_cells, make_table, stuck_values, words_of

CPU = torch.device("cpu")


def philox(counter, key):
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def words_at(key, chunk, position, sample, step):
    def words(number):
        number += chunk * 1024
        return philox((number % 2**32, position + number // 2**32, sample, step), key)

    return words


def chunk_law(law, probabilities, words):
    """Element -> mask: as many first distinct cells as one word says, each kept with p(bit) / max p."""
    cells, top = 128 * law.num_bits, max(probabilities)
    u = words(0)[0]
    count = sum(u >= 2**32 - round(tail * 2**32) for tail in exact_tails(cells, top, law.slots))
    pairs = [words(0)[2:]]
    for call in range(1, law.draws):
        pairs += [words(call)[:2], words(call)[2:]]
    masks, taken = [0] * 128, []
    for place, keep in pairs:
        cell = place * cells // 2**32
        if cell in taken or len(taken) == count:
            continue
        taken.append(cell)
        bit = law.first_bit + cell // 128
        if keep < round(Fraction(probabilities[bit] / top) * 2**32):
            masks[cell % 128] |= 1 << bit
    return masks


def uniform(bit, element, words):
    """The 48-bit uniform of a cell under the dense law."""
    word, half = divmod(element // 16, 2)
    upper = words(bit * 16 + element % 16)[word] >> (16 * half) & 0xFFFF
    return upper << 32 | words(512 + element % 32)[element // 32]


def dense_law(law, probabilities, words):
    masks = [0] * 128
    for element in range(128):
        for bit, p in enumerate(probabilities):
            if p > 0 and uniform(bit, element, words) < Fraction(p) * 2**48:
                masks[element] |= 1 << bit
    return masks


CASES = [
    [2.0**-10] * 16,
    [5e-4] * 32,
    [0.0199],
    with_bits(16, {6: 0.0199}),
    [0.0, 0.0, 9e-4, 0.0, 3e-4] + [9e-4] * 11,
    bit_probabilities("float32", 1e-4, 6e-4),
    [0.25] * 16,
    with_bits(32, {0: 1.0, 8: 0.5, 31: 0.01}),
    [0.0] * 3 + [0.02, 0.9] + [0.0] * 11,
]


@pytest.mark.parametrize("probabilities", CASES)
def test_plain_integers_give_the_same_cells(probabilities):
    law = choose_law(probabilities)
    pick = random.Random(len(probabilities))
    rows, chunks = (16, 4) if law.name == "chunk" else (2, 2)
    position, sample = ([pick.getrandbits(bits) for _ in range(rows)] for bits in (20, 32))
    step, key = pick.getrandbits(31), (pick.getrandbits(32), pick.getrandbits(32))
    table = torch.tensor(make_table(law, probabilities))
    words = words_of(torch.tensor(key), chunks, torch.tensor(position), torch.tensor(sample), torch.tensor(step))
    found = failed_cells(law, table, words)
    golden = chunk_law if law.name == "chunk" else dense_law
    some = 0
    for row, chunk in itertools.product(range(rows), range(chunks)):
        expected = golden(law, probabilities, words_at(key, chunk, position[row], sample[row], step))
        assert [mask & ONES for mask in found[row, chunk].tolist()] == expected
        some += any(expected)
    assert some > 1


def test_a_cell_fails_where_its_uniform_is_below_p_to_the_last_bit():
    at = (11, 22, 33)
    words = words_at(KEY, 1, *at)
    drawn = words_of(torch.tensor(KEY), 2, *(torch.tensor([place]) for place in at[:2]), torch.tensor(at[2]))
    for bit, element in ((0, 0), (0, 127), (7, 16), (15, 31), (15, 32), (31, 95), (31, 127), (20, 64)):
        u = uniform(bit, element, words)
        for p, fails in ((u / 2**48, False), ((u + 1) / 2**48, True)):
            probabilities = with_bits(32, {bit: p})
            law = choose_law(probabilities, persistent=True)
            mask = failed_cells(law, torch.tensor(make_table(law, probabilities)), drawn)
            assert bool(mask[0, 1, element] != 0) is fails


def test_thresholds_of_the_chunk_law_are_the_last_words_on_their_side():
    """Crafted words: more than the count's threshold is a hit, up to its own threshold a hit is kept."""
    law, table = Law("chunk", 0, 2, 1, True), torch.tensor([1000, ONES, 500])

    def mask(count, cell, keep):
        place = -(-cell * 2**32 // law.cells)
        return failed_cells(law, table, lambda _: tuple(torch.tensor([[[w]]]) for w in (count, 0, place, keep)))[0, 0]

    assert int(mask(1001, 128 + 9, 500)[9]) == 2
    assert int(mask(1001, 9, ONES)[9]) == 1
    assert not mask(1000, 9, 0).any()
    assert not mask(1001, 128 + 9, 501).any()


def test_the_draw_of_a_chunk_carries_into_the_second_word():
    """A weight of more than 2^29 elements: chunk 2^22 starts at draw 2^32."""
    chunks = 2**22 + 2
    row = torch.zeros(1, dtype=torch.int64)
    words = words_of(torch.tensor(KEY), chunks, row, row + 9, torch.tensor(4))(torch.tensor([[[3]]]))
    for chunk in (0, 1, 2**22 - 1, 2**22, 2**22 + 1):
        assert tuple(int(word[0, 0, chunk]) for word in words) == words_at(KEY, chunk, 0, 9, 4)(3)


def test_stuck_values_share_no_draw_with_the_dense_law():
    place = torch.zeros(1, dtype=torch.int64)
    asked = []

    def words(draws):
        asked.append(set(draws.flatten().tolist()))
        return words_of(torch.tensor(KEY), 2, place, place, torch.tensor(0))(draws)

    law = choose_law([0.5] * 32)
    failed_cells(law, torch.tensor(make_table(law, [0.5] * 32)), words)
    values = stuck_values(words, CPU)
    assert values.shape == (1, 2, CHUNK)
    assert sum(len(draws) for draws in asked) == len(set.union(*asked)) == 32 * 16 + 32 + 32
    assert max(set.union(*asked)) < DRAWS
