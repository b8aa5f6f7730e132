"""A linear layer whose operands pass through hardware effects, as one operation.

    y = T_x(x) T_w(W)^T + b

saves x, W and the noise context for its backward, the very tensors that a clean linear keeps alive, and draws the noisy
operands again there. No noisy weight outlives a forward, and no noisy input is kept for q, k and v each. Gradients are
those of the operands that the hardware multiplied (`T_x(x)` for the weight, `T_w(W)` for the input), passed back
through every effect by its own rule.

Compiled, forward and backward are traced into the block's graphs. The backward's effects take the context through an
operation that also takes the gradient: nothing of them can be computed before the backward, so the partitioner cannot
choose to compute them in the forward and keep the result (measured without this: 1.7 times the bytes of a clean block).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("newcompute", "DEF")
_library.define("after(Tensor context, Tensor other) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("after", lambda context, other: context.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("newcompute::after", lambda context, other: torch.empty_like(context), lib=_library)


class Code(Protocol):
    """The pure functions of an effect, and all that compiled code may depend on: equal codes share compiled code.

    `rest` are the effect's own tensors, the context and the tokens.
    """

    saves_value: bool
    """Whether the gradient depends on the value."""

    def forward(self, value: Tensor, *rest: Any) -> Tensor: ...

    def regenerate(self, value: Tensor, *rest: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """The result again, and the function from its gradient to that of `value`: alone, or with a list of those of
        the effect's own tensors."""
        ...


@dataclass(frozen=True)
class Plan:
    """Effects on the operands of one layer, in order; each takes the next of the `counts` tensors."""

    weight: tuple[Code, ...]
    weight_counts: tuple[int, ...]
    input: tuple[Code, ...]
    input_counts: tuple[int, ...]
    transposed: bool
    """The weight is stored (in, out), as in GPT-2's Conv1D."""

    def split(self, tensors: Sequence[Tensor]) -> tuple[list[Sequence[Tensor]], list[Sequence[Tensor]]]:
        """The tensors of each of the weight's effects and of each of the input's."""
        groups, start = [], 0
        for count in (*self.weight_counts, *self.input_counts):
            groups.append(tensors[start : start + count])
            start += count
        return groups[: len(self.weight)], groups[len(self.weight) :]


def transformed_linear(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    context: Tensor | None,
    tokens: Tensor | None,
    *tensors: Tensor,
) -> Tensor:
    """The forward alone: x (..., in) -> (..., out). `tensors` are those of the weight's effects, then of the input's."""
    of_weight, of_input = plan.split(tensors)
    weight = weight.t() if plan.transposed else weight
    for code, own in zip(plan.weight, of_weight):
        weight = code.forward(weight, *own, context, tokens)
    for code, own in zip(plan.input, of_input):
        x = code.forward(x, *own, context, tokens)
    return F.linear(x, weight, bias)


class TransformedLinear(torch.autograd.Function):
    """`transformed_linear` with its gradient; see the head of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        context: Tensor | None,
        tokens: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.plan = plan
        ctx.save_for_backward(x, weight, context, tokens, *tensors)
        return transformed_linear(plan, x, weight, bias, context, tokens, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        plan = ctx.plan
        x, weight, context, tokens, *tensors = ctx.saved_tensors
        if torch.compiler.is_compiling() and context is not None:
            context = torch.ops.newcompute.after(context, grad)
            tensors = [torch.ops.newcompute.after(t, grad) if t.requires_grad else t for t in tensors]
        of_weight, of_input = plan.split(tensors)
        weight, pull_weight = _regenerate(
            plan.weight, of_weight, weight.t() if plan.transposed else weight, (context, tokens)
        )
        x, pull_input = _regenerate(plan.input, of_input, x, (context, tokens))

        num_weight_tensors = sum(plan.weight_counts)
        needs = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        tensor_grads: list[Tensor | None] = [None] * len(tensors)
        flat = grad.reshape(-1, grad.shape[-1])
        if needs[1]:
            grad_x, tensor_grads[num_weight_tensors:] = pull_input(grad @ weight)
        if needs[2] or any(needs[6 : 6 + num_weight_tensors]):
            grad_weight, tensor_grads[:num_weight_tensors] = pull_weight(flat.t() @ x.reshape(-1, x.shape[-1]))
            grad_weight = (grad_weight.t() if plan.transposed else grad_weight) if needs[2] else None
        if needs[3]:
            grad_bias = flat.sum(0)
        return None, grad_x, grad_weight, grad_bias, None, None, *tensor_grads


def _regenerate(
    codes: Sequence[Code],
    tensors: Sequence[Sequence[Tensor]],
    value: Tensor,
    place: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, list[Tensor | None]]]]:
    """An operand after all its effects, and the way of its gradient back through them, with those of their tensors."""
    pulls = []
    for code, own in zip(codes, tensors):
        value, pull = code.regenerate(value, *own, *place)
        pulls.append((pull, len(own)))

    def pull_back(grad: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        grads: list[Tensor | None] = []
        for pull, count in reversed(pulls):
            found = pull(grad)
            grad, own = found if isinstance(found, tuple) else (found, [None] * count)
            grads = [*own, *grads]
        return grad, grads

    return value, pull_back


class TransformedOutput(torch.autograd.Function):
    """An effect on what a layer returns. Saves that only where the effect's gradient depends on it."""

    @staticmethod
    def forward(ctx: Any, code: Code, y: Tensor, context: Tensor, tokens: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.code = code
        ctx.save_for_backward(y if code.saves_value else None, context, tokens, *tensors)
        return code.forward(y, *tensors, context, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        y, context, tokens, *tensors = ctx.saved_tensors
        if y is not None:
            if torch.compiler.is_compiling():
                context = torch.ops.newcompute.after(context, grad)
            _, pull = ctx.code.regenerate(y, *tensors, context, tokens)
            grad = pull(grad)
        return None, grad, None, None, *(None for _ in tensors)
