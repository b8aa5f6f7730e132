"""Where in a run a forward pass stands: what noise depends on besides the layer and the element.

A `Noise` object is shared by all transformed layers of a model. Whoever runs the model hands it one fresh small tensor
before each forward; every transformed layer takes that tensor as an input of its operation and saves it for its
backward. It is never written in place, so that a backward that comes after other forwards, and an eager recomputation
(`restoring`), see the tensor of their own forward. Compiled code takes it as an input: no value in it recompiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from transforms.ranges import Moves, Range

if TYPE_CHECKING:
    from transforms.apply import Applied
    from transforms.audit import Audit
    from transforms.effect import Effect
    from transforms.selection import Unreached

TRAINING, VALIDATION = "train", "validation"
WARMUP_LEVELS = 32
"""Steps of strength in which hardware effects warm up: each rewrites tables on the host."""


def places(values: list[tuple[int, int, int]], device: torch.device) -> Tensor:
    """(n, 3) int64: step, group of the weight noise, number of the first row in the global batch, of n micro-batches."""
    found = torch.tensor(values, dtype=torch.int64)
    return found.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else found


class Noise:
    """The state of a forward pass that transformed layers read; `clean` switches all hardware effects off."""

    def __init__(self, seed: int, warmup: int = 0, trained: bool = True):
        self.seed = seed
        self.trained = trained
        """Whether the model was, or is being, trained under these effects: what they add to it is then a part of it."""
        self.warmup = warmup
        """Training steps over which effects grow to their full strength."""
        self.clean = False
        self.observing = False
        """Whether ranges take note of what they see."""
        self.non_finite: Tensor | None = None
        """(), int64: rows (tokens of an activation, output channels of a weight) that held infinity or NaN where they
        entered a quantiser, since it was last read; None before the first forward."""
        self.context: Tensor | None = None
        """(3,) int64: step, group of the weight noise, number of the micro-batch's first row in the global batch."""
        self.tokens: Tensor | None = None
        """(2, B, T) int64, position and sample of each token; None where rows of one batch follow each other."""
        self.history: Tensor | None = None
        """(2, B, S) int64, position and sample of these tokens and of those that a KV cache holds before them."""
        self.columns: Tensor | None = None
        """(T,) int64, columns of the row that this device holds, where that is not all of them (context parallel)."""
        self.applied: list[Applied] = []
        """What was applied, for people."""
        self.keys: Tensor | None = None
        """(S,) or (B, S) int64, positions of the keys that attention sees; None where they are 0 to S - 1."""
        self.ranges: dict[str, Range] = {}
        """What is tracked or learned, under its name in checkpoints."""
        self.in_attention = False
        """Whether effects act on the products of attention."""
        self.in_experts = False
        """Whether effects act on experts, which a function of ours has to multiply."""
        self.exact = False
        """Whether our functions for attention and experts run without any effect, to be compared with the model's own."""
        self.unreached: list[Unreached] = []
        """Weights of the blocks that nothing acts on."""
        self.audit: Audit | None = None
        """Who watches which effects act, where somebody does."""
        self._effects: list[Effect] = []
        self._phase = TRAINING
        self._strength = 1.0
        self._moves: Moves | None = None

    def register(self, effect: Effect) -> None:
        self._effects.append(effect)

    def number_effects(self, transform: int) -> None:
        """The effects that have no number yet are those of this transform, by its place in the list."""
        for effect in self._effects:
            if effect.transform < 0:
                effect.transform = transform

    @property
    def effects(self) -> list[Effect]:
        return list(self._effects)

    def applied_of(self, transform: int) -> Applied:
        """What a transform was applied to, by its place in the list."""
        return next(row for row in self.applied if row.transform == transform)

    @property
    def random(self) -> bool:
        """Whether any effect is; otherwise all chips and steps are alike."""
        return any(effect.random for effect in self._effects)

    def track(self, name: str, range_: Range) -> None:
        self.ranges[name] = range_

    def begin(
        self, step: int, first_sample: int, device: torch.device, group: int = 0, tokens: Tensor | None = None
    ) -> None:
        """Say where the next forward stands, with a new tensor. `first_sample` counts rows of the step's global batch."""
        self._count_on(device)
        self.context, self.tokens = places([(step, group, first_sample)], device)[0], tokens

    def stand(self, place: Tensor, rows: int) -> None:
        """As `begin`, from one of `places`, for a batch of `rows` rows or of this device's columns of them."""
        self._count_on(place.device)
        self.context, self.tokens = place, None
        if self.columns is not None:
            samples = place[2] + torch.arange(rows, device=place.device)
            size = (rows, len(self.columns))
            self.tokens = torch.stack([self.columns.expand(size), samples[:, None].expand(size)])

    def place(self) -> tuple[Tensor | None, Tensor | None]:
        """Context and tokens of the forward that is running; neither is needed where effects are off.

        Raises:
            RuntimeError: nobody has said where it stands.
        """
        if self.context is None and not self.clean:
            raise RuntimeError("a transformed layer was called before Noise.begin said where in the run it stands")
        return self.context, self.tokens

    @property
    def notes(self) -> tuple[bool, Tensor | None]:
        """What forwards take note of, as the fields of `Notes`."""
        return self.observing, self.non_finite

    def _count_on(self, device: torch.device) -> None:
        """Have a counter on this device; on the host nothing waits for it."""
        if self.non_finite is None or self.non_finite.device != device:
            with torch.inference_mode(False):
                self.non_finite = torch.zeros((), dtype=torch.int64, device=device)
            if device.type == "cuda":  # compiled code adds to it, and CUDA graphs write only to what keeps its address
                torch._dynamo.mark_static_address(self.non_finite)

    def take_non_finite(self) -> Tensor:
        """How many rows that are not finite quantisers were given since the last call, (); on the device, not waited for.

        Counted on this process: every process counts a weight, and the activations of its part of the batch.
        """
        if self.non_finite is None:
            return torch.zeros((), dtype=torch.int64)
        found = self.non_finite.clone()
        self.non_finite.zero_()
        return found

    def enter(self, phase: str) -> None:
        """Draw from another seed space from now on: training, validation, or a chip of an evaluation.

        Rewrites the keys in place, so no backward may be outstanding. Outside training effects have their full strength.
        """
        self._phase, self._strength = phase, 1.0
        self.observing = phase == TRAINING and bool(self.ranges)
        for effect in self._effects:
            effect.fill(self.seed, self._phase)

    def fill(self) -> None:
        """Write what effects need to where they live: after `to_empty`, which leaves it undefined. Ranges begin anew."""
        self.enter(self._phase)
        self._moves = None  # `to_empty` has made other tensors
        for range_ in self.ranges.values():
            range_.reset()

    def keep_ranges(self, parts: Iterable[nn.Module]) -> None:
        """Forget the ranges of layers that are in none of these parts: a pipeline's other stages have them."""
        here = {id(module) for part in parts for module in part.modules()}
        self.ranges = {name: range_ for name, range_ in self.ranges.items() if id(range_) in here}

    def begin_step(self, step: int) -> None:
        """Set the strength of training step `step`, counted from 0; no backward may be outstanding."""
        if not self.warmup:
            return
        strength = min(1.0, math.ceil((step + 1) / self.warmup * WARMUP_LEVELS) / WARMUP_LEVELS)
        if strength != self._strength:
            self._strength = strength
            for effect in self._effects:
                effect.set_strength(strength)

    def end_step(self, agree: Callable[[Tensor], Tensor] = lambda seen: seen) -> None:
        """Move the ranges to what the step has seen.

        Args:
            agree: takes (n,) float32, the largest values that this device has seen, to those of all devices.
        """
        if not self.ranges:
            return
        if self._moves is None:
            self._moves = Moves(list(self.ranges.values()))
        self._moves.move(agree)

    def drop_step(self) -> None:
        """Forget what the step has seen."""
        for range_ in self.ranges.values():
            range_.seen.zero_()

    def state(self) -> dict[str, Tensor]:
        """The ranges in use, as checkpoints keep them; loads write into these."""
        return {f"{name}.range": range_.used for name, range_ in self.ranges.items()}

    @contextmanager
    def off(self) -> Iterator[None]:
        """No hardware effect inside; adapters stay."""
        before, self.clean = self.clean, True
        try:
            yield
        finally:
            self.clean = before

    def restoring(
        self, contexts: Callable[[], tuple[AbstractContextManager, AbstractContextManager]] | None = None
    ) -> Callable[[], tuple[AbstractContextManager, AbstractContextManager]]:
        """A `context_fn` of activation checkpointing whose recomputation sees the context of its forward.

        Args:
            contexts: another `context_fn` to combine with.
        """

        def both() -> tuple[AbstractContextManager, AbstractContextManager]:
            forward, recompute = contexts() if contexts else (nullcontext(), nullcontext())
            return forward, _Restored(self, recompute)

        return both


class _Restored(AbstractContextManager):
    """The context of one forward, for its recomputation; may be entered again (zero-bubble pipelines recompute twice)."""

    def __init__(self, noise: Noise, inner: AbstractContextManager):
        self.noise, self.inner = noise, inner
        self.of_forward = (*self._read()[:3], None)  # what a forward has counted is not counted again
        self.outside: list[tuple[Tensor | None, Tensor | None, bool, Tensor | None]] = []

    def _read(self) -> tuple[Tensor | None, Tensor | None, bool, Tensor | None]:
        return self.noise.context, self.noise.tokens, self.noise.clean, self.noise.non_finite

    def _write(self, values: tuple[Tensor | None, Tensor | None, bool, Tensor | None]) -> None:
        self.noise.context, self.noise.tokens, self.noise.clean, self.noise.non_finite = values

    def __enter__(self) -> None:
        self.outside.append(self._read())
        self._write(self.of_forward)
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self._write(self.outside.pop())
