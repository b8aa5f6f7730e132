"""Initial weights: their distribution against theory, and that no shard ever differs from the whole."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist

import pytest
import torch

from models.llama import Llama
from models.sizes import LlamaShape
from parallel import init
from parallel.init import fill_truncated_normal_, init_weights, truncated_normal_table
from transforms.noise import stream_key

KEY = (0x12345678, 0x9ABCDEF0)
SHAPE = LlamaShape(dim=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=160, vocab_size=300, max_context=16)


def filled(rows: int, columns: int, offsets=(0, 0), key=KEY, std=0.02) -> torch.Tensor:
    local = torch.full((rows, columns), float("nan"))
    fill_truncated_normal_(local, offsets, key, std)
    return local


def initialised(shape: LlamaShape, seed: int) -> dict[str, torch.Tensor]:
    model = Llama(shape)
    init_weights([model], seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


# The distribution


def test_moments_are_those_of_the_truncated_normal():
    """Variance of a standard normal cut at c: 1 - 2 c phi(c) / (2 Phi(c) - 1), about 0.973 for c = 3."""
    values = filled(1000, 1000, std=0.02).double()
    normal = NormalDist()
    variance = 1 - 6 * normal.pdf(3) / (2 * normal.cdf(3) - 1)
    deviation = 0.02 * math.sqrt(variance)
    error = deviation / math.sqrt(values.numel())
    assert abs(values.mean()) < 5 * error
    assert abs(values.std() - deviation) < 5 * error
    assert 0.0595 < values.abs().max() <= 0.06
    assert values.min() < -0.0595


def test_values_follow_the_distribution_function():
    """Kolmogorov-Smirnov: with the right law the distance exceeds 2.5 / sqrt(n) once in 100,000 keys."""
    values = filled(500, 1000, std=1.0).flatten().double().sort().values
    low, high = NormalDist().cdf(-3), NormalDist().cdf(3)
    expected = (torch.special.ndtr(values) - low) / (high - low)
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((steps[1:] - expected).max(), (expected - steps[:-1]).max())
    assert distance < 2.5 / math.sqrt(n)


def test_quantiles_are_equally_likely_intervals():
    table = truncated_normal_table().double()
    mass = torch.special.ndtr(table[1:]) - torch.special.ndtr(table[:-1])
    assert table[0] == -3
    assert table[-1] == 3
    torch.testing.assert_close(mass, torch.full_like(mass, (2 * NormalDist().cdf(3) - 1) / 4096), rtol=2e-3, atol=0)


def test_neighbours_are_independent():
    values = filled(1000, 400)
    bound = 5 / math.sqrt(values.numel())
    for down, right in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0)]:
        assert abs(correlation(values[down:, right:], values[: 1000 - down, : 400 - right])) < bound
    assert len(values.unique()) > 0.99 * values.numel()


def test_draws_are_fixed_for_all_time():
    """Element (row, column) is word column % 4 of Philox at counter (column // 4, row), here worked out by hand:

    of a word, 12 bits choose the quantile interval and 20 bits the point inside it.
    """
    expected = {(0, 0): -0.323544, (0, 5): 0.496154, (5, 3): 0.087473, (70_001, 4_099): -1.080417}
    for (row, column), value in expected.items():
        drawn = float(filled(1, 1, offsets=(row, column), key=(0, 0), std=1.0))
        assert drawn == pytest.approx(value, abs=2e-6)


# Shards


@pytest.mark.parametrize("seed", range(8))
def test_any_cut_into_shards_gives_the_bits_of_the_whole(seed):
    draw = random.Random(seed)
    rows, columns = draw.choice([(37, 53), (64, 64), (1, 17), (129, 3), (50, 4)])
    whole = filled(rows, columns)
    assert whole.isfinite().all()

    def cuts(size: int) -> list[int]:
        inner = sorted(draw.randint(0, size) for _ in range(draw.randint(1, 4)))  # empty shards among them
        return [0, *inner, size]

    row_cuts, column_cuts = cuts(rows), cuts(columns)
    for top, bottom in pairwise(row_cuts):
        for left, right in pairwise(column_cuts):
            part = filled(bottom - top, right - left, offsets=(top, left))
            assert torch.equal(part, whole[top:bottom, left:right])


def test_large_shards_are_filled_in_chunks_that_do_not_show(monkeypatch):
    whole = filled(41, 30)
    for words in (1, 30, 100):
        monkeypatch.setattr(init, "_CHUNK_WORDS", words)
        assert torch.equal(filled(41, 30), whole)


def test_shards_may_be_views_of_a_larger_buffer():
    buffer = torch.zeros(10, 12)
    fill_truncated_normal_(buffer[2:7, 3:9], (0, 0), KEY, 0.02)
    assert torch.equal(buffer[2:7, 3:9], filled(5, 6))
    assert buffer.count_nonzero() == 30


# A whole model


def test_standard_deviation_by_role():
    """0.02, and 0.02 / sqrt(2 layers) for the two matrices that write into the residual stream (GPT-2, section 2.3)."""
    cut = math.sqrt(1 - 6 * NormalDist().pdf(3) / (2 * NormalDist().cdf(3) - 1))
    weights = initialised(SHAPE, seed=1)
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        residual = ("self_attn.o_proj" in name) or ("mlp.down_proj" in name)
        std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
        drawn = weight[:300] if "embed" in name or "lm_head" in name else weight
        assert drawn.std() == pytest.approx(std * cut, rel=5 / math.sqrt(2 * drawn.numel())), name
        assert drawn.abs().max() <= 3 * std * (1 + 1e-6), name
    assert sum("norm" in name for name in weights) == 2 * 3 + 1


def test_padding_rows_start_at_zero():
    weights = initialised(SHAPE, seed=1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert weights[name].shape[0] == 384
        assert not weights[name][300:].any()
        assert (weights[name][:300] != 0).any(dim=1).all()


def test_tied_embeddings_are_drawn_once_under_the_first_name():
    tied = Llama(replace(SHAPE, tied_embeddings=True))
    init_weights([tied], seed=1)
    assert torch.equal(tied.lm_head.weight, initialised(SHAPE, seed=1)["model.embed_tokens.weight"])


def test_weights_do_not_depend_on_the_rest_of_the_model():
    """More layers, another vocabulary padding: a parameter of the same name and width keeps its values."""
    small, large = initialised(SHAPE, seed=1), initialised(replace(SHAPE, num_layers=5, vocab_size=500), seed=1)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(small[name], large[name])
    assert torch.equal(small["lm_head.weight"][:300], large["lm_head.weight"][:300])


def test_global_random_state_is_neither_used_nor_changed():
    torch.manual_seed(0)
    first = initialised(SHAPE, seed=1)
    torch.manual_seed(1)
    model = Llama(SHAPE)
    state = torch.get_rng_state()
    init_weights([model], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], parameter) for name, parameter in model.named_parameters())


def test_seeds_and_names_are_uncorrelated():
    one, two = initialised(SHAPE, seed=1), initialised(SHAPE, seed=2)
    names = [name for name in one if one[name].shape == (160, 64)]  # gate and up of three layers
    assert len(names) == 6
    bound = 5 / math.sqrt(160 * 64)
    for i, name in enumerate(names):
        assert abs(correlation(one[name], two[name])) < bound
        for other in names[i + 1 :]:
            assert abs(correlation(one[name], one[other])) < bound


def test_the_key_is_that_of_seed_and_name():
    name = "model.layers.2.mlp.up_proj.weight"
    expected = filled(160, 64, key=stream_key(9, name, "init"))
    assert torch.equal(initialised(SHAPE, seed=9)[name], expected)
