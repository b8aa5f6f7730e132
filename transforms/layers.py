"""What transformed layers and attentions do when they are called.

A layer with effects keeps its class but for its forward: all transformed layers of one kind share one class, since compiled
code depends on the class. It computes with all its effects as one operation (`transforms/linear.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transforms.attention import TransformedAttention, transformed_attention
from transforms.context import Noise
from transforms.effect import Notes
from transforms.experts import Expert
from transforms.linear import TransformedLinear, TransformedOutput, output_effect, transformed_linear
from transforms.operands import tokens_of_heads

Place: TypeAlias = tuple[Tensor | None, Tensor | None]
"""Context and tokens of a forward, as `Noise.place` gives them."""


def is_transformed(module: nn.Module) -> bool:
    """Whether a linear layer or an attention of ours has effects."""
    return hasattr(type(module), "base_of_transformed")


def base_of(module: nn.Module) -> type:
    """The class that a layer has without effects."""
    return getattr(type(module), "base_of_transformed", type(module))


def is_linear(module: nn.Module) -> bool:
    """Whether effects could act on a module: a linear layer, or GPT-2's Conv1D, which stores its weight (in, out)."""
    return isinstance(module, nn.Linear) or base_of(module).__name__ == "Conv1D"


@cache
def transformed_attention_class(base: type) -> type:
    return type(f"Transformed{base.__name__}", (base,), {"base_of_transformed": base, "products": _products})


def _products(attention: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The products of a transformed attention: q (B, H, T, E), k and v (B, K, S, E) -> (B, H, T, E)."""
    if attention.noise.clean:
        return type(attention).base_of_transformed.products(attention, q, k, v, mask)
    return run_attention(attention, q, k, v, mask, q.shape[-1] ** -0.5)


def run_attention(
    attention: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """The products of an attention that has effects.

    Args:
        softcap: magnitude that scaled scores stay below; 0: none.
        sinks: (H,), the score of each head's sink.
    """
    noise, effects = attention.noise, attention.attention_effects
    plan = replace(effects.plan, softcap=softcap) if softcap else effects.plan
    arguments = (plan, noise.observing, scale, q, k, v, mask, *noise.place(), noise.keys)
    run = TransformedAttention.apply if torch.is_grad_enabled() else transformed_attention
    if noise.audit is not None:
        with noise.audit.acting(effects.in_order):
            return run(*arguments, *effects.tensors, noise.non_finite, sinks)
    return run(*arguments, *effects.tensors, noise.non_finite, sinks)


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
        namespace["multiply" if hasattr(base, "multiply") else "forward"] = forward
    if parametrized:
        namespace["weight"] = property(_effective_weight)
        namespace["__setattr__"] = _set_original
    return type(f"Transformed{base.__name__}", (base,), namespace)


def _effective_weight(layer: Any) -> Tensor:
    """The weight as the hardware has it, for whoever reads it instead of calling the layer."""
    audit = layer.noise.audit
    if audit is not None:
        with audit.acting(()):
            weight = layer.parametrizations.weight()
        audit.shows(layer, weight)
        return weight
    return layer.parametrizations.weight()


def _set_original(layer: Any, name: str, value: Any) -> None:
    """Assigning a weight, as tying it to the embedding does, assigns the stored one."""
    if name == "weight":
        layer.parametrizations.weight.original = value
    else:
        nn.Module.__setattr__(layer, name, value)


def forward(layer: Any, x: Tensor, place: Place | None = None) -> Tensor:
    """The forward of a transformed layer: x (..., in) -> (..., out).

    Args:
        place: context and tokens of these rows, where they are not those of the whole batch.
    """
    place = _place_of(layer, x) if place is None else place
    return _through(layer.noise, layer.output_effects, _multiply(layer, x, place), place)


def _place_of(layer: Any, x: Tensor) -> Place:
    """Context and tokens of a layer's inputs (..., in).

    Latent attention multiplies inputs of four dimensions, (batch, heads, sequence, in), also of the tokens that a KV cache
    holds. Which of them is the sequence an audit finds out, where a batch is long enough to tell.

    Raises:
        ValueError: the inputs belong to other tokens.
    """
    context, tokens = layer.noise.place()
    if tokens is None or layer.noise.clean:
        return context, tokens
    if x.dim() < 4:
        _check_rows(layer, x, tokens)
        return context, tokens
    lead, (_, batch, length) = x.shape[:-1], tokens.shape
    if layer.noise.audit is not None and length > 1:
        layer.heads_dim = next((dim for dim in (1, 2) if lead[:dim] + lead[dim + 1 :] == (batch, length)), None)
    dim = getattr(layer, "heads_dim", None)
    if x.dim() == 4 and dim is not None and lead[0] == batch:
        sequence, history = lead[3 - dim], layer.noise.history
        if sequence != length and history is not None and sequence <= history.shape[2]:
            tokens = history[:, :, history.shape[2] - sequence :]
        if tokens.shape[2] == sequence:
            return context, tokens_of_heads(lead, dim, tokens)
    raise ValueError(f"an input of shape {tuple(x.shape)} does not belong to a batch of tokens {(batch, length)}")


def _check_rows(layer: Any, x: Tensor, tokens: Tensor) -> None:
    """
    Raises:
        ValueError: inputs (1, rows, in) are not those of a batch of one, and no table that is alike for all texts either.
    """
    audit, (_, *batch) = layer.noise.audit, tokens.shape
    if audit is None or x.dim() != 3 or len(x) != 1 or list(x.shape[:2]) == batch or not layer.noise.random:
        return
    if audit.origins.of_batch(x):
        raise ValueError(
            f"an input of shape {tuple(x.shape)} mixes rows of a batch of tokens {tuple(batch)}: which noise belongs to them "
            "is not known"
        )


def weight_effects(layer: Any) -> list[Any]:
    """The effects on a layer's weight, in order."""
    if isinstance(layer, Expert):
        return list(layer.weight_effects)
    return list(layer.parametrizations.weight) if "parametrizations" in layer._modules else []


def stored_weight(layer: Any) -> Tensor:
    """A layer's weight before all effects."""
    if "parametrizations" in layer._modules:
        return layer.parametrizations.weight.original
    return layer.weight


def _multiply(layer: Any, x: Tensor, place: Place | None = None) -> Tensor:
    """The product of a transformed layer, of its part of the weight: x (..., in) -> (..., out)."""
    noise = layer.noise
    effects, of_input = weight_effects(layer), list(layer.input_effects)
    plan = layer.plan
    if noise.clean:
        plan = layer.clean_plan
        effects, of_input = ([e for e in found if e.hardware is False] for found in (effects, of_input))
    effects = [*effects, *of_input, *([layer.product] if plan.product is not None else [])]
    place = _place_of(layer, x) if place is None else place
    if noise.audit is not None:
        noise.audit.called.add(layer)
        with noise.audit.acting(effects):
            return _linear(layer, plan, x, place, effects)
    return _linear(layer, plan, x, place, effects)


def _linear(layer: Any, plan: Any, x: Tensor, place: Place, effects: Sequence[Any]) -> Tensor:
    weight = stored_weight(layer)
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    tensors = [tensor for effect in effects for tensor in effect.tensors]
    # Without gradients the functions themselves: Dynamo does not trace an autograd.Function there.
    linear = TransformedLinear.apply if torch.is_grad_enabled() else transformed_linear
    return linear(plan, *layer.noise.notes, x, weight, layer.bias, *place, *tensors)


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


def _through(noise: Noise, effects: Sequence[Any], y: Tensor, place: Place) -> Tensor:
    """The effects on what a layer returns."""
    if noise.audit is not None and not noise.clean:
        noise.audit.ran(effects)
    for effect in () if noise.clean else effects:
        if torch.is_grad_enabled():
            y = TransformedOutput.apply(effect.code, *noise.notes, y, *place, *effect.tensors)
        else:
            y, _ = output_effect(effect.code, Notes(*noise.notes), y, place, effect.tensors)
    return y
