"""Philox against its authors' known answers and against plain integer arithmetic."""

from __future__ import annotations

import random

import pytest
import torch

from transforms.noise import philox_4x32, stream_key

ONES = 0xFFFFFFFF
PI_COUNTER, PI_KEY = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)

# Random123, tests/kat_vectors, generator philox4x32: rounds, counter, key, answer.
KNOWN_ANSWERS = [
    (7, (0, 0, 0, 0), (0, 0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (ONES,) * 4, (ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI_COUNTER, PI_KEY, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI_COUNTER, PI_KEY, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def reference(counter, key, rounds):
    """The paper's rounds on Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("rounds", "counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(rounds, counter, key, answer):
    assert reference(counter, key, rounds) == answer
    assert tuple(int(word) for word in philox_4x32(counter, key, rounds)) == answer


def test_seven_rounds_are_the_default():
    assert tuple(int(word) for word in philox_4x32((0, 0, 0, 0), (0, 0))) == KNOWN_ANSWERS[0][3]


@pytest.mark.parametrize("rounds", [1, 2, 7, 10, 16])
def test_random_counters_and_keys_agree_with_integer_arithmetic(rounds):
    draw = random.Random(rounds)
    for _ in range(8):
        counters = [tuple(draw.getrandbits(32) for _ in range(4)) for _ in range(16)]
        key = (draw.getrandbits(32), draw.getrandbits(32))
        columns = tuple(torch.tensor(column) for column in zip(*counters, strict=True))
        words = torch.stack(philox_4x32(columns, key, rounds), dim=-1)
        assert words.dtype == torch.int64
        assert words.tolist() == [list(reference(counter, key, rounds)) for counter in counters]


def test_counter_words_broadcast():
    rows, columns = torch.arange(3)[:, None] + ONES - 2, torch.arange(5)
    words = philox_4x32((columns, rows, 9, 0), (1, 2))
    for word in words:
        assert word.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            expected = reference((j, i + ONES - 2, 9, 0), (1, 2), 7)
            assert tuple(int(word[i, j]) for word in words) == expected


def test_stream_key_is_a_fixed_function_of_its_parts():
    """Values by coreutils: `printf '%s' '1234|lm_head.weight|init|' | b2sum -l 64`, read as two little-endian words."""
    assert stream_key(1234, "lm_head.weight", "init") == (0x55520DFF, 0x26EFE5A0)
    assert stream_key(7, "model.layers.3.mlp.up_proj", "x", "flip") == (0xB3E65F38, 0xC7D8DF78)


def test_every_part_changes_the_stream_key():
    plain = (1234, "lm_head.weight", "w", "a")
    others = [(1235, *plain[1:]), (1234, "lm_head.weigh", "w", "a"), (*plain[:2], "x", "a"), (*plain[:3], "b")]
    keys = {stream_key(*parts) for parts in [plain, *others]}
    assert len(keys) == 5
    assert all(0 <= word < 2**32 for key in keys for word in key)
