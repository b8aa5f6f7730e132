"""Whether what was applied also acts: one forward under watch.

A model of somebody else may multiply a layer's weight without calling the layer (Mamba does), keep another reference to it, or
never call a layer at all. Effects on such a layer would be listed and do nothing. During an audit every effect that runs
reports itself, and every operation that reads the stored weight of a layer whose weight has effects is noticed, unless it is
a view or belongs to the effects. Whatever did not act, or was read around its effects, is an error (`check`).

A model may also multiply weights that are no parameters: buffers, flat vectors, modules and tensors that it keeps from torch.
`Origins` knows of every tensor whether it was computed from the batch, and notices constants that enter products.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transforms.context import Noise
from transforms.experts import EXPERTS, without_expert
from transforms.layers import is_transformed, stored_weight, weight_effects
from transforms.origins import Origins
from transforms.selection import TransformError

_ROLES = {"w": "weights", "x": "inputs", "out": "outputs", "acc": "partial sums", "q": "queries", "k": "keys"}
_ROLES |= {"v": "values", "p": "probabilities", "scores": "scores", "context": "weighted values"}
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Audit(TorchDispatchMode):
    """Notes which effects act, which stored weights are read by anything else, and which constants enter products.

    Args:
        given: the tensors that the model is given.
    """

    def __init__(self, model: nn.Module, given: Iterable[Tensor] = ()):
        super().__init__()
        self.read: dict[str, str] = {}
        """Operation that read the stored weight of a layer, by the layer's name."""
        self.called: set[nn.Module] = set()
        """Layers that were called; the weights of others may have been read through their effects."""
        self.origins = Origins(given)
        self._acted: set[int] = set()
        self._depth = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._shown: dict[int, tuple[Any, Tensor]] = {}
        self._stored: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        self._embeddings: set[str] = set()
        holders: dict[int, list[nn.Module]] = defaultdict(list)
        for module in model.modules():
            if not (isinstance(module, ParametrizationList) or is_transformed(module) or hasattr(module, EXPERTS)):
                for p in module._parameters.values():
                    holders[id(p)].append(module)
        for name, module in model.named_modules():
            for part, parameter, weight in _under_effects(module):
                # A weight that another layer holds, too (tied heads), is read there as it should be.
                if any(isinstance(other, nn.Linear) for other in holders[id(parameter)]):
                    continue
                if type(weight) not in (Tensor, nn.Parameter):
                    continue  # packed weights may have no storage
                self._stored[weight.untyped_storage().data_ptr()].append((*_bytes_of(weight), name + part))
                if any(isinstance(other, nn.Embedding) for other in holders[id(parameter)]):
                    self._embeddings.add(name + part)

    def acted(self, effect: Any) -> bool:
        return id(effect) in self._acted

    def ran(self, effects: Iterable[Any]) -> None:
        self._acted.update(map(id, effects))

    @contextmanager
    def acting(self, effects: Iterable[Any]) -> Iterator[None]:
        """These effects act inside, where stored weights are read with good reason."""
        self.ran(effects)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def shows(self, layer: Any, weight: Tensor) -> None:
        """A layer's weight with its effects was asked for. They act once it is multiplied: its dtype alone is often asked."""
        if type(weight) in (Tensor, nn.Parameter):
            self._shown[weight.untyped_storage().data_ptr()] = layer, weight

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self._depth and not func.is_view:
            for value in tree_leaves((args, kwargs)):
                if type(value) in (Tensor, nn.Parameter):
                    self._note(value, func)
        result = func(*args, **(kwargs or {}))
        self.origins.follow(func, args, kwargs, result, of_effects=self._depth > 0)
        return result

    def _note(self, value: Tensor, operation: Any) -> None:
        place = value.untyped_storage().data_ptr()
        if place in self._shown:
            layer, _ = self._shown[place]
            self.ran(layer.parametrizations.weight)
            if _around_product(layer):
                self.read.setdefault(self._names[layer], str(operation))
        candidates = self._stored.get(place)
        if not candidates or not value.numel():
            return
        begin, end = _bytes_of(value)
        for first, last, name in candidates:
            looked_up = name in self._embeddings and "embedding" in str(operation)
            if begin < last and first < end and not looked_up:
                self.read.setdefault(name, str(operation))


def _under_effects(module: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The stored weights of a module that multiplies under hardware: (end of its name, parameter, its part with effects)."""
    if is_transformed(module) and hasattr(module, "input_effects") and _on_hardware(module):
        weight = stored_weight(module)
        if isinstance(weight, nn.Parameter):
            yield "", weight, weight
    for name, experts in getattr(module, EXPERTS, nn.ModuleDict()).items():
        parameter: Any = module._parameters[name]
        for number, expert in experts.items():
            if _on_hardware(expert):
                yield f".{name}.{number}", parameter, parameter.detach()[int(number)]


def _on_hardware(layer: Any) -> bool:
    """Whether any effect of a layer but an adapter acts."""
    return any(effect.hardware for effect in weight_effects(layer)) or _around_product(layer)


def _around_product(layer: Any) -> bool:
    """Whether a layer has effects that only act where it is called: on inputs, sums or outputs."""
    return bool(len(layer.input_effects) or len(layer.output_effects) or layer.product is not None)


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte of a tensor and of the one after its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check(audit: Audit, noise: Noise) -> None:
    """
    Raises:
        TransformError: an effect did not act, or a stored weight was read around its effects.
    """
    for name, effect in _idle(audit, noise.effects):
        raise TransformError(
            f"{name}: the effect on its {_ROLES.get(effect.role, effect.role)} never acted in a forward: the model does not "
            f"call this layer, or multiplies its weight by itself. {_advice(noise, effect.transform, [name])}",
            effect.transform,
        )
    for name, operation in audit.read.items():
        index = next((e.transform for e in noise.effects if e.name.startswith(name)), 0)
        raise TransformError(
            f"{name}: the model reads its stored weight around the effects of this layer (in {operation}). "
            f"{_advice(noise, index, [name])}",
            index,
        )


def _idle(audit: Audit, effects: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(name of the layer, effect) of every effect that did not act.

    Few of a block's experts see a token of a short text: one that acted speaks for those that differ from it in the expert's
    number only.
    """
    alike: dict[tuple[str, str, str], list[Any]] = defaultdict(list)
    for effect in effects:
        alike[without_expert(effect.name), effect.role, effect.stream].append(effect)
    for group in alike.values():
        if not any(audit.acted(effect) for effect in group):
            yield group[0].name.removesuffix(".weight"), group[0]


def _advice(noise: Noise, index: int, bad: list[str]) -> str:
    """The patterns of the layers that a transform could have instead."""
    row = noise.applied_of(index)
    kinds = {_NUMBERS.sub("*", name) for name in bad}
    others = dict.fromkeys(_NUMBERS.sub("*", name) for name in row.layers)
    left = [f'"{name}"' for name in others if name not in kinds]
    return f"Leave it out: modules = [{', '.join(left)}]" if left else "Leave it out of modules"
