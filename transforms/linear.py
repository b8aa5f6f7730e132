"""A linear layer whose operands pass through hardware effects, as one operation.

    y = A( T_x(x) T_w(W)^T ) + b

saves x, W and the noise context for its backward, the very tensors that a clean linear keeps alive (and a bit for each
element that a converter A may clip), and draws the noisy operands again there. No noisy weight outlives a forward, and no
noisy input is kept for q, k and v each. Gradients are those of the operands that the hardware multiplied (`T_x(x)` for the
weight, `T_w(W)` for the input), passed back through every effect by its own rule.

Compiled, forward and backward are traced into the block's graphs. The backward's effects take the context through an
operation that also takes the gradient: nothing of them can be computed before the backward, so the partitioner cannot
choose to compute them in the forward and keep the result (measured without this: 1.7 times the bytes of a clean block).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from transforms.effect import Code, Notes, Slots, after, made_again, saved, separate
from transforms.product import Place, ProductCode, pack, unpack
from transforms.quantise import passing

Tensors: TypeAlias = Sequence[Tensor]


@dataclass(frozen=True)
class Plan:
    """Effects on the operands of one layer, in order; each takes the next of the `counts` tensors."""

    weight: tuple[Code, ...]
    weight_counts: tuple[int, ...]
    input: tuple[Code, ...]
    input_counts: tuple[int, ...]
    transposed: bool
    """The weight is stored (in, out), as in GPT-2's Conv1D."""
    product: ProductCode | None = None
    """What multiplies them, where it is not exact; it takes the remaining tensors."""
    noted: frozenset[int] = frozenset()
    """Which of the tensors forwards write to."""
    stays: tuple[tuple[bool, ...], ...] | None = None
    """Where gradients use the operands as they are without hardware: of each effect on weight and input, whether it stays."""

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Tensors], list[Tensors], Tensors]:
        """The tensors of each of the weight's effects, of each of the input's, and of the product."""
        groups, start = [], 0
        for count in (*self.weight_counts, *self.input_counts):
            groups.append(tensors[start : start + count])
            start += count
        return groups[: len(self.weight)], groups[len(self.weight) :], tensors[start:]


def transformed_linear(
    plan: Plan,
    observing: bool,
    non_finite: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    tokens: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """The forward alone: x (..., in) -> (..., out). `tensors` are those of the weight's effects, the input's, the product's.

    Args:
        observing, non_finite: as `Notes` has them.
    """
    return _forward(plan, Notes(observing, non_finite), x, weight, bias, (context, tokens), tensors)[0]


def _forward(
    plan: Plan, notes: Notes, x: Tensor, weight: Tensor, bias: Tensor | None, place: Place, tensors: Tensors
) -> tuple[Tensor, Tensor | None]:
    """(..., out), and what the product's backward needs to know."""
    of_weight, of_input, of_product = plan.split(tensors)
    weight = _after(plan.weight, of_weight, weight.t() if plan.transposed else weight, place, notes)
    x = _after(plan.input, of_input, x, place, notes)
    if plan.product is None:
        return F.linear(x, weight, bias), None
    y, kept = plan.product.multiply(x, weight, of_product, place, notes.observing)
    return y if bias is None else y + bias, kept


def _after(codes: Sequence[Code], tensors: Sequence[Tensors], value: Tensor, place: Place, notes: Notes) -> Tensor:
    for code, own in zip(codes, tensors):
        notes.take(code, value, own, place)
        value = code.forward(value, *own, *place)
    return value


class TransformedLinear(torch.autograd.Function):
    """`transformed_linear` with its gradient; see the head of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        observing: bool,
        non_finite: Tensor | None,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        context: Tensor | None,
        tokens: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.plan = plan
        y, kept = _forward(plan, Notes(observing, non_finite), x, weight, bias, (context, tokens), tensors)
        ctx.save_for_backward(x, weight, context, tokens, kept, *saved(tensors, plan.noted))
        return separate(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        plan = ctx.plan
        x, weight, context, tokens, kept, *tensors = ctx.saved_tensors
        if torch.compiler.is_compiling():
            context = context if context is None else after(context, grad)
            tensors = [after(t, grad) if t is not None and t.requires_grad else t for t in tensors]
            weight = made_again(weight, grad) if any(code.hoistable for code in plan.weight) else weight
            x = made_again(x, grad) if any(code.hoistable for code in plan.input) else x
        of_weight, of_input, of_product = plan.split(tensors)
        place = (context, tokens)
        weight_stays, input_stays = plan.stays or (None, None)
        weight = weight.t() if plan.transposed else weight
        weight, chosen_weight, pull_weight = _regenerate(plan.weight, of_weight, weight, place, weight_stays)
        x, chosen_x, pull_input = _regenerate(plan.input, of_input, x, place, input_stays)

        num_weight, num_input = sum(plan.weight_counts), sum(plan.input_counts)
        needs = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        tensor_grads: list[Tensor | None] = [None] * len(tensors)
        if plan.product is None:
            of_x, of_w = _gradients(grad, chosen_x, chosen_weight)
        else:
            operands = (x, weight), (chosen_x, chosen_weight)
            of_x, of_w = plan.product.gradients(grad, *operands, kept, of_product, place)
        needs_x, needs_weight, needs_bias = needs[3:6]
        first = 8  # of the effects' tensors among the arguments
        if needs_x or any(needs[first + num_weight : first + num_weight + num_input]):
            grad_x, tensor_grads[num_weight : num_weight + num_input] = pull_input(of_x())
        if needs_weight or any(needs[first : first + num_weight]):
            grad_weight, tensor_grads[:num_weight] = pull_weight(of_w())
            grad_weight = (grad_weight.t() if plan.transposed else grad_weight) if needs_weight else None
        if needs_bias:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return None, None, None, grad_x, grad_weight, grad_bias, None, None, *tensor_grads


def _gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Functions that give the gradients of x (..., in) and of the weight of an exact product."""
    flat = grad.reshape(-1, grad.shape[-1])
    return lambda: grad @ weight, lambda: flat.t() @ x.reshape(-1, x.shape[-1])


def _regenerate(
    codes: Sequence[Code],
    tensors: Sequence[Tensors],
    value: Tensor,
    place: Place,
    stays: tuple[bool, ...] | None = None,
) -> tuple[Tensor, Tensor, Callable[[Tensor], tuple[Tensor, list[Tensor | None]]]]:
    """An operand after all its effects; the one that gradients use, after those that stay without hardware or all; and the
    way of its gradient back through all of them, with those of their tensors."""
    pulls: list[tuple[Callable[[Tensor], Any], int]] = []
    chosen, parted = value, False
    for i, (code, own) in enumerate(zip(codes, tensors)):
        value, pull = code.regenerate(value, *own, *place)
        pulls.append((pull, len(own)))
        if stays is not None and not stays[i]:
            parted = True
        elif not parted:
            chosen = value
        else:
            chosen = code.forward(chosen, *own, *place)

    def pull_back(grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        grads: list[Tensor | None] = []
        for pull, count in reversed(pulls):
            found = pull(grad)
            grad, own = found if isinstance(found, tuple) else (found, [None] * count)
            grads = [*own, *grads]
        return grad, grads

    return value, chosen, pull_back


def output_effect(
    code: Any, notes: Notes, y: Tensor, place: tuple[Tensor | None, Tensor | None], own: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What an effect makes of what a layer returns, and which elements its gradient passes."""
    notes._replace(observing=False).take(code, y, own, place)  # `through` observes by itself, in its kernel
    return code.through(y, own, place, notes.observing)


class TransformedOutput(torch.autograd.Function):
    """An effect on what a layer returns; saves one bit of each element where its gradient depends on that."""

    @staticmethod
    def forward(
        ctx: Any,
        code: Any,
        observing: bool,
        non_finite: Tensor | None,
        y: Tensor,
        context: Tensor,
        tokens: Tensor | None,
        *own: Tensor,
    ) -> Tensor:
        found, kept = output_effect(code, Notes(observing, non_finite), y, (context, tokens), own)
        strength = code.read(own).strength if isinstance(code, Slots) else None
        ctx.save_for_backward(None if kept is None else pack(kept), strength)
        return separate(found)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        packed, strength = ctx.saved_tensors
        if packed is not None:
            grad = passing(grad, unpack(packed, grad.shape[-1]), strength)
        return None, None, None, grad, None, None, *(None for _ in ctx.needs_input_grad[6:])
