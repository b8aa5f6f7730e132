"""Which functions a transformers model computes its attention and its experts with: its own, or ours that know effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from transforms.context import Noise

_PROBE_LENGTH = 12
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
"""Of logits, root mean square of the difference over that of the logits; other dtypes round more."""
_LOW_PRECISION_TOLERANCE = 0.05


class Implementations:
    """Switches a model between its own functions and ours, and compares them once.

    Args:
        noise: says which of attention and experts have effects; the others stay as they are.

    Raises:
        ValueError: ours give other logits than the model's own.
    """

    def __init__(self, model: Any, noise: Noise):
        self.model, self.noise = model, noise
        self.usual_attention = getattr(model.config, "_attn_implementation", None)
        self.usual_experts = getattr(model.config, "_experts_implementation", None)

    def ours(self) -> None:
        if self.noise.in_attention:
            from evals.attention import NAME

            for module in self.model.modules():
                if hasattr(module, "attention_effects") or hasattr(module, "is_causal"):
                    module.usual_attention = self.usual_attention
            self.model.set_attn_implementation(NAME)
        if self.noise.in_experts:
            from evals.experts import NAME

            self.model.set_experts_implementation(NAME)

    def usual(self) -> None:
        if self.noise.in_attention:
            self.model.set_attn_implementation(self.usual_attention)
            for module in self.model.modules():
                vars(module).pop("usual_attention", None)
        if self.noise.in_experts:
            self.model.set_experts_implementation(self.usual_experts)

    @contextmanager
    def own(self) -> Iterator[None]:
        """The model's own functions inside, and no hardware effect: the model as it was."""
        self.usual()
        try:
            with self.noise.off():
                yield
        finally:
            self.ours()

    @torch.no_grad()
    def check(self) -> None:
        """
        Raises:
            ValueError: without effects ours give other logits than the model's own.
        """
        if not (self.noise.in_attention or self.noise.in_experts):
            return
        ids, mask = probe(self.model)
        with self.own():
            want = self._logits(ids, mask)
        with self.noise.off():
            self.noise.exact = True
            try:
                got = self._logits(ids, mask)
            finally:
                self.noise.exact = False
        tolerance = _TOLERANCE.get(want.dtype, _LOW_PRECISION_TOLERANCE)
        want, got = want[mask.bool()].double(), got[mask.bool()].double()
        apart = float((got - want).square().mean().sqrt() / want.square().mean().sqrt().clamp(min=1e-30))
        if not apart <= tolerance:  # NaN, too
            what = " and ".join(["attention"] * self.noise.in_attention + ["experts"] * self.noise.in_experts)
            usual = self.usual_attention if self.noise.in_attention else self.usual_experts
            raise ValueError(
                f"the {what} of {type(self.model).__name__} cannot have effects: its own implementation ({usual}) computes "
                f"something else than ours, whose logits without effects are {apart:.2g} away from its own (relative, root "
                "mean square; "
                f"{tolerance:g} allowed)"
            )

    def _logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).logits


def probe(model: Any) -> tuple[Tensor, Tensor]:
    """Two short rows of tokens with their attention mask, (2, 12) int64; the first begins with pads."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(2 * _PROBE_LENGTH, device=model.device).view(2, -1) * 7919 % (vocabulary - 1) + 1
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids % vocabulary, mask
