"""Random bit errors of the memory that holds weights, inputs or outputs.

A value is encoded in its storage format, failing cells flip (or read what they are stuck at), and the word is decoded:
T(x) = decode(encode(x) xor mask). With a threshold t the result is kept where |T(x)| < t and is 0 elsewhere, NaN
included, for every element whether it flipped or not: the range check of a memory controller.

Backward is straight-through: the gradient passes as if T were the identity, and not at all where the threshold cleared
the element. Which cells fail is the business of `transforms/sampling.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from transforms.context import Noise
from transforms.effect import Code, Effect
from transforms.formats import Float, Format, named
from transforms.operands import AUTOGRAD, Operand, first_chunks, within
from transforms.sampling import CHUNK, Law, choose_law, failed_cells, make_table, stuck_values, words_of
from transforms.scales import Scaling

STORAGE = {
    "bfloat16": (torch.bfloat16, torch.int16, 7),
    "float16": (torch.float16, torch.int16, 10),
    "float32": (torch.float32, torch.int32, 23),
}
"""Format -> its dtype, the integer of its width, and the number of mantissa bits."""
_FORMATS = [dtype for dtype, _, _ in STORAGE.values()]
_NAN = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}
"""What NaN becomes on its way from or to float16; casts of devices differ."""


def _not_below(number: float, dtype: torch.dtype) -> float:
    """The smallest number of a format that is not below `number`, which is not negative."""
    rounded = torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype)
    if float(rounded) < number:
        integer = torch.int16 if dtype.itemsize == 2 else torch.int32
        rounded = (rounded.view(integer) + 1).view(dtype)
    return float(rounded)


def bit_probabilities(storage: str, sign_exponent: float, mantissa: float, bits: Sequence[float] = ()) -> list[float]:
    """One probability per bit, least significant first.

    Args:
        bits: per bit from the sign downwards; replaces the two groups.
    """
    if bits:
        return list(reversed(bits))
    if storage in STORAGE:
        dtype, _, num_mantissa = STORAGE[storage]
        return [mantissa] * num_mantissa + [sign_exponent] * (dtype.itemsize * 8 - num_mantissa)
    form = named(storage)
    # Of an integer the sign is the one bit of the first group.
    num_mantissa = form.mantissa if isinstance(form, Float) else form.bits - 1
    return [mantissa] * num_mantissa + [sign_exponent] * (form.bits - num_mantissa)


@dataclass(frozen=True)
class BitflipCode(Code, Operand):
    """All of a bitflip effect that compiled code depends on; keys and probabilities are in its table, a tensor."""

    hoistable = False  # all of it depends on the context
    law: Law
    storage: str
    of_weight: bool
    zero_above: float | None = None
    persistent: bool = False
    stuck: bool = False
    first_row: int = 0
    first_column: int = 0
    columns: int = 0
    limits: tuple[float, ...] = field(init=False, compare=False)
    """The smallest number of each format (in the order of `STORAGE`) that is not below the threshold: eager and compiled
    code round a threshold that lies between two numbers of a format differently."""
    text: str = field(init=False, compare=False)
    """The code as an argument of an operation, made ahead: compiled code cannot make it."""
    unlimited: BitflipCode = field(init=False, compare=False, repr=False)
    """The same without the threshold."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", tuple(_not_below(self.zero_above or 0.0, dtype) for dtype in _FORMATS))
        values = {
            name: getattr(self, name) for name, of in self.__dataclass_fields__.items() if of.init and name != "law"
        }
        object.__setattr__(self, "unlimited", self if self.zero_above is None else replace(self, zero_above=None))
        object.__setattr__(self, "text", json.dumps({"law": asdict(self.law), **values}))

    def forward(self, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
        """T(value), in the value's dtype. A weight is (out, in), an activation (B, T, D) or flattened to (B T, D)."""
        return self.regenerate(value, table, context, tokens)[0]

    def regenerate(
        self, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """T(value) again, and the function that takes its gradient to that of `value`."""
        place = (table, context, tokens)
        if value.is_cuda:
            return kernels.store(self, value, *place), lambda grad: kernels.pull(self, grad, value, *place)
        if torch.compiler.is_compiling():
            stored = torch.ops.newcompute.bitflip(value, *place, self.text)
        else:
            stored = golden(self, value, *place)
        if self.zero_above is None:
            return stored, lambda grad: grad
        kept = stored.abs() < self.limits[_FORMATS.index(value.dtype)]
        return torch.where(kept, stored, 0), lambda grad: torch.where(kept, grad, 0)

    def through(self, value: Tensor, own: Any, place: Any, observing: bool) -> tuple[Tensor, Tensor | None]:
        """As `forward`, and which elements the threshold kept."""
        stored = self.unlimited.forward(value, *own, *place)
        if self.zero_above is None:
            return stored, None
        kept = stored.abs() < self.limits[_FORMATS.index(value.dtype)]
        return torch.where(kept, stored, 0), kept

    @staticmethod
    @cache
    def read(text: str) -> BitflipCode:
        values = json.loads(text)
        return BitflipCode(**{**values, "law": Law(**values["law"])})

    @staticmethod
    @cache
    def placeless(text: str) -> BitflipCode:
        """The code of all shards of an operand, for `_golden`, which is told where its rows stand."""
        return replace(BitflipCode.read(text), first_row=0, first_column=0, columns=0)


def golden(code: BitflipCode, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
    """What the memory returns for `value`, before the threshold: every kernel must agree with it, bit for bit."""
    if value.numel() == 0:
        return value.clone()
    rows, place = _rows_and_place(code, value)
    return _golden(code, rows, table, context, tokens, *place).view(value.shape)


def _rows_and_place(code: BitflipCode, value: Tensor) -> tuple[Tensor, tuple[int | Tensor, int, Tensor | None]]:
    """A weight of one row as a vector, anything else as it is; and the last arguments of `_golden`."""
    span = code.span(value)
    whole = code.of_weight and not span.stride
    return value.flatten() if whole else value, first_chunks(span, len(value), value.device)


def _golden(
    code: BitflipCode, value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None,
    first: int | Tensor, skip: int, skips: Tensor | None,
) -> Tensor:  # fmt: skip
    """The golden function of rows that start anywhere; what compiled code may share for several shards is a tensor.

    Args:
        first: number of the first chunk, one for all rows or (rows,).
        skip: elements of its first chunk that lie before a row, or if `skips` has them row by row, their maximum.
    """
    if code.law.name == "none" and value.dtype == STORAGE[code.storage][0]:
        return value.clone()  # an operation must not return its argument
    position, sample, step = code.rows(value, context, tokens)
    width = value.shape[-1]
    word = _encode(code.storage, value.reshape(-1, width))
    if code.law.name != "none":
        words = words_of(table[:2], -(-(skip + width) // CHUNK), position, sample, step, first)
        failed = within(failed_cells(code.law, table[2:], words), width, skip, skips)
        if code.stuck:
            failed = failed & (word ^ within(stuck_values(words, value.device), width, skip, skips))
        word = word ^ failed
    return _decode(code.storage, word, value.dtype).view(value.shape)


def _encode(storage: str, value: Tensor) -> Tensor:
    """The words in which a format stores values, in the low bits of int32; what lies above is not defined."""
    dtype, integer, _ = STORAGE[storage]
    if storage == "bfloat16" and value.dtype == torch.float32:
        # Round to nearest even on the integers: Inductor vectorises this on CPU, and not the cast (5 times slower).
        bits = value.view(torch.int32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return torch.where(value != value, 0x7FC00000, rounded) >> 16
    word = value.to(dtype).view(integer).to(torch.int32)
    if value.dtype == dtype or torch.float16 not in (value.dtype, dtype):
        return word
    return torch.where(value != value, _NAN[dtype], word)


def _decode(storage: str, word: Tensor, dtype: torch.dtype) -> Tensor:
    if storage == "bfloat16" and dtype == torch.float32:
        return (word << 16).view(torch.float32)
    stored, integer, _ = STORAGE[storage]
    return word.to(integer).view(stored).to(dtype)


_library = torch.library.Library("newcompute", "FRAGMENT")
_library.define(
    "bitflip(Tensor value, Tensor table, Tensor context, Tensor? tokens, str code) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(
    "newcompute::bitflip",
    lambda value, *rest: torch.empty_like(value, memory_format=torch.contiguous_format),
    lib=_library,
)


def _bitflip_on_cpu(value: Tensor, table: Tensor, context: Tensor, tokens: Tensor | None, text: str) -> Tensor:
    """The golden function inside compiled blocks: compiled once for all layers, not once for each place in a block.

    Traced into a block, the integer arithmetic of its 14 operands took 60 to 90 s to compile.
    """
    if value.numel() == 0:
        return value.clone()
    code = BitflipCode.read(text)
    rows, place = _rows_and_place(code, value.contiguous())
    if code.of_weight:
        code = BitflipCode.placeless(text)
    first, _, skips = place
    kind = f"{'each row' if isinstance(first, Tensor) else first > 0} {skips is not None}"
    run = _compiled(code.text, None if code.of_weight else value.shape, kind)
    # Called from a forward, a backward or neither: without this each would be compiled by itself. Shapes and shards add
    # variants of their own, some for one number of chunks.
    with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(AUTOGRAD), torch._dynamo.config.patch(recompile_limit=64):
        return run(code, rows, table, context, tokens, *place).view(value.shape)


@cache
def _compiled(text: str, shape: torch.Size | None, kind: str) -> Callable[..., Tensor]:
    """The golden function compiled for one code and shape, or any, as a function of its own: variants count by function.

    Of inputs there are few shapes, each met often; weights have more, and are small. Their place is an argument, and its
    `kind` what differs in the code for it.
    """
    own = FunctionType(_golden.__code__.replace(co_name="golden_compiled"), _golden.__globals__)
    return torch.compile(own, fullgraph=True, dynamic=shape is None)


_library.impl("bitflip", _bitflip_on_cpu, "CPU")


class Bitflip(Effect):
    """One bitflip effect on one operand of one layer: a parametrization of a weight, or an effect beside it.

    Args:
        role: "w", "x" or "out".
        storage: format of the memory; one of few bits needs `scaling`.
        probabilities: one per bit of the storage format, least significant first.
        stuck: persistent faults read a fixed value rather than the inverse.
        transposed: the weight is stored (in, out).
        window: of a shard, its first row and column in the unsharded operand, and a weight's unsharded columns.
        scaling: how the values of a format of few bits are scaled.
    """

    def __init__(
        self,
        noise: Noise,
        name: str,
        role: str,
        storage: str,
        probabilities: Sequence[float],
        zero_above: float | None = None,
        persistent: bool = False,
        stuck: bool = False,
        stream: str = "",
        transposed: bool = False,
        window: tuple[int, int, int] = (0, 0, 0),
        scaling: Scaling | None = None,
    ):
        super().__init__(noise, name, role, stream)
        self.transposed, self.persistent = transposed, persistent
        self.probabilities = list(probabilities)
        self.law = choose_law(self.probabilities, persistent)
        place = (role == "w", None if scaling else zero_above, persistent, stuck, *window)
        flips = BitflipCode(self.law, "float32" if scaling else storage, *place)
        self.code = ScaledCode(flips, named(storage), scaling, zero_above) if scaling else flips
        size = 2 + len(make_table(self.law, self.probabilities))
        self.register_buffer("table", torch.empty(size, dtype=torch.int64), persistent=False)

    @property
    def random(self) -> bool:
        return self.law.name != "none"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.table,)

    def forward(self, value: Tensor) -> Tensor:
        if self.noise.clean:
            return value
        place = (self.table, *self.noise.place())
        return self.code.forward(value.t(), *place).t() if self.transposed else self.code.forward(value, *place)

    def fill(self, seed: int, phase: str) -> None:
        """Write key and thresholds."""
        self.write(self.table, [*self.key(seed, phase), *make_table(self.law, self.probabilities)])

    def set_strength(self, strength: float) -> None:
        """Fail with a part of the probabilities."""
        self._write_thresholds([p * strength for p in self.probabilities])

    def set_probabilities(self, probabilities: Sequence[float]) -> None:
        """Change how often bits fail from now on, within what the sampling law holds; nothing recompiles.

        Raises:
            ValueError: the law cannot hold them; apply the effect anew.
        """
        self._write_thresholds(probabilities)
        self.probabilities = list(probabilities)

    def _write_thresholds(self, probabilities: Sequence[float]) -> None:
        table = make_table(self.law, probabilities)
        if not self.table.is_meta:
            self.table[2:] = torch.tensor(table, device=self.table.device)


@dataclass(frozen=True)
class ScaledCode(Code):
    """Bit errors of a memory that holds codes of few bits, and their scale elsewhere, where nothing fails.

    The codes go through the flips as the low bits of 32-bit words.
    """

    rounds = True
    flips: BitflipCode
    form: Format
    scaling: Scaling
    zero_above: float | None = None

    def through(self, value: Tensor, own: Any, place: Any, observing: bool) -> tuple[Tensor, Tensor | None]:
        blocks = self.scaling.blocks(value.float())
        scale = self.scaling.scale(blocks, self.form, None)
        rounded = self.form.round(self.scaling.divided(blocks, scale))
        words = self.scaling.unblocked(self.form.encode(rounded), value.shape[-1])
        failed = self.flips.forward(words.contiguous().view(torch.float32), *own, *place).view(torch.int32)
        values = self.form.decode(self.scaling.blocks(failed)) * scale
        stored = self.scaling.unblocked(values, value.shape[-1]).to(value.dtype)
        if self.zero_above is None:
            return stored, None
        kept = stored.float().abs() < self.zero_above
        return torch.where(kept, stored, 0), kept

    def regenerate(self, value: Tensor, *rest: Any) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        *own, context, tokens = rest
        stored, kept = self.through(value, own, (context, tokens), False)
        return stored, lambda grad: grad if kept is None else torch.where(kept, grad, 0)


if torch.cuda.is_available():
    # Triton is imported only where it can run; it comes last, since the kernels import the code above.
    from transforms.kernels import bitflip as kernels
