"""Hardware effects on a loaded transformers model, with noise that belongs to the text and not to how it is batched.

A training batch knows each row by its number. An evaluated text has none: it may stand in any batch, be padded on
either side, or be continued token by token behind a KV cache, and must meet the same noise each time. So the noise at a
token is a function of the tokens up to it:

    position(t) = number of tokens before t, pads not counted
    sample(t)   = sum over i <= t of mix(token_i, position(i)), pads skipped, modulo 2^32

where mix is the first word of Philox at counter (token, position, 0, 0) with key (0, 0). Later tokens change nothing
before them. A KV cache carries the counts and sums of the tokens that it holds, and follows whatever happens to its
rows.

Two ways to draw the rest. A *chip* keeps its weights, as a device would: drawn once, under a key of its own. *Resample*
draws weights anew for every batch: the average over chips in one pass, at the price that it depends on the batch size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from evals.implementations import Implementations, probe
from parallel.names import LEARNED, named_parameters
from transforms.apply import apply, remove
from transforms.audit import Audit, check
from transforms.layers import is_transformed
from transforms.noise import philox_4x32
from transforms.selection import check_reach, on_layers, with_hidden
from transforms.specs import Hardware, LoraSpec

_MASK32 = 0xFFFFFFFF
_OTHER_STATES = ("cache_params", "mems", "past_buckets_states", "state")
"""Arguments in which models without a KV cache carry what came before."""


@dataclass(frozen=True)
class History:
    """What the noise of a batch depends on, after each of its tokens."""

    counts: Tensor
    """(B, T) int64, tokens so far, pads not counted."""
    sums: Tensor
    """(B, T) int64, running sum of `mix` modulo 2^32."""

    @property
    def tokens(self) -> Tensor:
        """(2, B, T) int64, position and sample of each token, as `Noise.begin` takes them; those of pads mean nothing."""
        return torch.stack([(self.counts - 1).clamp(min=0), self.sums])

    def extended(self, input_ids: Tensor, real: Tensor) -> History:
        """This history followed by further tokens, (B, T) int64; `real` (B, T) is False for pads."""
        count, total = self.counts[:, -1:].sum(1, True), self.sums[:, -1:].sum(1, True)  # 0 where there is none yet
        counts = count + real.cumsum(1)
        mixed = philox_4x32((input_ids & _MASK32, (counts - 1).clamp(min=0), 0, 0), (0, 0))[0]
        sums = (total + torch.where(real, mixed, 0).cumsum(1)) & _MASK32
        return History(torch.cat([self.counts, counts], 1), torch.cat([self.sums, sums], 1))

    def rows(self, indices: Tensor) -> History:
        indices = indices.to(self.counts.device)
        return History(self.counts[indices], self.sums[indices])

    def columns(self, begin: int, end: int | None = None) -> History:
        return History(self.counts[:, begin:end], self.sums[:, begin:end])

    @staticmethod
    def empty(batch: int, device: torch.device) -> History:
        nothing = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        return History(nothing, nothing)


def token_noise(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(2, B, T) int64: position and sample of every token of a batch (B, T) that nothing precedes."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    return History.empty(len(input_ids), input_ids.device).extended(input_ids, real).tokens


@torch.no_grad()
def settle(model: Any) -> None:
    """Let a model do what it does to its weights at its first forward (RWKV divides those of later blocks), before effects."""
    ids, mask = probe(model)
    model(input_ids=ids, attention_mask=mask)


class NoisyModel:
    """Transforms on a transformers model, and on which hardware its forwards run.

    Every forward of the model then says where it stands, `generate` included. `chip` or `resample` has to be called
    before the first; `clean` gives a context without hardware effects. `detach` leaves the model as it was.

    Raises:
        TransformError: a transform does not fit the model, or an effect would not act on it.
        ValueError: the model's attention or experts compute something that ours do not, or `ranges` are not those of this
            model. The model is as before then.
    """

    def __init__(
        self,
        model: Any,
        specs: Sequence[Hardware | LoraSpec],
        seed: int,
        ranges: Mapping[str, Tensor] | None = None,
        trained: bool = False,
    ):
        self.model, self.specs = model, specs
        settle(model)
        self.noise = apply(model, specs, seed, trained=trained)
        model.to(model.device)  # the effects' tables
        self._implementations = Implementations(model, self.noise)
        self._hooks: list[Any] = []
        self._parameters = inspect.signature(model.forward)
        self._batch: int | None = None
        self._history: History | None = None
        self._kept = 0
        self.non_finite = torch.zeros((), dtype=torch.bool, device=model.device)
        """Whether a forward gave logits that are not finite since a chip was last chosen."""
        self.known = not self.noise.ranges
        """Whether the ranges of all converters are known."""
        try:
            self._implementations.ours()
            if ranges and self.noise.ranges:
                self.load_ranges(ranges)
            self._hooks += [
                model.register_forward_pre_hook(self._before, with_kwargs=True),
                model.register_forward_hook(self._after),
            ]
            head = model.get_output_embeddings()
            if head is not None:
                self._hooks += [head.register_forward_pre_hook(self._before_head)]
            self._implementations.check()
            self._check_that_all_act()
        except BaseException:
            self.detach()
            raise

    @torch.no_grad()
    def _check_that_all_act(self) -> None:
        """
        Raises:
            TransformError: a forward does not meet every effect that is listed.
        """
        ids, mask = probe(self.model)
        following, longer = ids[:, -1:].clone(), torch.cat([mask, mask[:, -1:]], 1)
        audit = Audit(self.model, (ids, mask, following, longer))
        self.noise.audit, observing = audit, self.noise.observing
        self.noise.observing = False
        try:
            with audit:
                found = self.model(input_ids=ids, attention_mask=mask)
                past = getattr(found, "past_key_values", None)
                if past is not None:  # behind a cache some models multiply otherwise
                    with suppress(Exception):  # a model that cannot go on says so where it has to
                        self.model(input_ids=following, attention_mask=longer, past_key_values=past, use_cache=True)
        finally:
            self.noise.audit, self.noise.observing = None, observing
            self.non_finite.zero_()
        check(audit, self.noise)
        if any(on_layers(spec) and not isinstance(spec, LoraSpec) for spec in self.specs):
            self.noise.unreached = with_hidden(self.model, self.noise.unreached, audit.origins.hidden(self.model))
            check_reach(self.specs, self.noise.unreached)
        layers = {name: module for name, module in self.model.named_modules() if is_transformed(module)}
        self.read_only = [name for name, layer in layers.items() if layer not in audit.called]
        """Layers whose weights the model multiplies by itself."""

    def chip(self, number: int) -> None:
        """From now on, the hardware is chip `number`. Chip 0 is the one that persistent faults of a run are of."""
        self._enter(f"chip {number}", None)

    def resample(self) -> None:
        """From now on, every forward meets new weights; the count of forwards begins again."""
        self._enter("resample", 0)

    def ranges(self) -> dict[str, Tensor]:
        """Ranges in use and learned factors on them, by their names in checkpoints; the tensors themselves."""
        factors = {n: p.data for n, p in named_parameters(self.model) if n.startswith(LEARNED)}
        return self.noise.state() | factors

    def load_ranges(self, ranges: Mapping[str, Tensor]) -> None:
        """Take ranges, and learned factors on them, from a checkpoint or a calibration.

        Raises:
            ValueError: some are missing.
        """
        own = self.ranges()
        missing = sorted(own.keys() - ranges.keys())
        if missing:
            raise ValueError(
                f"no range for {missing[0]} and {len(missing) - 1} more: these ranges are of another model, or of other "
                "transforms or another order of them"
            )
        for name, tensor in own.items():
            tensor.copy_(ranges[name].view_as(tensor))
        self.known = True

    def calibrating(self) -> None:
        """From now on converters note what they see, on chip 0; their ranges begin anew."""
        for range_ in self.noise.ranges.values():
            range_.reset()
            if range_.log_range is not None:
                range_.log_range.data.zero_()
        self.known = True
        self._enter("chip 0", None)
        self.noise.observing = True

    def _enter(self, phase: str, batch: int | None) -> None:
        if not self.known:
            raise ValueError(
                "the ranges of these transforms' converters are not known: fit them with newcompute calibrate, and name the "
                "file with --ranges; a model that was trained under them has its own with --transforms run"
            )
        self.noise.enter(phase)
        self._batch = batch
        self.non_finite.zero_()

    def clean(self) -> AbstractContextManager[None]:
        """The model as it is without hardware, computed by its own functions."""
        return self._implementations.own()

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._implementations.usual()
        remove(self.model)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Tell the layers which tokens they are about to see."""
        given = self._parameters.bind_partial(*args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        ids = given.get("input_ids")
        if ids is None:
            raise ValueError("noise follows the tokens of a text: call the model with input_ids, not with embeddings")
        carried = [name for name in _OTHER_STATES if given.get(name) is not None]
        if carried:
            raise ValueError(f"{carried[0]} carries earlier tokens in a way that the noise cannot follow")
        if isinstance(given.get("logits_to_keep"), Tensor):
            raise ValueError("logits_to_keep: the output head's noise needs a number of last tokens, not a selection")
        before = _history_of(given.get("past_key_values"), ids)
        self._history = before.extended(ids, _real(given.get("attention_mask"), ids, before.counts.shape[1]))
        tokens = self._history.columns(before.counts.shape[1]).tokens
        self.noise.begin(self._batch or 0, 0, ids.device, group=0, tokens=tokens)
        self.noise.history = self._history.tokens
        self._kept = given.get("logits_to_keep") or 0
        self.noise.keys = (self._history.counts - 1).clamp(min=0)
        if self._batch is not None and not self.noise.clean:
            self._batch += 1

    def _before_head(self, module: nn.Module, args: tuple) -> None:
        """The head may be given the last tokens only."""
        if self._kept and self.noise.tokens is not None:
            self.noise.tokens = self.noise.tokens[:, :, -self._kept :]

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Leave the history with the cache that holds these tokens' keys and values."""
        from transformers import Cache

        parts: Any = output.values() if hasattr(output, "values") else output
        for part in parts:
            if isinstance(part, Cache):
                if not hasattr(type(part), "follows_noise"):
                    of: Any = type(part)
                    part.__class__ = _following(of)
                part.noise_history = self._history
        logits = getattr(output, "logits", None)
        if logits is not None:
            self.non_finite |= ~logits.isfinite().all()


def _history_of(past: Any, ids: Tensor) -> History:
    """What a KV cache says of the tokens before a batch."""
    from transformers import Cache

    if past is not None and not isinstance(past, Cache):
        raise ValueError(f"past_key_values: the noise follows a transformers Cache, not a {type(past).__name__}")
    length = 0 if past is None else int(past.get_seq_length())
    if not length:
        return History.empty(len(ids), ids.device)
    history = getattr(past, "noise_history", None)
    if history is None or history.counts.shape != (len(ids), length):
        raise ValueError(
            f"past_key_values holds {length} tokens of which the noise knows nothing: fill the cache through this "
            "model, under these transforms, and change it with its own methods only"
        )
    return history


def _real(mask: Any, ids: Tensor, length: int) -> Tensor:
    """(B, T) bool, False for pads, from an attention mask that also spans the `length` tokens of a cache."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    expected = (len(ids), length + ids.shape[1])
    if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: noise needs one of shape {expected} to tell tokens from pads, not {shape}")
    return mask[:, length:].to(ids.device) != 0


@cache
def _following(base: Any) -> Any:
    """The class of caches of class `base` that take the history along when their rows or tokens are rearranged.

    A class rather than functions on the instance, so that a copy of a cache has a history of its own.
    """

    class Following(base):
        follows_noise = True
        noise_history: History

        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            self.noise_history = self.noise_history.rows(beam_idx)

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            self.noise_history = self.noise_history.rows(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            batch = torch.arange(len(self.noise_history.counts))
            self.noise_history = self.noise_history.rows(batch.repeat_interleave(repeats))

        def crop(self, *args: Any, **kwargs: Any) -> None:
            super().crop(*args, **kwargs)  # by a length in one version of transformers, by a difference in another
            self.noise_history = self.noise_history.columns(0, int(self.get_seq_length()))

    Following.__name__ = Following.__qualname__ = base.__name__
    return Following
