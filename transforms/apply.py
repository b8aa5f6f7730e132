"""From `[[transforms]]` tables to a model whose linear layers pass through hardware effects, in place.

Each effect on a weight is declared as a `torch.nn.utils.parametrize` parametrization: `layer.weight` shows the weight as
the hardware has it, the stored one stays `layer.parametrizations.weight.original`. The layer computes with all its
effects as one operation (`transforms/linear.py`). All transformed layers of one kind share one class, where parametrize
would make a class each: compiled code depends on the class, and torch.compile gives up at the ninth.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from transforms.context import Noise
from transforms.describe import describe
from transforms.devices import DeviceError, Site, Stages, attention_stages, stages
from transforms.effect import noted_places
from transforms.experts import EXPERTS, Expert, Slice, expert_of
from transforms.layers import (
    base_of,
    is_transformed,
    stored_weight,
    transformed_attention_class,
    transformed_class,
    weight_effects,
)
from transforms.linear import Plan
from transforms.lora import LowRank
from transforms.product import Product
from transforms.selection import TransformError, check_reach, match, match_attention, unreached
from transforms.specs import Hardware, LoraSpec

_NUMBERS = re.compile(r"(^|\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Applied:
    """One row of the table of what was applied."""

    kind: str
    layers: list[str]
    attentions: list[str]
    """Whose products it acts on."""
    parameters: str
    transform: int
    """Place in the list."""


def apply(
    model: nn.Module, specs: Sequence[Hardware | LoraSpec], seed: int, warmup: int = 0, trained: bool = True
) -> Noise:
    """Put the transforms on a model's layers, in the order given but adapters first, and return their shared state.

    Args:
        warmup: training steps over which effects grow to their full strength.
        trained: the model was, or is being, trained under these effects; otherwise norms that they add are hardware, too.

    The effects' tables are made on the CPU (or on meta, where that is the default device): move the model, call
    `Noise.fill` where `to_empty` has moved it, and `Noise.begin` before each forward.

    Raises:
        TransformError: a pattern matches nothing, or a layer that cannot be transformed; the model is as before then.
    """
    if specs and any(is_transformed(module) for module in model.modules()):
        raise TransformError("the model is transformed already: call transforms.apply.remove first", 0)
    matched = [match(model, spec, index) for index, spec in enumerate(specs)]
    attentions = [match_attention(model, spec, index) for index, spec in enumerate(specs)]
    noise = Noise(seed, warmup, trained)
    hardware_layers = [layers for spec, layers in zip(specs, matched) if not isinstance(spec, LoraSpec)]
    if any(hardware_layers):
        noise.unreached = unreached(model, [layer for layers in hardware_layers for _, layer in layers])
        check_reach(specs, noise.unreached)
    in_order = sorted(range(len(specs)), key=lambda index: specs[index].kind != "lora")
    for index in in_order:
        spec = specs[index]
        if isinstance(spec, LoraSpec):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
    hardware = 0
    for index in in_order:
        spec, layers = specs[index], matched[index]
        stream = str(hardware) if hardware else ""
        hardware += spec.kind != "lora"
        try:
            for name, layer in layers:
                if isinstance(layer, Slice):
                    layer, noise.in_experts = expert_of(layer), True
                _transform(layer, name, spec, noise, stream)
            for name, attention in attentions[index]:
                _transform_attention(attention, name, spec, noise, stream)
        except DeviceError as error:
            remove(model)
            raise TransformError(str(error), index) from error
        except BaseException:
            remove(model)
            raise
        noise.number_effects(index)
        names = [name for name, _ in layers]
        noise.applied.append(Applied(spec.kind, names, [name for name, _ in attentions[index]], describe(spec), index))
    noise.fill()
    return noise


def remove(model: nn.Module) -> None:
    """Take all transforms off again: the stored weights stay, adapters are dropped, what they froze stays frozen."""
    for module in list(model.modules()):
        if hasattr(module, EXPERTS):
            delattr(module, EXPERTS)
        elif hasattr(module, "attention_effects"):
            if hasattr(type(module), "base_of_transformed"):
                module.__class__ = type(module).base_of_transformed
            del module.attention_effects
            del module.noise
        elif is_transformed(module):
            module.__class__ = type(module).base_of_transformed
            if is_parametrized(module):
                weight = module.parametrizations.weight.original
                del module.parametrizations
                others = dict(module._parameters)
                module._parameters.clear()
                module._parameters |= {"weight": weight, **others}  # in the order of before
            for name in (
                "input_effects",
                "output_effects",
                "product",
                "clean_gradients",
                "noise",
                "plan",
                "clean_plan",
            ):
                delattr(module, name)
            vars(module).pop("heads_dim", None)


def _transform(layer: Any, name: str, spec: Hardware | LoraSpec, noise: Noise, stream: str) -> None:
    """Add one transform to one layer."""
    base = base_of(layer)
    transposed = getattr(layer, "stored_transposed", base.__name__ == "Conv1D")
    if isinstance(spec, LoraSpec):
        found = Stages(weight=[LowRank(layer.weight, spec.rank, spec.alpha, transposed)])
    else:
        found = stages(spec, _site(layer, name, noise, stream, transposed))
    if not hasattr(layer, "input_effects"):
        layer.input_effects, layer.output_effects, layer.product = nn.ModuleList(), nn.ModuleList(), None
        layer.noise, layer.clean_gradients = noise, False
    for effect in found.weight:
        if isinstance(layer, Expert):
            layer.weight_effects.append(effect)
        else:
            _on_weight(layer, effect)
    layer.input_effects.extend(found.input)
    layer.output_effects.extend(found.output)
    if found.product is not None:
        if layer.product is not None:
            raise DeviceError(f"{name}: one analog product per layer is enough")
        layer.product = found.product
    layer.clean_gradients |= found.clean_gradients
    if not isinstance(layer, Expert):
        layer.__class__ = transformed_class(base, is_parametrized(layer))
    of_weight = weight_effects(layer)
    kept = [effect for effect in of_weight if not effect.hardware], [e for e in layer.input_effects if not e.hardware]
    stays = None
    if layer.clean_gradients:
        stays = tuple(tuple(not effect.hardware for effect in effects) for effects in (of_weight, layer.input_effects))
    # Sums that are split over devices are converted after their exchange.
    product = None if layer.product is None or _converts_sums(layer) else layer.product
    layer.plan = _plan(of_weight, layer.input_effects, transposed, product, stays)
    layer.clean_plan = _plan(*kept, transposed)


def _site(layer: Any, name: str, noise: Noise, stream: str, transposed: bool) -> Site:
    """What this device holds of a layer, as far as hardware is concerned: what FSDP gathers before the forward is whole."""
    weight = stored_weight(layer)
    rows, columns = weight.shape[::-1] if transposed else weight.shape
    site = Site(noise, name, stream, rows, columns, transposed, local_in=columns)
    if isinstance(weight, DTensor):
        local, (site.first_row, site.first_column) = compute_local_shape_and_global_offset(
            weight.shape, weight.device_mesh, weight.placements
        )
        site.local_in, site.mesh = local[1], weight.device_mesh
        site.group = weight.device_mesh.get_group().group_name
        site.splits_inputs = weight.placements[0].is_shard(1)
    return site


def _converts_sums(layer: Any) -> bool:
    """Whether a layer's sums are complete only after an exchange between devices, and converted then."""
    weight = stored_weight(layer)
    return isinstance(weight, DTensor) and weight.placements[0].is_shard(1) and not layer.product.code.tile


def _transform_attention(attention: Any, name: str, spec: Any, noise: Noise, stream: str) -> None:
    """Add one transform to the products of one attention."""
    if hasattr(attention, "attention_effects"):
        raise DeviceError(f"{name}: the products of attention can have one transform only")
    first_head = getattr(attention, "first_head", 0)
    attention.attention_effects = attention_stages(spec, noise, name, stream, first_head)
    attention.noise, noise.in_attention = noise, True
    if hasattr(type(attention), "products"):
        of: Any = type(attention)
        attention.__class__ = transformed_attention_class(of)


def _on_weight(layer: Any, effect: nn.Module) -> None:
    """Declare an effect on a weight; the class that parametrize makes is replaced by the shared one."""
    layer.__class__ = base_of(layer) if not is_parametrized(layer) else layer.__class__
    register_parametrization(layer, "weight", effect, unsafe=True)


def _plan(
    of_weight: Sequence[Any],
    of_input: Sequence[Any],
    transposed: bool,
    product: Product | None = None,
    stays: tuple[tuple[bool, ...], ...] | None = None,
) -> Plan:
    return Plan(
        tuple(effect.code for effect in of_weight),
        tuple(len(effect.tensors) for effect in of_weight),
        tuple(effect.code for effect in of_input),
        tuple(len(effect.tensors) for effect in of_input),
        transposed,
        None if product is None else product.code,
        noted_places([*of_weight, *of_input, *([] if product is None else [product])]),
        stays,
    )


def table(noise: Noise) -> Iterator[str]:
    """What was applied, as lines for people: transform, layers with their counts, parameters of the effect."""
    for number, row in enumerate(noise.applied, 1):
        attentions = f" and the products of {len(row.attentions)} attentions" if row.attentions else ""
        yield f"{number}. {row.kind}: {len(row.layers)} layers{attentions}; {row.parameters}"
        for names in (row.layers, row.attentions):
            for pattern, count in Counter(_NUMBERS.sub(r"\1*", name) for name in names).items():
                yield f"   {count:4} x {pattern}{' (products)' if names is row.attentions else ''}"
    if noise.unreached:
        yield f"no transform reaches {sum(one.share for one in noise.unreached):.2%} of the weights of the blocks:"
    for one in noise.unreached:
        yield f"   {one.count:4} x {one.pattern} ({one.share:.2%})"
