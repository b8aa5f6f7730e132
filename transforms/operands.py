"""Where the elements of an operand stand, and the random numbers that belong to them.

An operand is a weight (out, in), an activation (B, T, features) or flattened to (B T, features), or what a device holds of
one. Its noise is drawn by rows of 128-element chunks (`transforms/sampling.py`), numbered as in the unsharded operand, so
that a shard, another batch or another order of the sequence meets the same numbers. Of several matrices of activations that
share positions (the heads of attention, the partial sums of tiles) each has a lane of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from transforms.sampling import CHUNK, Span, Words, words_of

LANE = 1 << 20
"""Lanes count in the counter word of the position, above positions below 2^20; there are 4096."""
LANES = 4096
HEADS = 64
"""Of the inputs of a linear layer; each may have as many tiles."""


class Operand:
    """A mixin: of a frozen description of an operand, which elements of the unsharded one are here."""

    of_weight: bool
    persistent: bool
    first_row: int
    """Of a shard, the place of its first element in the unsharded operand: row (of a weight) and column (feature)."""
    first_column: int
    columns: int
    """Columns of the unsharded weight; 0 where the operand has them all."""

    def rows(self, value: Tensor, context: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(position, sample, step) of the rows of an operand, as `sampling.words_of` takes them."""
        if self.persistent:
            # One weight matrix; for inputs the cells of a buffer that holds one token's features at a time.
            return torch.zeros_like(context[:1]), torch.zeros_like(context[:1]), torch.zeros_like(context[0])
        if self.of_weight:
            return torch.zeros_like(context[:1]), context[1:2], context[0]
        position, sample = positions_and_samples(value, context, tokens)
        return position.flatten(), sample.flatten(), context[0]

    def span(self, value: Tensor) -> Span:
        """Which elements of the unsharded operand the rows of this one are; a weight with all columns is a single row.

        Raises:
            ValueError: a weight's columns reach beyond those of the unsharded weight.
        """
        width = value.shape[-1]
        if not self.of_weight:
            return Span(width, self.first_column)
        columns = self.columns or width
        if value.dim() > 1 and self.first_column + width > columns:
            last = self.first_column + width - 1
            raise ValueError(f"columns {self.first_column} to {last} are not within a weight of {columns} columns")
        start = self.first_row * columns + self.first_column
        if columns == width or value.dim() < 2:
            return Span(value.numel(), start)
        return Span(width, start, columns)


def positions_and_samples(value: Tensor, context: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor]:
    """(position, sample) of every row of an activation (..., D), each of the shape of its leading dimensions.

    Raises:
        ValueError: the rows cannot be matched to the batch's tokens.
    """
    lead = value.shape[:-1]
    if tokens is None:
        if len(lead) != 2:
            raise ValueError(f"an input of shape {tuple(value.shape)} is not (batch, sequence, features)")
        batch, length = (torch.arange(size, device=value.device) for size in lead)
        return length.expand(lead), (context[2] + batch)[:, None].expand(lead)
    position, sample = tokens
    if lead == sample.shape:
        return position, sample
    if len(lead) == 1 and lead[0] == sample.numel():  # flattened, as OPT's first feed-forward layer has it
        return position.flatten(), sample.flatten()
    if len(lead) == 2 and lead[0] == 1:
        # Not of the text: a table such as DeBERTa's relative positions, alike for all rows of a batch.
        return torch.arange(lead[1], device=value.device)[None], torch.zeros(
            lead, dtype=torch.int64, device=value.device
        )
    raise ValueError(
        f"an input of shape {tuple(value.shape)} does not belong to a batch of tokens {tuple(sample.shape)}"
    )


def tokens_of_heads(lead: torch.Size, dim: int, tokens: Tensor) -> Tensor:
    """(2, *lead): position and sample of (batch, sequence, heads) or (batch, heads, sequence); each head has lanes of its own.

    Args:
        dim: that of the heads, 2 or 1.
        tokens: (2, batch, sequence).

    Raises:
        ValueError: too many heads.
    """
    if lead[dim] > HEADS:
        raise ValueError(f"an input of {lead[dim]} heads: at most {HEADS} can have noise")
    lanes = torch.arange(lead[dim], device=tokens.device) * (LANES // HEADS) * LANE
    position, sample = tokens.unsqueeze(dim + 1)
    return torch.stack([position + (lanes if dim == 2 else lanes[:, None]), sample.expand(lead)])


def within(drawn: Tensor, width: int, skip: int, skips: Tensor | None) -> Tensor:
    """What is drawn for the elements of a row, without what its first and last chunk draw beyond its ends.

    Args:
        drawn: (rows, chunks, 128).
        skip: elements of its first chunk that lie before a row, or if `skips` has them row by row, their maximum.
    """
    drawn = drawn.flatten(1)
    if skips is None:
        return drawn[:, skip : skip + width]
    return drawn.gather(1, skips[:, None] + torch.arange(width, device=drawn.device))


def first_chunks(span: Span, rows: int, device: torch.device) -> tuple[int | Tensor, int, Tensor | None]:
    """(first chunk, skip, skips) of the rows of a span, as `words_of` and `within` take them."""
    if not span.stride:
        return span.start // CHUNK, span.skip, None
    begin = span.start + span.stride * torch.arange(rows, device=device)
    return begin // CHUNK, span.skip, begin % CHUNK if span.stride % CHUNK else None


def uniforms(operand: Operand, value: Tensor, key: Tensor, context: Tensor, tokens: Tensor | None) -> Tensor:
    """A number of [0, 1) for every element of an operand, of its shape, float32 with 16 bits."""
    span = operand.span(value)
    position, sample, step = operand.rows(value, context, tokens)
    if not span.stride:  # rows of an activation, or a weight that is a single row
        width = span.start + span.width
        position, sample = position.expand_as(sample), sample.expand_as(position)
        drawn = drawn_rows(key, position, sample, step, width, False)
        return drawn[:, span.start :].reshape(value.shape)
    first, skip, skips = first_chunks(span, len(value), value.device)
    words = words_of(key, -(-(skip + span.width) // CHUNK), position, sample, step, first)
    return within(_uniform_chunks(words, value.device), span.width, skip, skips).reshape(value.shape)


def lane_numbers(key: Tensor, lanes: Tensor, width: int, place: tuple[Tensor, Tensor, Tensor], normal: bool) -> Tensor:
    """Uniform or standard normal numbers for rows with a lane of their own, (..., width) float32.

    Args:
        lanes: (...,) int64.
        place: position and sample, each of the shape of `lanes`, and the step.
    """
    position, sample, step = place
    rows = (position + lanes * LANE).flatten(), sample.expand(lanes.shape).flatten()
    return drawn_rows(key, *rows, step, width, normal).unflatten(0, lanes.shape)


def drawn_rows(key: Tensor, position: Tensor, sample: Tensor, step: Tensor, width: int, normal: bool) -> Tensor:
    """(rows, width) float32: the first `width` numbers of every row, uniform or normal.

    Args:
        position, sample: (rows,) int64.
    """
    if key.is_cuda:
        return kernels.draw(key, position, sample, step, width, normal)
    draw = torch.ops.newcompute.drawn_rows if torch.compiler.is_compiling() else _drawn_rows
    return draw(key, position, sample, step, width, normal)


def _drawn_rows(key: Tensor, position: Tensor, sample: Tensor, step: Tensor, width: int, normal: bool) -> Tensor:
    words = words_of(key, -(-width // CHUNK), position, sample, step)
    return (_normal_chunks if normal else _uniform_chunks)(words, key.device).flatten(1)[:, :width].contiguous()


def _uniform_chunks(words: Words, device: torch.device) -> Tensor:
    """(rows, chunks, 128) float32 of [0, 1): call i of 16 serves elements i, i + 16, ..., i + 112 with 16 bits each."""
    drawn = words(torch.arange(CHUNK // 8, device=device)[:, None, None])
    halves = torch.stack([half for word in drawn for half in (word & 0xFFFF, word >> 16)])
    return (halves.flatten(0, 1).to(torch.float32) * 2.0**-16).movedim(0, -1)


def _normal_chunks(words: Words, device: torch.device) -> Tensor:
    """(rows, chunks, 128) float32: call i of 32 serves elements i, i + 32, i + 64, i + 96.

    Box and Muller (1958), of 24 bits of each word; no magnitude is above sqrt(2 ln 2^25) = 5.89.
    """
    draws = words(torch.arange(CHUNK // 4, device=device)[:, None, None])
    w0, w1, w2, w3 = ((word >> 8).to(torch.float32) for word in draws)
    drawn = []
    for of_radius, of_angle in ((w0, w1), (w2, w3)):
        radius = torch.sqrt(-2.0 * torch.log((of_radius + 0.5) * 2.0**-24))
        angle = of_angle * (2 * math.pi * 2.0**-24)
        drawn += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(drawn).flatten(0, 1).movedim(0, -1)


# Inside compiled blocks an operation, whose body is compiled once for all layers: as a part of each block's graph the integer
# arithmetic takes minutes to compile on CPU (docs/log.md).
_library = torch.library.Library("newcompute", "FRAGMENT")
_library.define(
    "drawn_rows(Tensor key, Tensor position, Tensor sample, Tensor step, SymInt width, bool normal) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(
    "newcompute::drawn_rows",
    lambda key, position, sample, step, width, normal: key.new_empty((len(position), width), dtype=torch.float32),
    lib=_library,
)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_drawn_rows, fullgraph=True, dynamic=True)


def _drawn_rows_on_cpu(key: Tensor, position: Tensor, sample: Tensor, step: Tensor, width: int, normal: bool) -> Tensor:
    with torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(AUTOGRAD), torch._dynamo.config.patch(recompile_limit=64):
        return _compiled()(key, position, sample, step, width, normal)


_library.impl("drawn_rows", _drawn_rows_on_cpu, "CPU")
AUTOGRAD = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
AUTOGRAD = AUTOGRAD | torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
"""Dispatch keys that a call from a forward has and one from a backward has not: excluded, so that both share compiled code."""


if torch.cuda.is_available():
    # Triton is imported only where it can run; it comes last, since the kernels import the code above.
    from transforms.kernels import draw as kernels
