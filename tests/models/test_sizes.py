"""Shapes, parameter and FLOP counts against published numbers and really built models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.llama import Llama
from models.sizes import (
    SIZES,
    LlamaShape,
    flops_per_token,
    num_parameters,
    num_parameters_without_embedding,
    peak_flops,
    with_overrides,
)
from train.config import total_steps
from train.config_sources import load_config

ALL_SIZES = [(family, size) for family, sizes in SIZES.items() for size in sizes]


def built_parameters(shape: LlamaShape) -> int:
    with torch.device("meta"):
        model = Llama(shape, context=8)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("1B", 1_235_814_400),
        ("3B", 3_212_749_824),
        ("8B", 8_030_261_248),
        ("70B", 70_553_706_496),
        ("405B", 405_853_388_800),
    ],
)
def test_llama3_totals_are_the_published_ones(size, published):
    assert num_parameters(SIZES["llama3"][size]) == published


@pytest.mark.parametrize(("family", "size"), ALL_SIZES)
def test_counts_are_those_of_a_built_model(family, size):
    shape = SIZES[family][size]
    assert num_parameters(shape, padded=True) == built_parameters(shape)


def test_padding_is_counted_only_on_request():
    # 300 rows are allocated as 384; two separate matrices of width 32 hold them.
    shape = LlamaShape(dim=32, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=64, vocab_size=300)
    assert shape.padded_vocab_size == 384
    assert built_parameters(shape) == num_parameters(shape, padded=True)
    assert num_parameters(shape, padded=True) - num_parameters(shape) == 2 * 84 * 32
    tied = replace(shape, tied_embeddings=True)
    assert built_parameters(tied) == num_parameters(tied, padded=True) == num_parameters(shape, padded=True) - 384 * 32


@pytest.mark.parametrize(("rows", "padded"), [(1, 128), (128, 128), (129, 256), (49_152, 49_152), (128_256, 128_256)])
def test_vocabulary_is_padded_to_a_multiple_of_128(rows, padded):
    shape = replace(SIZES["clm"]["debug"], vocab_size=rows)
    assert shape.padded_vocab_size == padded


def test_input_embedding_is_left_out_only_where_it_is_separate():
    untied, tied = SIZES["llama3"]["8B"], SIZES["llama3"]["1B"]
    assert num_parameters_without_embedding(untied) == 8_030_261_248 - 128_256 * 4096
    assert num_parameters_without_embedding(tied) == 1_235_814_400


@pytest.mark.parametrize(
    ("size", "rows", "steps"),
    [("60M", 96, 7_075), ("400M", 96, 45_712), ("1.1B", 192, 59_846)],
)
def test_chinchilla_length_in_steps(size, rows, steps):
    batch = ["--training.global_batch_size", str(rows), "--training.sequence_length", "2048"]
    config = load_config([], ["--model.size", size, "--training.tokens_per_parameter", "22", *batch])
    assert total_steps(config, SIZES["clm"][size]) == steps


def test_length_in_tokens_is_rounded_up_to_whole_steps():
    flags = ["--training.global_batch_size", "4", "--training.sequence_length", "256", "--schedule.warmup_steps", "0"]
    for tokens, steps in [(1024, 1), (1025, 2), (10 * 1024, 10)]:
        config = load_config([], [*flags, "--training.tokens", str(tokens)])
        assert total_steps(config, SIZES["clm"]["debug"]) == steps


def test_flops_per_token_of_8b_by_hand():
    # 6 * 7,504,924,672 and 12 layers-heads-width-sequence products: 12 * 32 * 32 * 128 * 8192.
    assert flops_per_token(SIZES["llama3"]["8B"], 8192) == 45_029_548_032 + 12_884_901_888


def test_flops_per_token_agree_with_torchs_counter():
    """The counter sees the forward's matrix products; a backward costs twice as much, and norms are no products."""
    shape = LlamaShape(dim=64, num_layers=3, num_heads=4, num_kv_heads=2, ffn_dim=160, vocab_size=256)
    length = 32
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        Llama(shape, context=length)(torch.zeros(1, length, dtype=torch.int64))
    norms = (2 * shape.num_layers + 1) * shape.dim
    assert flops_per_token(shape, length) - 6 * norms == 3 * counter.get_total_flops() / length


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", None),
        ("cpu", None),
    ],
)
def test_peak_flops_by_device_name(name, peak):
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA RTX A1000", None),  # a workstation card, not an A100
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA H200 NVL", 835e12),  # data sheet: 1,671 TFLOP/s with sparsity
        ("NVIDIA GB200", 2500e12),  # data sheet: 5 PFLOP/s with sparsity
    ],
)
def test_peak_flops_does_not_take_one_device_for_another(name, peak):
    """A name that merely contains a known one has another peak, or an unknown one: then no MFU may be shown."""
    assert peak_flops(name) in (None, peak)


def test_overrides_keep_what_is_none_and_recompute_the_head_width():
    shape = SIZES["clm"]["60M"]
    assert with_overrides(shape, dim=None, vocab_size=None) == shape
    assert with_overrides(shape, dim=768).head_dim == 128
    assert with_overrides(shape, num_heads=12).head_dim == 32
    assert with_overrides(shape, dim=768, head_dim=48).head_dim == 48
    assert with_overrides(shape, vocab_size=100) == replace(shape, vocab_size=100)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
        ({"dim": 66}, "dim 66 must be a multiple of num_heads 4"),
        ({"head_dim": 7}, "head_dim 7 must be even"),
    ],
)
def test_impossible_shapes_are_refused(fields, message):
    plain = {"dim": 64, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 96, "vocab_size": 128}
    with pytest.raises(ValueError, match=message):
        LlamaShape(**{**plain, **fields})


def test_shapes_that_an_export_could_not_be_loaded_with_are_refused():
    """transformers 5 wants hidden_size to be a multiple of the heads even where head_dim is given."""
    with pytest.raises(ValueError, match="dim 64 must be a multiple of num_heads 12"):
        LlamaShape(dim=64, num_layers=1, num_heads=12, num_kv_heads=3, ffn_dim=96, vocab_size=128, head_dim=16)
