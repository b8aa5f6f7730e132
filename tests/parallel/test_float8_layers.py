"""Which layers float8 takes, against torchao's own filters, and that the others stay as they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.llama import Llama
from models.sizes import SIZES
from parallel.float8 import convert
from parallel.float8_layers import choices
from train.config_sources import load_config


def config_of(*flags: str):
    return load_config([], ["--run.device", "cpu", *flags])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize(
    ("family", "size"), [("clm", "60M"), ("clm", "1.1B"), ("llama3", "1B"), ("llama3", "8B"), ("llama3", "70B")]
)
def test_sizes_are_those_of_torchaos_automatic_filter(recipe, family, size):
    from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

    shape = SIZES[family][size]
    takes = _auto_filter_for_recipe(recipe, [])
    for choice in choices(shape, config_of("--float8.recipe", recipe).float8):
        with torch.device("meta"):
            layer = nn.Linear(choice.in_features, choice.out_features, bias=False)
        assert (not choice.reason) == takes(layer, choice.name), choice


def test_reasons():
    shape = SIZES["llama3"]["8B"]
    found = {
        choice.name: choice.reason
        for choice in choices(shape, config_of("--float8.recipe", "rowwise", "--float8.skip", '["*.o_proj"]').float8)
    }
    assert found["mlp.up_proj"] == ""
    assert found["self_attn.k_proj"] == "too small to gain on an H100"
    assert found["self_attn.o_proj"] == "float8.skip names it"
    odd = {c.name: c.reason for c in choices(shape, config_of("--float8.recipe", "rowwise").float8, tensor_degree=7)}
    assert odd["self_attn.q_proj"] == "the part of each of 7 devices is no multiple of 16"


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_the_same_layers_on_every_layout(recipe):
    config = config_of("--float8.recipe", recipe).float8
    for shape in (SIZES["clm"]["60M"], SIZES["llama3"]["1B"], SIZES["llama3"]["8B"]):
        whole, split = ({c.name for c in choices(shape, config, degree) if not c.reason} for degree in (1, 2))
        assert whole == split


def test_only_the_chosen_layers_are_replaced():
    config = config_of("--float8.recipe", "rowwise", "--float8.min_size", "128")
    with torch.device("meta"):
        model = Llama(SIZES["clm"]["debug"], context=8)
    convert(model, config, torch.device("cpu"))
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert kinds["lm_head"] == "Head"
    assert kinds["model.layers.0.mlp.up_proj"] == "Float8Linear"
    assert kinds["model.layers.3.self_attn.q_proj"] == "Float8Linear"
    assert kinds["model.layers.0.self_attn.k_proj"] == "Linear", "64 outputs"
