"""Whether what was applied also acts: one forward under watch.

A model of somebody else may multiply a layer's weight without calling the layer (Mamba does), keep another reference to it, or
never call a layer at all. Effects on such a layer would be listed and do nothing. During an audit every effect that runs
reports itself, and every operation that reads the stored weight of a layer whose weight has effects is noticed, unless it is
a view or belongs to the effects. Whatever did not act, or was read around its effects, is an error (`check`).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transforms.context import Noise
from transforms.experts import EXPERTS, without_expert
from transforms.selection import TransformError

_ROLES = {"w": "weights", "x": "inputs", "out": "outputs", "acc": "partial sums", "q": "queries", "k": "keys"}
_ROLES |= {"v": "values", "p": "probabilities", "scores": "scores", "context": "weighted values"}
_NUMBERS = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Audit(TorchDispatchMode):
    """Notes which effects act, and which stored weights are read by anything else."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.read: dict[str, str] = {}
        """Operation that read the stored weight of a layer, by the layer's name."""
        self.called: set[nn.Module] = set()
        """Layers that were called; the weights of others may have been read through their effects."""
        self._acted: set[int] = set()
        self._depth = 0
        self._stored: dict[int, list[tuple[int, int, str]]] = defaultdict(list)
        holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        for name, module in model.named_modules():
            for part, parameter, weight in _under_effects(module):
                # A weight that another module holds, too (tied embeddings), is read there as it should be.
                if holders[id(parameter)] == 1:
                    self._stored[weight.untyped_storage().data_ptr()].append((*_bytes_of(weight), name + part))

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

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if not self._depth and not func.is_view:
            for value in tree_leaves((args, kwargs)):
                if type(value) in (Tensor, nn.Parameter):
                    self._note(value, str(func))
        return func(*args, **(kwargs or {}))

    def _note(self, value: Tensor, operation: str) -> None:
        candidates = self._stored.get(value.untyped_storage().data_ptr())
        if not candidates or not value.numel():
            return
        begin, end = _bytes_of(value)
        for first, last, name in candidates:
            if begin < last and first < end:
                self.read.setdefault(name, operation)


def _under_effects(module: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The stored weights of a module on which hardware effects act: (end of its name, parameter, its part with effects)."""
    if is_parametrized(module, "weight") and any(e.hardware for e in module.parametrizations.weight):
        weight = module.parametrizations.weight.original
        yield "", weight, weight
    for name, experts in getattr(module, EXPERTS, nn.ModuleDict()).items():
        parameter: Any = module._parameters[name]
        for number, expert in experts.items():
            if len(expert.weight_effects):
                yield f".{name}.{number}", parameter, parameter.detach()[int(number)]


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
            f"{name}: the model reads its stored weight around the effects on it (in {operation}). "
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
