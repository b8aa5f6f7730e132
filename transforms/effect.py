"""What all effects are: a module that owns small tensors, and a frozen code of pure functions that compiled code sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from transforms.context import Noise
from transforms.noise import stream_key
from transforms.ranges import Range

_library = torch.library.Library("newcompute", "DEF")
_library.define("after(Tensor context, Tensor other) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.impl("after", lambda context, other: context.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("newcompute::after", lambda context, other: torch.empty_like(context), lib=_library)


def after(small: Tensor, grad: Tensor) -> Tensor:
    """A copy that does not exist before the gradient, as far as the compiler knows."""
    return torch.ops.newcompute.after(small, grad)


def made_again(value: Tensor, grad: Tensor) -> Tensor:
    """An operand as it is, in compiled backwards: what is made from it there is not what the forward made, and so is not
    kept from there. A product with a one that comes `after` the gradient: exact, and fused with a rounding that reads it."""
    return value * after(torch.ones((), dtype=value.dtype, device=value.device), grad)


def separate(result: Tensor) -> Tensor:
    """The result of an `autograd.Function` as a tensor object that nothing else in its forward is, without a copy.

    A cast to the dtype that a tensor already has returns that tensor. On torch 2.11 Dynamo makes all intermediates of the
    forward outputs of the traced function; where the result is one of them it is an output twice, autograd hands the
    gradient to the second, and the backward is traced with zeros. Eager code has no such outputs.
    """
    return result.view_as(result) if torch.compiler.is_compiling() else result


class Code(ABC):
    """The pure functions of an effect on one operand, and all that compiled code may depend on: equal codes share
    compiled code. Subclasses are frozen dataclasses.

    `own` are the effect's own tensors, as many as its module's `tensors`; `place` the context and the tokens.
    """

    hoistable: ClassVar[bool] = True
    """Whether a part of what it computes needs no random numbers, so that a compiler could keep it from the forward."""

    rounds: ClassVar[bool] = False
    """Whether it makes other numbers of infinity, so that rows with infinity or NaN are counted where they enter."""

    def forward(self, value: Tensor, *rest: Any) -> Tensor:
        """What becomes of a value: `rest` are `own` and `place`."""
        return self.regenerate(value, *rest)[0]

    @abstractmethod
    def regenerate(self, value: Tensor, *rest: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """The same again, and the function from its gradient to that of `value`: alone, or with a list of those of the
        effect's own tensors."""

    def observe(self, value: Tensor, *rest: Any) -> None:  # noqa: B027, most effects note nothing
        """Take note of a value in the effect's own tensors; twice is as once, so that a recomputation does no harm."""


class Notes(NamedTuple):
    """What a forward takes note of."""

    observing: bool = False
    """Ranges note the largest value that they see."""
    non_finite: Tensor | None = None
    """(), int64, to which rows that hold infinity or NaN are added; None where nobody counts."""

    def take(self, code: Code, value: Tensor, own: Sequence[Tensor], place: Iterable[Tensor | None]) -> None:
        """Note a value on its way into an effect."""
        if self.non_finite is not None and code.rounds and value.numel():
            exact = value.detach()
            # Two reductions that the scale's own reduction shares its pass with when compiled; NaN compares as False.
            finite = (exact.amax(-1) < torch.inf) & (exact.amin(-1) > -torch.inf)
            self.non_finite.add_((~finite).sum())
        if self.observing:
            code.observe(value, *own, *place)


class Own(NamedTuple):
    """The own tensors of an effect that has a range, by what they are; None where it has no such tensor."""

    keys: Tensor | None = None
    """int64, of its random numbers: two words for each kind."""
    used: Tensor | None = None
    """(1,) float32, the range in use, without what is learned of it."""
    seen: Tensor | None = None
    """(1,) float32, the largest magnitude of this step; forwards write to it."""
    log_range: Tensor | None = None
    """(1,) logarithm of the learned factor on the range."""
    full_scale: Tensor | None = None
    """(1,) float32, product of the operands' ranges, for shot noise."""
    strength: Tensor | None = None
    """(1,) float32, while effects warm up."""


class Slots(ABC):
    """A mixin: of the code of an effect that has a range, which of `Own` it has."""

    @property
    @abstractmethod
    def slots(self) -> tuple[str, ...]:
        """Fields of `Own`, in their order."""

    def read(self, own: Sequence[Tensor]) -> Own:
        return Own(**dict(zip(self.slots, own)))


def noted_places(effects: Iterable[Any]) -> frozenset[int]:
    """Which of all tensors of several effects forwards write to."""
    found, start = set(), 0
    for effect in effects:
        if getattr(effect, "noted", None) is not None:
            found.add(start + effect.noted)
        start += len(effect.tensors)
    return frozenset(found)


def saved(tensors: Iterable[Tensor], noted: frozenset[int]) -> list[Tensor | None]:
    """What a backward may keep of them."""
    return [None if i in noted else tensor for i, tensor in enumerate(tensors)]


class Effect(nn.Module):
    """One effect on one operand of one layer.

    Args:
        name: Hugging Face name of the parameter or module, part of the key.
        role: "w", "x", "out", ...; part of the key.
        stream: tells apart several effects on one operand.
    """

    hardware = True
    """Whether it is switched off where the hardware is (`Noise.off`)."""
    persistent = False
    """Whether it belongs to the chip, and not to the step."""
    code: Any
    transform: int = -1
    """Place in the list of the transform that it belongs to; -1 until it is known."""

    @property
    def random(self) -> bool:
        """Whether it depends on the noise."""
        return bool(self.code.stochastic)

    def __init__(self, noise: Noise, name: str, role: str, stream: str = ""):
        super().__init__()
        self.noise, self.name, self.role, self.stream = noise, name, role, stream
        noise.register(self)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Its own tensors, in the order in which the code takes them."""
        return ()

    @property
    def noted(self) -> int | None:
        """Which of the tensors forwards write to, taking note of what they see: no backward may keep it."""
        return None

    @property
    def label(self) -> str:
        """Where what it tracks or learns is kept in checkpoints, without the name of what."""
        return ".".join(["transforms", self.name.removesuffix(".weight"), self.role, *filter(None, [self.stream])])

    def key(self, seed: int, phase: str, kind: str = "") -> list[int]:
        """Its key. Persistent effects belong to the chip, so training and validation share them."""
        if self.persistent and not phase.startswith("chip"):
            phase = "chip 0"
        return list(stream_key(seed, self.name, self.role + kind, f"{phase}|{self.stream}"))

    def fill(self, seed: int, phase: str) -> None:
        """Write what follows from the seed and the phase into the effect's tensors."""

    def set_strength(self, strength: float) -> None:
        """Act with a part of the full strength, 0 to 1, from now on."""

    @torch.no_grad()
    def write(self, tensor: Tensor, values: list[int]) -> None:
        if not tensor.is_meta:
            tensor.copy_(torch.tensor(values, dtype=tensor.dtype))


class RangedEffect(Effect):
    """An effect with a range: the tensors that its code has slots for.

    Args:
        code: has `Slots`.
        range_: tracked or learned, where it has one.
    """

    def __init__(self, noise: Noise, name: str, role: str, code: Any, stream: str = "", range_: Range | None = None):
        super().__init__(noise, name, role, stream)
        self.code, self.of_range = code, (range_,)
        if range_ is not None:
            # Named by what it belongs to, not by its place among the effects, which adapters shift (`parallel/names.py`).
            self.add_module(f"range_{role}{stream}", range_)
            noise.track(self.label, range_)
        if "keys" in code.slots:
            self.register_buffer("keys", torch.empty(2 * len(self.kinds), dtype=torch.int64), persistent=False)
        if "strength" in code.slots:
            self.register_buffer("strength", torch.ones(1), persistent=False)

    kinds: tuple[str, ...] = ("",)
    """What tells apart the keys of its random numbers, beside the role."""

    @property
    def range(self) -> Range | None:
        return self.of_range[0]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        of_range = dict(zip(("used", "seen", "log_range"), self.range.tensors)) if self.range is not None else {}
        return tuple(of_range[name] if name in of_range else getattr(self, name) for name in self.code.slots)

    @property
    def noted(self) -> int | None:
        return self.code.slots.index("seen") if "seen" in self.code.slots else None

    def fill(self, seed: int, phase: str) -> None:
        if "keys" in self.code.slots:
            self.write(self.keys, [word for kind in self.kinds for word in self.key(seed, phase, kind)])
        self.set_strength(1.0)

    @torch.no_grad()
    def set_strength(self, strength: float) -> None:
        if "strength" in self.code.slots and not self.strength.is_meta:
            self.strength.fill_(strength)
