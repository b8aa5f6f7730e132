"""Attention whose two products run on the simulated hardware.

    S = A_s( T_q(q) T_k(k)^T ),   P = softmax(S / sqrt(E), over the keys that a query sees),   O = A_o( T_p(P) T_v(v) )

Two things that some models add act on the scores before the softmax, exactly: a soft cap, c tanh(S / (c sqrt(E))) (Gemma 2),
and a sink, one more score for each head that takes part in the softmax and has no value (GPT-OSS).

with quantisers T of `transforms/quantise.py` and converters A of `transforms/product.py`. The range of a converter is that of
the products as they are, before the division by sqrt(E) and the mask; P has levels on [0, 1]. Softmax is exact, in float32.

One operation that saves q, k and v and computes all else again in its backward, for some queries at a time: no matrix of
all scores is ever in memory. Backward is straight-through, as for linear layers.

Noise of a score belongs to (sample, position of the query, head, position of the key), that of an output to (sample,
position, head, feature): heads are lanes (`transforms/operands.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transforms.effect import Notes, after, made_again, noted_places, saved, separate
from transforms.operands import lane_numbers
from transforms.product import Place, Product, ProductCode
from transforms.quantise import Quantise, QuantiseCode, passing

QUERIES = 256
"""How many are computed at a time."""
_OPERANDS = ("query", "key", "value", "probabilities")
_PRODUCTS = ("scores", "context")


@dataclass(frozen=True)
class AttentionPlan:
    """Effects on one attention; each takes as many of the tensors as `counts` says, in this order."""

    query: QuantiseCode | None
    key: QuantiseCode | None
    value: QuantiseCode | None
    probabilities: QuantiseCode | None
    scores: ProductCode | None
    context: ProductCode | None
    counts: tuple[int, ...]
    first_head: int = 0
    """Number of the first head that is here."""
    noted: frozenset[int] = frozenset()
    """Which of the tensors forwards write to."""
    clean_gradients: bool = False
    """Gradients use q, k, v and P as they are before the hardware."""
    softcap: float = 0.0
    """Magnitude that scaled scores stay below; 0: none."""

    def split(self, tensors: Sequence[Tensor]) -> dict[str, Sequence[Tensor]]:
        groups, start = {}, 0
        for name, count in zip((*_OPERANDS, *_PRODUCTS), self.counts):
            groups[name] = tensors[start : start + count]
            start += count
        return groups


class AttentionEffects(nn.Module):
    """What one attention owns of its effects; those that are None do not act."""

    def __init__(self, effects: dict[str, Quantise | Product | None], first_head: int, clean_gradients: bool):
        super().__init__()
        self.effects = nn.ModuleDict({name: effect for name, effect in effects.items() if effect is not None})
        codes: dict[str, Any] = {name: self.effects[name].code if name in self.effects else None for name in effects}
        counts = [len(self.effects[name].tensors) if name in self.effects else 0 for name in (*_OPERANDS, *_PRODUCTS)]
        noted = noted_places(self.in_order)
        self.plan = AttentionPlan(
            **codes, counts=tuple(counts), first_head=first_head, noted=noted, clean_gradients=clean_gradients
        )

    @property
    def in_order(self) -> list[Any]:
        return [self.effects[name] for name in (*_OPERANDS, *_PRODUCTS) if name in self.effects]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for effect in self.in_order for tensor in effect.tensors]


def transformed_attention(
    plan: AttentionPlan,
    observing: bool,
    scale: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    context: Tensor | None,
    tokens: Tensor | None,
    keys: Tensor | None,
    *tensors: Tensor | None,
) -> Tensor:
    """The forward alone.

    Args:
        scale: what scores are multiplied with before the softmax.
        q: (B, H, T, E).
        k, v: (B, K, S, E), each head for H / K query heads.
        mask: (B or 1, 1 or H, T, S), bool or additive; None is causal: the last query sees the last key.
        context, tokens, keys: as `Noise` has them.
        tensors: those of the effects. Two more may follow, either of them None: the count of rows that are not finite, as
            `Notes` has it, and (H,), the score of each head's sink.
    """
    effects, non_finite, sinks = _apart(plan, tensors)
    own = plan.split(effects)
    operands = [(plan.query, "query", q), (plan.key, "key", k), (plan.value, "value", v)]
    for code, name, value in operands:
        if code is not None:
            Notes(observing, non_finite).take(code, value, own[name], (context, tokens))
    q, k, v = (_quantised(code, value, own[name], (context, tokens)) for code, name, value in operands)
    step = _Step(plan, scale, own, (context, tokens), keys, sinks)
    return torch.cat(
        [step.forward(q, k, v, mask, begin, observing).output for begin in range(0, q.shape[2], QUERIES)], 2
    )


def _apart(
    plan: AttentionPlan, tensors: Sequence[Tensor | None]
) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
    """The effects' tensors, the count of rows that are not finite, and the sinks."""
    count = sum(plan.counts)
    non_finite, sinks = tensors[count:] or (None, None)
    return tensors[:count], non_finite, sinks


class TransformedAttention(torch.autograd.Function):
    """`transformed_attention` with its gradient."""

    @staticmethod
    def forward(ctx: Any, plan: AttentionPlan, observing: bool, scale: float, *arguments: Any) -> Tensor:
        ctx.plan, ctx.scale = plan, scale
        *given, tensors = (*arguments[:7], arguments[7:])  # q, k, v, mask, context, tokens, keys, and the rest
        effects, _, sinks = _apart(plan, tensors)
        ctx.num_tensors = len(tensors)
        ctx.save_for_backward(*given, sinks, *saved(effects, plan.noted))
        return separate(transformed_attention(plan, observing, scale, *arguments))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        plan = ctx.plan
        q, k, v, mask, context, tokens, keys, sinks, *tensors = ctx.saved_tensors
        if torch.compiler.is_compiling():
            context = context if context is None else after(context, grad)
            q, k, v = (made_again(operand, grad) for operand in (q, k, v))
        own, place = plan.split(tensors), (context, tokens)
        exact = (q, k, v)
        (q, pull_q), (k, pull_k), (v, pull_v) = (
            (value, lambda g: g) if code is None else code.regenerate(value, *own[name], *place)
            for code, name, value in ((plan.query, "query", q), (plan.key, "key", k), (plan.value, "value", v))
        )
        step = _Step(plan, ctx.scale, own, place, keys, sinks)
        chosen = exact if plan.clean_gradients else (q, k, v)
        grad_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=torch.float32)
        grad_q, grad_k, grad_v = [], torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for begin in range(0, q.shape[2], QUERIES):
            done = step.forward(q, k, v, mask, begin, observing=False)
            of_q, of_k, of_v, of_sinks = step.backward(done, chosen, grad[:, :, begin : begin + QUERIES], begin)
            grad_q.append(of_q)
            visible = of_k.shape[2]
            grad_k[:, :, :visible] += of_k
            grad_v[:, :, :visible] += of_v
            if grad_sinks is not None and of_sinks is not None:
                grad_sinks += of_sinks
        grads = pull_q(torch.cat(grad_q, 2).to(q.dtype)), pull_k(grad_k.to(k.dtype)), pull_v(grad_v.to(v.dtype))
        tensor_grads: list[Tensor | None] = [None] * ctx.num_tensors
        if grad_sinks is not None:
            tensor_grads[-1] = grad_sinks.to(sinks.dtype)
        return None, None, None, *grads, None, None, None, None, *tensor_grads


@dataclass
class _Done:
    """What some queries have computed."""

    output: Tensor
    """(B, H, t, E)"""
    exact_probabilities: Tensor
    """(B, H, t, S) float32, before they are rounded."""
    probabilities: Tensor
    slope: Tensor | None
    """Derivative of the soft cap at each score."""
    scores_kept: Tensor | None
    """Which scores were not clipped."""
    output_kept: Tensor | None


@dataclass
class _Step:
    """The computation for some queries at a time."""

    plan: AttentionPlan
    scale: float
    own: dict[str, Sequence[Tensor]]
    place: Place
    keys: Tensor | None
    sinks: Tensor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, begin: int, observing: bool) -> _Done:
        plan, length = self.plan, q.shape[2]
        part = q[:, :, begin : begin + QUERIES]
        queries = slice(begin, begin + part.shape[2])
        total = k.shape[2]
        visible = total - length + queries.stop if mask is None else total
        k, v = k[:, :, :visible], v[:, :, :visible]
        hidden = _hidden(mask, queries, part.shape[2], visible, q.device)
        scores, scores_kept = self._product(
            plan.scores, "scores", part, k.transpose(-1, -2), queries, observing, hidden, total
        )
        scaled, slope = scores.float() * self.scale, None
        if plan.softcap:
            capped = torch.tanh(scaled / plan.softcap)
            scaled, slope = plan.softcap * capped, 1 - capped.square()
        exact = _softmax(_masked(scaled, mask, hidden, queries), self.sinks)
        rounded = exact
        if plan.probabilities is not None:
            rounded = plan.probabilities.forward(exact, *self.own["probabilities"], *self.place)
        output, output_kept = self._product(plan.context, "context", rounded.to(v.dtype), v, queries, observing)
        return _Done(output.to(v.dtype), exact, rounded, slope, scores_kept, output_kept)

    def backward(
        self, done: _Done, operands: tuple[Tensor, Tensor, Tensor], grad: Tensor, begin: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of these queries, of the keys and values that they see, and of the sinks (H,) if any, float32."""
        q, k, v = operands
        exact = done.exact_probabilities
        visible, heads = exact.shape[-1], k.shape[1]
        part, k, v = q[:, :, begin : begin + exact.shape[2]], k[:, :, :visible], v[:, :, :visible]
        grad = passing(grad, done.output_kept, self._strength("context"))
        multiplied = (exact if self.plan.clean_gradients else done.probabilities).to(v.dtype)
        of_v = _matmul_kv(multiplied.transpose(-1, -2), grad, heads)
        of_p = _matmul(grad, v.transpose(-1, -2)).float()
        mean = (of_p * exact).sum(-1, keepdim=True)
        of_sinks = None
        if self.sinks is not None:  # they have what the softmax gives to no key
            of_sinks = -((1 - exact.sum(-1, keepdim=True)) * mean).sum((0, 2, 3))
        of_s = exact * (of_p - mean) * self.scale
        if done.slope is not None:
            of_s = of_s * done.slope
        of_s = passing(of_s, done.scores_kept, self._strength("scores")).to(k.dtype)
        of_k = _matmul_kv(of_s.transpose(-1, -2), part, heads).float()
        return _matmul(of_s, k), of_k, of_v.float(), of_sinks

    def _product(
        self,
        code: ProductCode | None,
        name: str,
        left: Tensor,
        right: Tensor,
        queries: slice,
        observing: bool,
        hidden: Tensor | None = None,
        num_keys: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """A product (B, H, t, N) after noise and conversion, and which of it was not clipped.

        Args:
            hidden: scores that do not count, since their keys are not seen.
            num_keys: of all that are there, for scores.
        """
        acc = _matmul(left, right)
        if code is None:
            return acc, None
        own = self.own[name]
        magnitudes = _matmul(left.abs(), right.abs()) if code.photons else None
        full_scale = code.read(own).full_scale
        if observing and hidden is not None:
            # How many keys beyond those a device computes scores with depends on the layout: no range may.
            code.observe(acc.masked_fill(hidden, 0), own)
            observing = False
        if code.has_kernel(acc) and (name != "scores" or self.keys is None):
            heads = (self.plan.first_head, queries.start)
            return kernels.convert(
                code,
                acc,
                own,
                self.place,
                observing,
                heads=heads,
                magnitudes=magnitudes,
                full_scale=full_scale,
                single=True,
            )
        if observing:
            code.observe(acc, own)

        def drawn(key: Tensor, normal: bool) -> Tensor:
            return self._drawn(key, normal, acc, queries, num_keys)

        return code.converted(acc, code.read(own), drawn, code.variance(full_scale, magnitudes))

    def _strength(self, name: str) -> Tensor | None:
        code = getattr(self.plan, name)
        return None if code is None else code.read(self.own[name]).strength

    def _drawn(self, key: Tensor, normal: bool, acc: Tensor, queries: slice, num_keys: int) -> Tensor:
        """A number for each element of a product; of scores the columns are keys, of which there are `num_keys`."""
        context, tokens = self.place
        assert context is not None
        batch, heads, rows, width = acc.shape
        if tokens is None:
            position = torch.arange(queries.start, queries.stop, device=acc.device).expand(batch, rows)
            sample = (context[2] + torch.arange(batch, device=acc.device))[:, None].expand(batch, rows)
        else:
            position, sample = tokens[0][:, queries], tokens[1][:, queries]
        size = (batch, heads, rows)
        lanes = (self.plan.first_head + torch.arange(heads, device=acc.device))[:, None].expand(size)
        where = (position[:, None].expand(size), sample[:, None].expand(size), context[0])
        if not num_keys or self.keys is None:
            return lane_numbers(key, lanes, width, where, normal)
        # A sliding window holds the last of the keys that there were.
        keys = self.keys[..., -num_keys:][..., :width]
        drawn = lane_numbers(key, lanes, max(width, self.keys.shape[-1]), where, normal)
        if keys.dim() == 1:
            return drawn.index_select(-1, keys)
        return drawn.gather(-1, keys[:, None, None].expand(*size, -1))


def _quantised(code: QuantiseCode | None, value: Tensor, own: Sequence[Tensor], place: Place) -> Tensor:
    return value if code is None else code.forward(value, *own, *place)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """(B, H, t, N) from (B, H, t, M) and (B, K, M, N), each of K for H / K heads."""
    heads = right.shape[1]
    if left.shape[1] == heads:
        return left @ right
    return (left.unflatten(1, (heads, -1)) @ right[:, :, None]).flatten(1, 2)


def _matmul_kv(left: Tensor, right: Tensor, heads: int) -> Tensor:
    """(B, K, M, N) from (B, H, M, t) and (B, H, t, N): summed over the heads that share keys and values."""
    found = left @ right
    return found if found.shape[1] == heads else found.unflatten(1, (heads, -1)).sum(2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over the keys (B, H, t, S), float32, and over a head's sink (H,) where it has one."""
    if sinks is None:
        return torch.softmax(scores, -1)
    sink = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]


def _hidden(mask: Tensor | None, queries: slice, rows: int, visible: int, device: torch.device) -> Tensor:
    """Which scores of some queries do not count, (t, S) or (B or 1, 1 or H, t, S) bool."""
    if mask is None:
        own = torch.arange(visible - rows, visible, device=device)[:, None]
        return torch.arange(visible, device=device) > own
    mask = mask[:, :, queries, :visible]
    return ~mask if mask.dtype == torch.bool else mask < torch.finfo(mask.dtype).min / 2


def _masked(scores: Tensor, mask: Tensor | None, hidden: Tensor, queries: slice) -> Tensor:
    """Scores, float32, with those of keys that a query does not see out of the way."""
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask[:, :, queries, : scores.shape[-1]].float()
    # Not -inf: a query without any key, a pad, stays finite.
    return scores.masked_fill(hidden, torch.finfo(torch.float32).min)


if torch.cuda.is_available():
    from transforms.kernels import convert as kernels
