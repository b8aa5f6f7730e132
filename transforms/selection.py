"""Which layers and attentions of a model a transform is for, and which weights no transform reaches."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from transforms.experts import Slice, slices
from transforms.layers import base_of, is_linear
from transforms.specs import Hardware, LoraSpec, QuantiseSpec, matches, name_pattern

_WRAPPERS = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")
_NUMBERED = re.compile(r"(^|\.)\d+\.")
_LINEAR = ("Conv1D", "FalconLinear")
"""Classes of transformers, but for nn.Linear, whose forward is x W + b and nothing else."""
MOST_UNREACHED = 0.01
"""Share of the blocks' weights that the default selection may leave without effects."""

SMALLEST_HIDDEN = 0.001
"""Of the blocks' weights, a constant that is multiplied and listed; the frequencies of rotary embeddings are smaller."""


class TransformError(ValueError):
    """A transform cannot be applied to this model; `index` is its place in the list, `setting` what of it is to blame."""

    def __init__(self, message: str, index: int, setting: str = "modules"):
        super().__init__(message)
        self.index = index
        self.setting = f"transforms.{index}.{setting}".rstrip(".")


def match(model: nn.Module, spec: Hardware | LoraSpec, index: int = 0) -> list[tuple[str, Any]]:
    """The (Hugging Face name, layer) pairs that a transform is for; none where it is for attention only. An expert is a `Slice`.

    Raises:
        TransformError: as `apply`.
    """
    if not on_layers(spec):
        return []
    modules = {_WRAPPERS.sub("", name): module for name, module in model.named_modules()}
    linear: dict[str, Any] = {name: module for name, module in modules.items() if is_linear(module)}
    experts = [one for name, module in modules.items() for one in slices(name, module)]
    found: dict[str, Any] = {}
    if not spec.modules:
        found = {name: module for name, module in linear.items() if _NUMBERED.search(name)}
        if not isinstance(spec, LoraSpec) and not all(map(_multiplies_otherwise, found.values())):
            # Layers that compute something else are not chosen, and count as not reached; if all do, that is the error below.
            found = {name: m for name, m in found.items() if _in_float8(m) or not _multiplies_otherwise(m)}
        if not isinstance(spec, LoraSpec):
            found |= {name: part for _, name, part in experts if _NUMBERED.search(name)}
        if not found:
            raise TransformError("the model has no linear layer inside numbered blocks: name the layers", index)
    for pattern in spec.modules:
        named = name_pattern(pattern).fullmatch
        taken = {name: module for name, module in linear.items() if named(name)}
        taken |= {name: part for whole, name, part in experts if named(whole) or named(name)}
        if not taken:
            others = sorted({type(module).__name__ for name, module in modules.items() if name and named(name)})
            what = f"no linear layer, only {', '.join(others)}" if others else "no layer"
            candidates = [*linear, *dict.fromkeys(whole for whole, _, _ in experts)]
            raise TransformError(f"{pattern!r} matches {what}{_nearest(pattern, candidates)}", index)
        found |= taken
    if isinstance(spec, LoraSpec):
        stacked = [name for name, module in found.items() if isinstance(module, Slice)]
        if stacked:
            raise TransformError(
                f"{stacked[0]} is a part of a stacked parameter, which no adapter can be added to", index
            )
    found_layers = {name: module for name, module in found.items() if not isinstance(module, Slice)}
    for name, module in found_layers.items():
        if _multiplies_otherwise(module):
            raise TransformError(
                f"{name} is a {base_of(module).__name__}, which multiplies in its own way and would bypass the transform",
                index,
            )
    if isinstance(spec, LoraSpec):
        holders = Counter(id(parameter) for module in modules.values() for parameter in module._parameters.values())
        for name, module in found.items():
            if holders[id(module._parameters.get("weight"))] > 1:
                message = f"{name} shares its weight with another module: an adapter could not be merged into it"
                raise TransformError(message, index)
    return list(found.items())


def _multiplies_otherwise(module: nn.Module) -> bool:
    """Whether a subclass of a linear layer may compute something else."""
    kind = base_of(module)
    known = kind is nn.Linear or _of_transformers(kind) or hasattr(kind, "multiply")
    return not known or _in_float8(module)


def _of_transformers(kind: type) -> bool:
    """Whether a class is one of `_LINEAR`, and not another of the same name."""
    return kind.__name__ in _LINEAR and kind.__module__.startswith("transformers.")


def _in_float8(module: nn.Module) -> bool:
    return hasattr(module, "linear_mm_config")  # torchao's


def _nearest(pattern: str, layers: Sequence[str]) -> str:
    """A hint at the layer whose name, or a part of it, is nearest to a pattern that matches none."""
    parts: dict[str, str] = {}
    for name in layers:
        within = _NUMBERED.split(name)[-1]
        for part in (within.rpartition(".")[2], within.partition(".")[0], within, name):
            parts.setdefault(part, name)
    near = difflib.get_close_matches(pattern.removeprefix("re:").strip("*.^$"), parts, 1, 0.5)
    if not near:
        return ""
    layer = parts[near[0]]
    in_all_blocks = _NUMBERED.sub(r"\1*.", layer)
    return f'; the nearest layer is {layer!r}, as in modules = ["{in_all_blocks}"]'


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


@dataclass(frozen=True)
class Unreached:
    """Parameters of the blocks, alike but for the numbers of blocks, that no transform acts on."""

    pattern: str
    count: int
    share: float
    """Of all weights of the blocks: of their parameters with two and more dimensions."""


def weights_of_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of a model's blocks: their parameters with two and more dimensions."""
    for name, parameter in model.named_parameters():
        name = _WRAPPERS.sub("", name)
        if _NUMBERED.search(name) and sum(size > 1 for size in parameter.shape) > 1:
            yield name, parameter


def unreached(model: nn.Module, layers: Iterable[Any]) -> list[Unreached]:
    """The weights of a model's blocks that none of these layers and slices owns, the largest share first."""
    owned: Counter[int] = Counter()
    for layer in set(layers):
        if isinstance(layer, Slice):
            for name in (layer.parameter, f"{layer.parameter}_bias"):
                parameter = layer.experts._parameters.get(name)
                if parameter is not None:
                    owned[id(parameter)] += parameter.numel() // len(parameter)
        else:
            owned |= Counter({id(p): p.numel() for p in layer._parameters.values() if p is not None})
    total, left, counts = 0, Counter[str](), Counter[str]()
    for name, parameter in weights_of_blocks(model):
        total += parameter.numel()
        clean = parameter.numel() - owned[id(parameter)]
        if clean > 0:
            pattern = _NUMBERED.sub(r"\1*.", name)
            left[pattern] += clean
            counts[pattern] += 1
    return [Unreached(pattern, counts[pattern], clean / total) for pattern, clean in left.most_common()]


def with_hidden(model: nn.Module, left: Sequence[Unreached], hidden: Iterable[tuple[str, int]]) -> list[Unreached]:
    """What no transform reaches, with constants of (name, number of elements) that the model multiplies, too."""
    sizes, counts = Counter[str](), Counter[str]()
    total = sum(parameter.numel() for _, parameter in weights_of_blocks(model))
    for name, size in hidden:
        if size > SMALLEST_HIDDEN * total:
            pattern = _NUMBERED.sub(r"\1*.", name)
            sizes[pattern] += size
            counts[pattern] += 1
    whole = total + sum(sizes.values())
    found = [replace(one, share=one.share * total / whole) for one in left]
    found += [Unreached(pattern, counts[pattern], size / whole) for pattern, size in sizes.items()]
    return sorted(found, key=lambda one: -one.share)


def check_reach(specs: Sequence[Hardware | LoraSpec], left: Sequence[Unreached]) -> None:
    """
    Raises:
        TransformError: "every linear layer" would leave more than a hundredth of the blocks' weights as they are.
    """
    share = sum(one.share for one in left)
    if share <= MOST_UNREACHED:
        return
    for index, spec in enumerate(specs):
        if isinstance(spec, LoraSpec) or spec.modules or spec.unmatched == "keep" or not on_layers(spec):
            continue
        names = ", ".join(f"{one.pattern} ({one.share:.1%})" for one in left[:4])
        raise TransformError(
            f"{share:.1%} of the weights of the model's blocks are in no layer that is chosen by default (linear layers inside "
            f"numbered blocks, stacked experts), and would stay exact: {names}"
            f'{" ..." if len(left) > 4 else ""}. Name the layers in modules, or say unmatched = "keep" if that is what the '
            "hardware would do",
            index,
            "unmatched",
        )


def on_layers(spec: Hardware | LoraSpec) -> bool:
    """Whether a transform acts on linear layers, and not on attention only."""
    return not isinstance(spec, QuantiseSpec) or spec.weight is not None or spec.input is not None
