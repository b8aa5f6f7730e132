"""Packed exports: the model that an evaluation under low-bit weights measures, with the codes in place of the weights.

The codes and scales are those of the effects on the evaluated model, and each packed layer is compared with what its
effect gives before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from evals.chips import TransformList
from evals.models import load_model
from evals.noise import NoisyModel
from models.hf import write_json
from train.export import PROVENANCE, describe, export_folder, is_run_or_checkpoint, open_trained, provenance
from train.packed import BITNET, TORCHAO, Layout, PackedWeight, write_packed
from train.read_back import check_ids, compare, odd_texts, probe, quiet
from transforms.devices import NORM_EPS
from transforms.layers import is_transformed
from transforms.selection import TransformError
from transforms.specs import TransformSpec

_INTEGERS = re.compile("int[2-8]|ternary")
PACKABLE = (
    'kind = "quantise" with weights of format int2 to int8 or ternary, rounded to the nearest, and inputs as they are '
    '(without norm); or weights ternary and input { format = "int8", scale = "row" }, with or without norm'
)

TEXTS, TEXT_LENGTH = 8, 8
"""Of the batch whose logits are compared when a packed folder is read back."""
TOLERANCES = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.25}
"""Relative difference of a token's logits, by the type of the arithmetic."""
ROUNDED_INPUTS_TOLERANCE = 0.5
"""The same where inputs are rounded: a value between two codes may be rounded either way, and every later layer carries that
on. A model of other weights differs by more than 1."""


def export_packed(
    reference: str, transforms: TransformList, out: Path, layout_name: str = "auto", dtype: str = "float32"
) -> int:
    """Write a Hugging Face folder of a model under `transforms` that transformers loads by itself; returns its bytes.

    Args:
        reference: run, checkpoint, or Hugging Face folder, as `load_model` takes it.
        layout_name: "torchao", "metal" or "bitnet" (`train/packed.py`); "auto" takes bitnet where inputs are rounded, else
            torchao.
        dtype: of all that is not packed, and of the arithmetic.

    Raises:
        ConfigError: a transform does not fit the model, or cannot be packed.
        ReadBackError: transformers reads something else from the folder than what was evaluated.
        ValueError: a layer cannot be packed, or `out` holds something else.
    """
    with transforms.blamed():
        layout = layout_of(transforms.specs)
    layout = chosen(layout, layout_name)
    loaded = load_model(reference, "cpu", dtype)
    model = loaded.model
    noisy = transforms.attach(loaded)
    _check_packable(noisy)
    noisy.chip(0)
    tokens, _ = probe(model.get_input_embeddings().weight.shape[0], loaded.context, TEXTS, TEXT_LENGTH)
    with torch.no_grad():
        evaluated = model(tokens).logits
    noisy.noise.begin(0, 0, torch.device("cpu"))  # weights are looked at without a forward
    layers = {name: packed_weight(name, layer) for name, layer in model.named_modules() if is_transformed(layer)}
    noisy.detach()
    others = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in layers]
    tensors = _stored(model)
    shared = [name for name in layers if f"{name}.weight" not in tensors]
    if shared:
        raise ValueError(f"{shared[0]} shares its weight with another module, and cannot be packed alone: leave it out")
    with export_folder(out) as folder:
        noted = _describe(reference, loaded, folder, dtype)
        total = write_packed(folder, tensors, layers, others, layout)
        # What is packed is a part of the model now: no transforms are left to evaluate it under.
        write_json(folder / PROVENANCE, noted | {"transforms": [], "packed": transforms.record()})
        ids = {text: loaded.tokenizer(text, verbose=False)["input_ids"] for text in odd_texts(loaded.tokenizer)}
        del model, noisy, loaded, tensors, layers  # two models need not be in memory
        _read_back(folder, layout, dtype, tokens, evaluated, ids)
    return total


def _check_packable(noisy: NoisyModel) -> None:
    """
    Raises:
        ValueError: transformers has no packed module that computes what a layer of the model does.
    """
    if noisy.noise.in_experts:
        raise ValueError(
            "experts are stacked parameters, which none of the packed layouts holds: name the other layers in modules, and "
            "export those, or the plain weights"
        )
    if noisy.read_only:
        raise ValueError(
            f"{noisy.read_only[0]}: the model multiplies this layer's weight by itself, and cannot read a packed one: leave the "
            "layer out of modules"
        )


@torch.no_grad()
def _read_back(
    folder: Path, layout: Layout, dtype: str, tokens: Tensor, evaluated: Tensor, ids: Mapping[str, list[int]]
) -> None:
    """Load a packed folder as its users do, and compare it with the evaluated model.

    Args:
        evaluated: logits of `tokens`, of the model under its transforms.
        ids: texts and the ids that the evaluated model's tokenizer gives.

    Raises:
        ReadBackError: logits or ids are others.
    """
    with quiet():
        packed = load_model(str(folder), "cpu", dtype)
    check_ids(packed.tokenizer, ids)
    with torch.compiler.set_stance("force_eager"):  # BitLinear compiles for half a minute, and computes the same
        found = packed.model(tokens).logits
    compare(found, evaluated, ROUNDED_INPUTS_TOLERANCE if layout.name == BITNET else TOLERANCES[dtype])


def layout_of(specs: Sequence[TransformSpec]) -> Layout:
    """The layout that holds what all these transforms do.

    Raises:
        TransformError: there is none for one of them, or not one for all.
    """
    layouts = [_layout(spec, index) for index, spec in enumerate(specs)]
    for index, layout in enumerate(layouts):
        if layout != layouts[0]:
            raise TransformError(
                "one folder has one layout, and this transform has other inputs (format or norm) than transforms.0: "
                "quantise the inputs of all layers alike",
                index,
            )
    return layouts[0]


def chosen(layout: Layout, name: str) -> Layout:
    """The layout by its name instead of the usual one.

    Raises:
        ValueError: it cannot hold what the transforms do to inputs.
    """
    if name in ("auto", layout.name):
        return layout
    if BITNET in (name, layout.name):
        inputs = "rounded to int8" if layout.name == BITNET else "as they are"
        raise ValueError(f"--packed {name}: the inputs of these transforms are {inputs}, which needs {layout.name}")
    return Layout(name)


def _layout(spec: Any, index: int) -> Layout:
    refused = TransformError(f"{_name(spec)} cannot be packed. What can: {PACKABLE}", index, setting="")
    if spec.kind != "quantise" or spec.weight is None or spec.attention is not None:
        raise refused
    if not _INTEGERS.fullmatch(spec.weight.format) or spec.weight.rounding != "nearest":
        raise refused
    if spec.input is None and not spec.norm:
        return Layout(TORCHAO)
    if spec.input is None or spec.weight.format != "ternary":
        raise refused
    if spec.input.format != "int8" or spec.input.scale not in (None, "row") or spec.input.rounding != "nearest":
        raise refused
    return Layout(BITNET, NORM_EPS if spec.norm else None)


def _name(spec: Any) -> str:
    if spec.kind != "quantise":
        return f'kind = "{spec.kind}"'
    operands = {name: getattr(spec, name) for name in ("weight", "input", "attention")}
    parts = [f"{name} {operand.format}" for name, operand in operands.items() if operand is not None]
    return f"quantise with {', '.join(parts)}{' and norm' if spec.norm else ''}"


@torch.no_grad()
def packed_weight(name: str, layer: Any) -> PackedWeight:
    """The codes and scales of a transformed layer's weight.

    Raises:
        ValueError: its weight is no multiple of whole numbers by blocks, or its effects are not one.
    """
    effects = list(layer.parametrizations.weight) if is_parametrized(layer) else []
    if not isinstance(layer, nn.Linear) or len(effects) != 1:
        what = (
            "is no torch.nn.Linear" if not isinstance(layer, nn.Linear) else f"has {len(effects)} effects on its weight"
        )
        raise ValueError(f"{name} {what}: only a linear layer whose weight is quantised once can be packed")
    (effect,) = effects
    weight = layer.parametrizations.weight.original.detach().float()
    codes, scale = _codes(effect, weight)
    block = effect.code.scaling.block
    if block and weight.shape[1] % block:
        raise ValueError(
            f"{name} has {weight.shape[1]} inputs, which groups of {block} do not divide evenly: choose a group_size that "
            "does, or leave the layer out (modules)"
        )
    packed = PackedWeight(codes, scale, effect.code.form.bits)
    rows, columns = packed.block
    evaluated = (codes * scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)).to(layer.weight.dtype)
    if not torch.equal(evaluated, layer.weight):
        raise ValueError(
            f"{name}: the evaluated weight is not a scale times whole numbers, and cannot be packed (a range that is learned "
            "or tracked is not known before something was seen)"
        )
    return packed


def _codes(effect: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a quantiser of integers rounds a weight (out, in) to: codes (out, in) int8, and scales by blocks."""
    code = effect.code
    blocks, scale = code.codes(weight, code.read(effect.tensors))
    codes = code.scaling.unblocked(blocks, weight.shape[1])
    by_blocks = scale.squeeze(-1) if code.scaling.block else scale
    return codes.to(torch.int8), by_blocks.reshape(-1, 1) if by_blocks.dim() < 2 else by_blocks


def _stored(model: Any) -> dict[str, Tensor]:
    """The tensors of a model's files; of a weight that modules share, the first name only."""
    everything = model.state_dict()
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    first = {name for name, _ in model.named_parameters()}
    return {name: tensor for name, tensor in everything.items() if name in first or name not in shared}


def _describe(reference: str, loaded: Any, folder: Path, dtype: str) -> dict[str, Any]:
    """Write all but the weights; returns where the model came from."""
    if is_run_or_checkpoint(Path(reference)):
        describe(open_trained(Path(reference)), folder, dtype)
        return provenance(folder)
    loaded.model.config.dtype = loaded.model.dtype
    loaded.model.config.save_pretrained(folder)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return provenance(Path(reference)) | {"model": reference}
