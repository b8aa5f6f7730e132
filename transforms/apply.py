"""From `[[transforms]]` tables to a model whose linear layers pass through hardware effects, in place.

Each effect on a weight is declared as a `torch.nn.utils.parametrize` parametrization: `layer.weight` shows the weight as
the hardware has it, the stored one stays `layer.parametrizations.weight.original`. The layer computes with all its
effects as one operation (`transforms/linear.py`). All transformed layers of one kind share one class, where parametrize
would make a class each: compiled code depends on the class, and torch.compile gives up at the ninth.
"""

from __future__ import annotations

import difflib
import fnmatch
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

from transforms.bitflip import Bitflip, bit_probabilities
from transforms.context import Noise
from transforms.linear import Plan, TransformedLinear, TransformedOutput, transformed_linear
from transforms.lora import LowRank
from transforms.specs import BitflipSpec, CellFaults, LoraSpec

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_NUMBERED = re.compile(r"(^|\.)\d+\.")


class TransformError(ValueError):
    """A transform cannot be applied to this model; `index` is its place in the list."""

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


@dataclass(frozen=True)
class Applied:
    """One row of the table of what was applied."""

    kind: str
    layers: list[str]
    parameters: str


def apply(model: nn.Module, specs: Sequence[BitflipSpec | LoraSpec], seed: int) -> Noise:
    """Put the transforms on a model's layers, in the order given but adapters first, and return their shared state.

    The effects' tables are made on the CPU (or on meta, where that is the default device): move the model, call
    `Noise.fill` where `to_empty` has moved it, and `Noise.begin` before each forward.

    Raises:
        TransformError: a pattern matches nothing, or a layer that cannot be transformed; the model is as before then.
    """
    if specs and any(is_transformed(module) for module in model.modules()):
        raise TransformError("the model is transformed already: call transforms.apply.remove first", 0)
    matched = [match(model, spec, index) for index, spec in enumerate(specs)]
    noise = Noise(seed)
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
        for name, layer in layers:
            _transform(layer, name, spec, noise, stream)
        noise.applied.append(Applied(spec.kind, [name for name, _ in layers], _parameters(spec)))
    noise.fill()
    return noise


def match(model: nn.Module, spec: BitflipSpec | LoraSpec, index: int = 0) -> list[tuple[str, nn.Module]]:
    """The (Hugging Face name, layer) pairs that a transform is for.

    Raises:
        TransformError: as `apply`.
    """
    modules = {_WRAPPERS.sub("", name): module for name, module in model.named_modules()}
    found: dict[str, nn.Module] = {}
    if not spec.modules:
        found = {name: m for name, m in modules.items() if _NUMBERED.search(name) and _is_linear(m)}
        if not found:
            raise TransformError("the model has no linear layer inside numbered blocks: name the layers", index)
    for pattern in spec.modules:
        regex = re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
        named = {name: module for name, module in modules.items() if name and regex.fullmatch(name)}
        linear = {name: module for name, module in named.items() if _is_linear(module)}
        if not named:
            near = difflib.get_close_matches(pattern, [name for name, m in modules.items() if _is_linear(m)], 1, 0.3)
            hint = f"; the nearest layer is {near[0]!r}" if near else ""
            raise TransformError(f"{pattern!r} matches no layer{hint}", index)
        if not linear:
            kinds = ", ".join(sorted({type(module).__name__ for module in named.values()}))
            raise TransformError(f"{pattern!r} matches no linear layer, only {kinds}", index)
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


def remove(model: nn.Module) -> None:
    """Take all transforms off again: the stored weights stay, adapters are dropped, what they froze stays frozen."""
    for module in model.modules():
        if is_transformed(module):
            module.__class__ = type(module).base_of_transformed
            if is_parametrized(module):
                weight = module.parametrizations.weight.original
                del module.parametrizations
                others = dict(module._parameters)
                module._parameters.clear()
                module._parameters |= {"weight": weight, **others}  # in the order of before
            for name in ("input_effects", "output_effects", "noise", "plan", "clean_plan"):
                delattr(module, name)


def is_transformed(module: nn.Module) -> bool:
    return hasattr(type(module), "base_of_transformed")


def _base(module: nn.Module) -> type:
    return getattr(type(module), "base_of_transformed", type(module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _base(module).__name__ == "Conv1D"


def _transform(layer: Any, name: str, spec: BitflipSpec | LoraSpec, noise: Noise, stream: str) -> None:
    """Add one transform to one layer."""
    if not is_transformed(layer):
        layer.input_effects, layer.output_effects = nn.ModuleList(), nn.ModuleList()
        layer.noise = noise
    base = _base(layer)
    transposed = base.__name__ == "Conv1D"
    if isinstance(spec, LoraSpec):
        weight = layer.weight
        _on_weight(layer, LowRank(weight, spec.rank, spec.alpha, transposed))
    else:
        first_row, first_column, columns = _window(layer)
        windows = {"w": (first_row, first_column, columns), "x": (0, first_column, 0), "out": (0, first_row, 0)}
        weight_effect = _bitflip(noise, f"{name}.weight", "w", spec, spec.weight, stream, windows["w"], transposed)
        if weight_effect is not None:
            _on_weight(layer, weight_effect)
        for effects, role, faults in (
            (layer.input_effects, "x", spec.input),
            (layer.output_effects, "out", spec.output),
        ):
            effect = _bitflip(noise, name, role, spec, faults, stream, windows[role])
            if effect is not None:
                effects.append(effect)
    layer.__class__ = transformed_class(base, is_parametrized(layer))
    of_weight = list(layer.parametrizations.weight) if is_parametrized(layer) else []
    layer.plan = _plan(of_weight, layer.input_effects, transposed)
    layer.clean_plan = _plan([effect for effect in of_weight if not effect.hardware], [], transposed)


def _window(layer: Any) -> tuple[int, int, int]:
    """(first row, first column, columns of the whole) of the part of a weight that this device holds; zeros where it is
    the whole, as far as hardware is concerned: what FSDP gathers before the forward does not count."""
    weight = layer.parametrizations.weight.original if is_parametrized(layer) else layer.weight
    if not isinstance(weight, DTensor):
        return 0, 0, 0
    _, (row, column) = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    return row, column, weight.shape[1]


def _on_weight(layer: Any, effect: nn.Module) -> None:
    """Declare an effect on a weight; the class that parametrize makes is replaced by the shared one."""
    layer.__class__ = _base(layer) if not is_parametrized(layer) else layer.__class__
    register_parametrization(layer, "weight", effect, unsafe=True)


def _bitflip(
    noise: Noise,
    name: str,
    role: str,
    spec: BitflipSpec,
    faults: CellFaults | None,
    stream: str,
    window: tuple[int, int, int],
    transposed: bool = False,
) -> Bitflip | None:
    if faults is None:
        return None
    probabilities = bit_probabilities(spec.storage, faults.sign_exponent, faults.mantissa, faults.bits)
    persistent, stuck = spec.lifetime == "persistent", spec.fault == "stuck_at"
    return Bitflip(
        noise,
        name,
        role,
        spec.storage,
        probabilities,
        faults.zero_above,
        persistent,
        stuck,
        stream,
        transposed,
        window=window,
    )


def _plan(of_weight: Sequence[Any], of_input: Sequence[Any], transposed: bool) -> Plan:
    return Plan(
        tuple(effect.code for effect in of_weight),
        tuple(len(effect.tensors) for effect in of_weight),
        tuple(effect.code for effect in of_input),
        tuple(len(effect.tensors) for effect in of_input),
        transposed,
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
    return _through_memory(layer, _multiply(layer, x), layer.noise.place())


def _multiply(layer: Any, x: Tensor) -> Tensor:
    """The product of a transformed layer, of its part of the weight: x (..., in) -> (..., out)."""
    noise = layer.noise
    effects = list(layer.parametrizations.weight) if "parametrizations" in layer._modules else []
    weight = layer.parametrizations.weight.original if effects else layer.weight
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    if noise.clean:
        plan = layer.clean_plan
        effects = [effect for effect in effects if not effect.hardware]
    else:
        plan = layer.plan
        effects = [*effects, *layer.input_effects]
    place = noise.place()
    tensors = [tensor for effect in effects for tensor in effect.tensors]
    # Without gradients the functions themselves: Dynamo does not trace an autograd.Function there.
    linear = TransformedLinear.apply if torch.is_grad_enabled() else transformed_linear
    return linear(plan, x, weight, layer.bias, *place, *tensors)


def _leave(layer: Any, y: Tensor) -> Tensor:
    """What follows the product over devices; memory holds the sum of what they computed, not the parts."""
    whole = y.shape[1]
    y = type(layer).base_of_transformed.leave(layer, y)
    context, tokens = layer.noise.place()
    if y.shape[1] != whole and len(layer.output_effects) and not layer.noise.clean:
        # Each device goes on with its part of the sequence.
        first = layer.tensor_rank * y.shape[1]
        if tokens is None:
            position = torch.arange(whole, device=y.device).expand(len(y), -1)
            sample = (context[2] + torch.arange(len(y), device=y.device))[:, None].expand(-1, whole)
            tokens = torch.stack([position, sample])
        tokens = tokens[:, :, first : first + y.shape[1]]
    return _through_memory(layer, y, (context, tokens))


def _through_memory(layer: Any, y: Tensor, place: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """The effects on what a layer returns."""
    for effect in () if layer.noise.clean else layer.output_effects:
        if torch.is_grad_enabled():
            y = TransformedOutput.apply(effect.code, y, *place, *effect.tensors)
        else:
            y = effect.code.forward(y, *effect.tensors, *place)
    return y


def table(noise: Noise) -> Iterator[str]:
    """What was applied, as lines for people: transform, layers with their counts, parameters of the effect."""
    for number, row in enumerate(noise.applied, 1):
        counts = Counter(_NUMBERED.sub(r"\1*.", name) for name in row.layers)
        yield f"{number}. {row.kind}: {len(row.layers)} layers; {row.parameters}"
        for pattern, count in counts.items():
            yield f"   {count:4} x {pattern}"


def _parameters(spec: BitflipSpec | LoraSpec) -> str:
    if isinstance(spec, LoraSpec):
        return f"rank {spec.rank}, alpha {spec.alpha:g}, all other parameters frozen"
    parts = [spec.lifetime, f"stored as {spec.storage}"] + (["stuck-at cells"] if spec.fault == "stuck_at" else [])
    for name, faults in (("weight", spec.weight), ("input", spec.input), ("output", spec.output)):
        if faults is None:
            continue
        probabilities = bit_probabilities(spec.storage, faults.sign_exponent, faults.mantissa, faults.bits)
        groups = (
            "p per bit"
            if faults.bits
            else f"p {faults.sign_exponent:.4g} sign and exponent, {faults.mantissa:.4g} mantissa"
        )
        cleared = f", 0 from {faults.zero_above:g}" if faults.zero_above else ""
        parts.append(f"{name}: {groups}{cleared} ({_hit_rate(probabilities):.3e} of the values hit)")
    return "; ".join(parts)


def _hit_rate(probabilities: Sequence[float]) -> float:
    missed = 1.0
    for p in probabilities:
        missed *= 1 - p
    return 1 - missed
