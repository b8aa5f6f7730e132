"""From `[[transforms]]` tables to a model whose linear layers pass through hardware effects, in place.

Each effect on a weight is declared as a `torch.nn.utils.parametrize` parametrization: `layer.weight` shows the weight as
the hardware has it, the stored one stays `layer.parametrizations.weight.original`. The layer computes with all its
effects as one operation (`transforms/linear.py`). All transformed layers of one kind share one class, where parametrize
would make a class each: compiled code depends on the class, and torch.compile gives up at the ninth.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from transforms.attention import TransformedAttention, transformed_attention
from transforms.context import Noise
from transforms.describe import describe
from transforms.devices import DeviceError, Site, Stages, attention_stages, stages
from transforms.effect import noted_places
from transforms.linear import Plan, TransformedLinear, TransformedOutput, transformed_linear
from transforms.lora import LowRank
from transforms.product import Product
from transforms.specs import Hardware, LoraSpec, QuantiseSpec, matches, name_pattern

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_NUMBERED = re.compile(r"(^|\.)\d+\.")


class TransformError(ValueError):
    """A transform cannot be applied to this model; `index` is its place in the list, `setting` what of it is to blame."""

    def __init__(self, message: str, index: int, setting: str = "modules"):
        super().__init__(message)
        self.index = index
        self.setting = f"transforms.{index}.{setting}".rstrip(".")


@dataclass(frozen=True)
class Applied:
    """One row of the table of what was applied."""

    kind: str
    layers: list[str]
    attentions: list[str]
    """Whose products it acts on."""
    parameters: str


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
                _transform(layer, name, spec, noise, stream)
            for name, attention in attentions[index]:
                _transform_attention(attention, name, spec, noise, stream)
        except DeviceError as error:
            remove(model)
            raise TransformError(str(error), index) from error
        names = [name for name, _ in layers]
        noise.applied.append(Applied(spec.kind, names, [name for name, _ in attentions[index]], describe(spec)))
    noise.fill()
    return noise


def match(model: nn.Module, spec: Hardware | LoraSpec, index: int = 0) -> list[tuple[str, nn.Module]]:
    """The (Hugging Face name, layer) pairs that a transform is for; none where it is for attention only.

    Raises:
        TransformError: as `apply`.
    """
    if isinstance(spec, QuantiseSpec) and spec.weight is None and spec.input is None:
        return []
    modules = {_WRAPPERS.sub("", name): module for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    if not spec.modules:
        found = {name: m for name, m in modules.items() if _NUMBERED.search(name) and _is_linear(m)}
        if not found:
            raise TransformError("the model has no linear layer inside numbered blocks: name the layers", index)
    for pattern in spec.modules:
        named = {name: module for name, module in modules.items() if name and name_pattern(pattern).fullmatch(name)}
        linear = {name: module for name, module in named.items() if _is_linear(module)}
        if not linear:
            kinds = ", ".join(sorted({type(module).__name__ for module in named.values()}))
            what = f"no linear layer, only {kinds}" if named else "no layer"
            hint = _nearest(pattern, [name for name, module in modules.items() if _is_linear(module)])
            raise TransformError(f"{pattern!r} matches {what}{hint}", index)
        found |= linear
    for name, module in found.items():
        kind = _base(module)
        known = kind is nn.Linear or kind.__name__ == "Conv1D" or hasattr(kind, "multiply")
        if not known or hasattr(module, "linear_mm_config"):  # float8, by torchao
            raise TransformError(
                f"{name} is a {kind.__name__}, which multiplies in its own way and would bypass the transform", index
            )
    if isinstance(spec, LoraSpec):
        holders = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
        for name, module in found.items():
            if holders[id(module._parameters.get("weight"))] > 1:
                message = f"{name} shares its weight with another module: an adapter could not be merged into it"
                raise TransformError(message, index)
    return list(found.items())


def _nearest(pattern: str, layers: Sequence[str]) -> str:
    """A hint at the layer whose name, or a part of it, is nearest to a pattern that matches none."""
    parts: dict[str, str] = {}
    for name in layers:
        within = _NUMBERED.split(name)[-1]
        for part in (within.rpartition(".")[2], within.partition(".")[0], within, name):
            parts.setdefault(part, name)
    near = difflib.get_close_matches(pattern.removeprefix("re:").strip("*.^$"), parts, 1, 0.5)
    return f"; the nearest layer is {parts[near[0]]!r}" if near else ""


def match_attention(model: nn.Module, spec: Hardware | LoraSpec, index: int = 0) -> list[tuple[str, nn.Module]]:
    """The (Hugging Face name, attention) pairs whose products a transform is for: in the blocks where it acts.

    Raises:
        TransformError: this model's attention cannot be reached.
    """
    if not getattr(spec, "attention", None):
        return []
    found = {}
    for name, module in model.named_modules():
        name = _WRAPPERS.sub("", name)
        if hasattr(type(module), "products"):
            found[name.rpartition(".")[0]] = module
        elif hasattr(module, "is_causal") and _NUMBERED.search(name):
            found[name] = module
    found = {name: module for name, module in found.items() if matches(spec, name)}
    if not reaches_attention(model) or not (found or spec.modules):
        raise TransformError(
            "this model's attention has no port for effects on its products: set attention = false", index
        )
    if not found and isinstance(spec, QuantiseSpec):
        raise TransformError(
            "its patterns match no attention: name the attention modules as well, or leave attention out", index
        )
    return list(found.items())


def reaches_attention(model: nn.Module) -> bool:
    """Whether a model's attention products can be replaced: ours, and those of transformers that use its registry."""
    return not hasattr(model, "config") or getattr(model, "_supports_attention_backend", False)


def remove(model: nn.Module) -> None:
    """Take all transforms off again: the stored weights stay, adapters are dropped, what they froze stays frozen."""
    for module in model.modules():
        if hasattr(module, "attention_effects"):
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


def is_transformed(module: nn.Module) -> bool:
    return hasattr(type(module), "base_of_transformed")


def _base(module: nn.Module) -> type:
    return getattr(type(module), "base_of_transformed", type(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _base(module).__name__ == "Conv1D"


def _transform(layer: Any, name: str, spec: Hardware | LoraSpec, noise: Noise, stream: str) -> None:
    """Add one transform to one layer."""
    base = _base(layer)
    transposed = base.__name__ == "Conv1D"
    if isinstance(spec, LoraSpec):
        found = Stages(weight=[LowRank(layer.weight, spec.rank, spec.alpha, transposed)])
    else:
        found = stages(spec, _site(layer, name, noise, stream, transposed))
    if not is_transformed(layer):
        layer.input_effects, layer.output_effects, layer.product = nn.ModuleList(), nn.ModuleList(), None
        layer.noise, layer.clean_gradients = noise, False
    for effect in found.weight:
        _on_weight(layer, effect)
    layer.input_effects.extend(found.input)
    layer.output_effects.extend(found.output)
    if found.product is not None:
        if layer.product is not None:
            raise DeviceError(f"{name}: one analog product per layer is enough")
        layer.product = found.product
    layer.clean_gradients |= found.clean_gradients
    layer.__class__ = transformed_class(base, is_parametrized(layer))
    of_weight = list(layer.parametrizations.weight) if is_parametrized(layer) else []
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
    weight = layer.parametrizations.weight.original if is_parametrized(layer) else layer.weight
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
    weight = layer.parametrizations.weight.original if is_parametrized(layer) else layer.weight
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


@cache
def transformed_attention_class(base: type) -> type:
    return type(f"Transformed{base.__name__}", (base,), {"base_of_transformed": base, "products": _products})


def _products(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The products of a transformed attention: q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E)."""
    if attention.noise.clean:
        return type(attention).base_of_transformed.products(attention, q, k, v, mask)
    return run_attention(attention, q, k, v, mask, q.shape[-1] ** -0.5)


def run_attention(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The products of an attention that has effects."""
    noise, effects = attention.noise, attention.attention_effects
    run = TransformedAttention.apply if torch.is_grad_enabled() else transformed_attention
    place = (*noise.place(), noise.keys)
    return run(effects.plan, noise.observing, scale, q, k, v, mask, *place, *effects.tensors)


def _on_weight(layer: Any, effect: nn.Module) -> None:
    """Declare an effect on a weight; the class that parametrize makes is replaced by the shared one."""
    layer.__class__ = _base(layer) if not is_parametrized(layer) else layer.__class__
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


@cache
def transformed_class(base: type, parametrized: bool) -> type:
    """The class of all transformed layers whose class was `base`.

    A base with more to its forward than the product (the head's loss, the exchanges of tensor parallelism) has a method
    `multiply` for that; one that adds up products of several devices has `leave` for what follows.
    """
    namespace: dict[str, Any] = {"base_of_transformed": base}
    if hasattr(base, "leave"):
        namespace |= {"multiply": _multiply, "leave": _leave}
    else:
        namespace["multiply" if hasattr(base, "multiply") else "forward"] = _forward
    if parametrized:
        namespace["weight"] = property(lambda layer: layer.parametrizations.weight())
        namespace["__setattr__"] = _set_original
    return type(f"Transformed{base.__name__}", (base,), namespace)


def _set_original(layer: Any, name: str, value: Any) -> None:
    """Assigning a weight, as tying it to the embedding does, assigns the stored one."""
    if name == "weight":
        layer.parametrizations.weight.original = value
    else:
        nn.Module.__setattr__(layer, name, value)


def _forward(layer: Any, x: Tensor) -> Tensor:
    """The forward of a transformed layer: x (..., in) -> (..., out)."""
    return _through(layer.noise, layer.output_effects, _multiply(layer, x), layer.noise.place())


def _multiply(layer: Any, x: Tensor) -> Tensor:
    """The product of a transformed layer, of its part of the weight: x (..., in) -> (..., out)."""
    noise = layer.noise
    effects = list(layer.parametrizations.weight) if "parametrizations" in layer._modules else []
    weight = layer.parametrizations.weight.original if effects else layer.weight
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    of_input = list(layer.input_effects)
    if noise.clean:
        plan = layer.clean_plan
        effects, of_input = ([e for e in found if e.hardware is False] for found in (effects, of_input))
    else:
        plan = layer.plan
    effects = [*effects, *of_input, *([layer.product] if plan.product is not None else [])]
    place = noise.place()
    tensors = [tensor for effect in effects for tensor in effect.tensors]
    # Without gradients the functions themselves: Dynamo does not trace an autograd.Function there.
    linear = TransformedLinear.apply if torch.is_grad_enabled() else transformed_linear
    return linear(plan, noise.observing, x, weight, layer.bias, *place, *tensors)


def _leave(layer: Any, y: Tensor) -> Tensor:
    """What follows the product over devices: the array, or the memory, has the sum of what they computed, not the parts."""
    whole = y.shape[1]
    y = type(layer).base_of_transformed.leave(layer, y)
    noise = layer.noise
    if noise.clean:
        return y
    after_sum = [layer.product] if layer.product is not None and layer.plan.product is None else []
    context, tokens = noise.place()
    if y.shape[1] != whole and (after_sum or len(layer.output_effects)):
        # Each device goes on with its part of the sequence.
        first = layer.tensor_rank * y.shape[1]
        if tokens is None:
            position = torch.arange(whole, device=y.device).expand(len(y), -1)
            sample = (context[2] + torch.arange(len(y), device=y.device))[:, None].expand(-1, whole)
            tokens = torch.stack([position, sample])
        tokens = tokens[:, :, first : first + y.shape[1]]
    return _through(noise, [*after_sum, *layer.output_effects], y, (context, tokens))


def _through(noise: Noise, effects: Sequence[Any], y: Tensor, place: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The effects on what a layer returns."""
    for effect in () if noise.clean else effects:
        if torch.is_grad_enabled():
            y = TransformedOutput.apply(effect.code, noise.observing, y, *place, *effect.tensors)
        else:
            y, _ = effect.code.through(y, effect.tensors, place, noise.observing)
    return y


def table(noise: Noise) -> Iterator[str]:
    """What was applied, as lines for people: transform, layers with their counts, parameters of the effect."""
    for number, row in enumerate(noise.applied, 1):
        attentions = f" and the products of {len(row.attentions)} attentions" if row.attentions else ""
        yield f"{number}. {row.kind}: {len(row.layers)} layers{attentions}; {row.parameters}"
        for names in (row.layers, row.attentions):
            for pattern, count in Counter(_NUMBERED.sub(r"\1*.", name) for name in names).items():
                yield f"   {count:4} x {pattern}{' (products)' if names is row.attentions else ''}"
