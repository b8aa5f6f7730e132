"""Where the tensors of a forward come from: from the batch, from constants that the model keeps, or from neither.

Every tensor that an operation makes takes after the operation's inputs: it is the batch's if any of them is; otherwise it is
made from the largest constant among them, if there is one; otherwise it is new (a mask, a range of positions). A tensor that
no operation has made was there before the forward, and is a constant. A storage stands for all its views.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_BATCH, _NEW = -1, 0
_OPERANDS = {"addmm": slice(1, 3), "addbmm": slice(1, 3), "baddbmm": slice(1, 3), "addmv": slice(1, 3)}
_OPERANDS |= {"convolution": slice(0, 2)}
_OPERANDS |= dict.fromkeys(("mm", "bmm", "mv", "dot", "_grouped_mm", "_scaled_mm", "_int_mm"), slice(0, 2))
"""Products, and which of their arguments are multiplied."""


class Origins:
    """Origins of tensors by their storage, and the constants that entered products.

    Args:
        given: the batch.
    """

    def __init__(self, given: Iterable[Tensor]):
        self._origin = dict.fromkeys(map(_place, given), _BATCH)
        self._size: dict[int, int] = {}
        self._multiplied: set[int] = set()

    def of_batch(self, value: Tensor) -> bool:
        """Whether a tensor was computed from the batch."""
        return self._of(value) == _BATCH

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any, of_effects: bool) -> None:
        """Take note of an operation that was run; what effects make of a constant is none any more."""
        inputs = _tensors((args, kwargs))
        origins = [self._of(value) for value in inputs]
        operands = _OPERANDS.get(func._overloadpacket.__name__)
        if operands is not None and not of_effects:
            self._multiplied.update(o for o in map(self._of, _tensors(args[operands])) if o > 0)
        if func.is_view:
            return
        made = _BATCH if _BATCH in origins else max(origins, key=lambda o: self._size.get(o, 0), default=_NEW)
        if of_effects and made != _BATCH:
            made = _NEW
        for value in _tensors(result):
            self._origin[_place(value)] = made

    def _of(self, value: Tensor) -> int:
        place = _place(value)
        if place not in self._origin:
            self._size[place] = value.untyped_storage().nbytes() // value.element_size()
            self._origin[place] = place
        return self._origin[place]

    def hidden(self, model: nn.Module) -> Iterator[tuple[str, int]]:
        """(name, number of elements) of every constant in a product that is no parameter of two or more dimensions."""
        weights = {_place(p) for p in _tensors([*model.parameters()]) if sum(size > 1 for size in p.shape) > 1}
        named = [*model.named_buffers(), *model.named_parameters()]
        names = {_place(tensor): name for name, tensor in named if _tensors(tensor)}
        for place in sorted(self._multiplied - weights):
            yield names.get(place, "a tensor that is neither a parameter nor a buffer"), self._size[place]


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> list[Tensor]:
    """The plain tensors among some values: those of other classes, packed weights for instance, may have no storage."""
    return [value for value in tree_leaves(values) if type(value) in (Tensor, nn.Parameter) and value.numel()]
