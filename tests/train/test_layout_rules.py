"""Layouts that cannot be are refused before anything starts, each with the nearest that can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models.llama import Llama
from models.sizes import SIZES
from parallel.float8 import convert
from train.config_sources import ConfigError, load_config
from transforms.apply import TransformError, apply
from transforms.specs import BitflipSpec, CellFaults

# debug: 4 layers, 4 heads, 2 KV heads; vocabulary 2,048
BASE = {"training.global_batch_size": 8, "training.sequence_length": 64}
BITFLIP = '[{ kind = "bitflip", weight = { mantissa = 1e-4 } }]'
GROUPS = '[{ kind = "quantise", weight = { format = "int4", scale = "group" } }]'
TILES = '[{ kind = "optical", tile = 128 }]'
PHOTONS = '[{ kind = "optical", photons = 9.0 }]'
BLOCKS = '[{ kind = "quantise", modules = ["*.mlp.*"], weight = { format = "mxfp4" } }]'
LORA = '[{ kind = "lora" }]'


def problems(world_size: int, **changes: object) -> list[str]:
    settings = BASE | {key.replace("__", "."): value for key, value in changes.items()}
    flags = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    try:
        load_config([], flags, world_size)
    except ConfigError as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("world_size", "changes", "message"),
    [
        (
            2,
            {"parallel__tensor": 2, "transforms": GROUPS},
            "64 of the 128 inputs of self_attn.o_proj, and a scale of transforms.0 takes 128",
        ),
        (2, {"parallel__tensor": 2, "transforms": TILES}, "a tile of transforms.0 takes 128"),
        (
            2,
            {"parallel__tensor": 2, "transforms": PHOTONS},
            "shot noise without a tile of transforms.0 takes 128: choose a smaller degree or another tile",
        ),
        (4, {"parallel__tensor": 4}, "does not divide the model's KV heads 2; the nearest degree that fits: 2"),
        (3, {"parallel__tensor": 3, "training__sequence_length": 48}, "KV heads 2, heads 4, padded vocabulary 2048"),
        (4, {"parallel__context": 4, "training__sequence_length": 60}, "the nearest length that fits: 64"),
        (2, {"parallel__tensor": 2, "training__sequence_length": 63}, "rows are cut into 2 pieces"),
        (8, {"parallel__pipeline": 8}, "8 stages (8 devices x 1) for 4 layers; the highest degree that fits: 4"),
        (
            4,
            {"parallel__pipeline": 4, "parallel__pipeline_schedule": "zbv"},
            '8 stages (4 devices x 2) for 4 layers; the highest degree that fits: 2; pipeline_schedule = "1f1b"',
        ),
        (
            2,
            {"parallel__pipeline": 2, "model__shape__tied_embeddings": "true"},
            "embedding and head share a weight",
        ),
        (
            2,
            {"parallel__pipeline": 2, "training__micro_batch_size": 8},
            "each process has 8 rows = 1 micro-batches of 8; the 1f1b schedule over 2 devices takes at least 2: the "
            "nearest batch that fits is 16",
        ),
        (
            2,
            {
                "parallel__pipeline": 2,
                "training__micro_batch_size": 2,
                "training__global_batch_size": 6,
                "parallel__pipeline_schedule": "interleaved_1f1b",
            },
            "takes a multiple of 2: the nearest batch that fits is 8",
        ),
        (6, {"parallel__tensor": 2, "parallel__shard": -1, "parallel__replicate": 2}, "4 does not divide the 6"),
        (4, {"parallel__tensor": 2, "parallel__replicate": 1}, "tensor 2 = 2 processes, but 4 are running"),
        (
            2,
            {"parallel__tensor": 2, "parallel__async_tensor": "true", "compile__enabled": "false"},
            "and with compile.enabled",
        ),
        (2, {"parallel__async_tensor": "true"}, "it acts with parallel.tensor of more than 1"),
        (
            2,
            {
                "parallel__pipeline": 2,
                "parallel__pipeline_schedule": "zbv",
                "training__micro_batch_size": 2,
                "parallel__reshard_after_forward": "true",
            },
            "zbv loses gradients with it",
        ),
        (
            1,
            {
                "training__loss_chunk_tokens": 64,
                "transforms": '[{ kind = "bitflip", modules = ["lm_head"], input = { mantissa = 1e-4 } }]',
            },
            "need the whole batch, not chunks of it",
        ),
        (2, {"parallel__tensor": 2, "transforms": LORA, "model__init_from": "hf:x"}, "adapters are small"),
        (2, {"parallel__pipeline": 2, "transforms": LORA, "model__init_from": "hf:x"}, "adapters are small"),
        (1, {"compile__enabled": "false", "compile__cuda_graphs": "true"}, "it acts with compile.enabled = true"),
        (1, {"compile__enabled": "false", "activation_checkpointing__mode": "budget"}, "the compiler's work"),
        (1, {"training__document_mask": "true", "data__source": "random"}, "random tokens have no documents"),
        (
            2,
            {
                "parallel__pipeline": 2,
                "parallel__pipeline_schedule": "zero_bubble",
                "training__micro_batch_size": 2,
                "activation_checkpointing__mode": "selective",
                "compile__enabled": "false",
            },
            "runs the backward in two parts, which this mode allows only compiled",
        ),
        (
            1,
            {"float8__recipe": "tensorwise", "float8__min_size": 16, "transforms": BITFLIP},
            "would run in float8, which bypasses the transform",
        ),
    ],
)
def test_refused_with_the_nearest_that_fits(world_size, changes, message):
    (found,) = problems(world_size, **changes)
    assert message in found


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"parallel__tensor": 2, "transforms": BLOCKS}),
        (2, {"parallel__tensor": 2, "transforms": TILES.replace("128", "32")}),
        (8, {"parallel__tensor": 2, "parallel__context": 2, "parallel__replicate": 2}),
        (8, {"parallel__pipeline": 4, "parallel__tensor": 2}),
        (1, {"training__loss_chunk_tokens": 64, "transforms": BITFLIP}),
        (4, {"parallel__pipeline": 2, "parallel__pipeline_schedule": "zbv"}),
        (1, {"float8__recipe": "tensorwise", "transforms": BITFLIP}),  # too small for float8: nothing is bypassed
        (
            1,
            {"float8__recipe": "tensorwise", "float8__min_size": 16, "float8__skip": '["*"]', "transforms": BITFLIP},
        ),
    ],
)
def test_accepted(world_size, changes):
    assert problems(world_size, **changes) == []


def test_long_contexts_of_any_size(configure):
    from train.config import named_shape

    scaling = ["--model.shape.rope_scaling.factor", "16", "--model.shape.max_context", "131072"]
    shape = named_shape(configure(*scaling, "--training.sequence_length", "131072").model, 300)
    assert shape.max_context == 131072
    assert shape.rope_scaling is not None
    assert (shape.rope_scaling.factor, shape.rope_scaling.original_context) == (16, 8192)
    assert SIZES["clm"]["debug"].rope_scaling is None


@pytest.mark.parametrize("kind", ["Float8Linear", "Float8ColumnLinear"])
def test_a_transform_never_replaces_float8(kind):
    """Also where the configuration could not know the shape."""
    with torch.device("meta"):
        model = Llama(SIZES["clm"]["debug"], context=8)
    config = load_config([], ["--float8.recipe", "rowwise", "--float8.min_size", "128", "--run.device", "cpu"])
    convert(model, config, torch.device("cpu"))
    if kind == "Float8ColumnLinear":
        from parallel.float8 import Float8ColumnLinear

        layer = model.model.layers["0"].mlp.up_proj
        layer.__class__ = Float8ColumnLinear
    spec = BitflipSpec(kind="bitflip", modules=["*.up_proj"], weight=CellFaults(mantissa=1e-4))
    with pytest.raises(TransformError, match="Float8"):
        apply(model, [spec], seed=1)
    assert isinstance(model.model.layers["0"].mlp.up_proj, nn.Linear)
