"""Perplexity of masked encoders (BERT, XLM-R) by pseudo-log-likelihood: each token is guessed from both its sides.

A text's tokens stand in windows that do not overlap, between the special tokens that the tokenizer puts around a
sentence. A window is read K times: pass j = 0 .. K-1 masks its tokens j, j + K, j + 2K, ... and scores exactly these, so
each token of the text is scored once, and no random number chooses which.

    pseudo-log-likelihood = sum over tokens t of log p(t | window without the tokens masked together with t)

With K = 1 nothing would be left to guess from; with K at least the window's length each token is masked alone, which is
the score of Salazar et al. 2020, "Masked Language Model Scoring" (section 2), at a forward per token. The default masks
one token in seven: about the 15% that such models are trained on, and K times the forwards of a decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.models import MAX_DEFAULT_CONTEXT, EvalModel

DEFAULT_MASK_EVERY = 7


@dataclass(frozen=True)
class MaskedProtocol:
    context: int
    """Tokens per window, the special ones around it included."""
    special_tokens: int
    """How many those are."""
    mask_every: int
    """K: every K-th token is masked at a time, in K passes."""


@dataclass(frozen=True)
class Surroundings:
    """What the tokenizer puts around and into a window."""

    before: Tensor
    """(P,) int64, special tokens before the text."""
    after: Tensor
    """(S,) int64, those after it."""
    mask: int
    """The mask token."""


def tokens_around(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """The tokens that a tokenizer puts before and after a text by itself, seen on a short one; None if it does not show."""
    text, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    begin = next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), None)
    return None if begin is None else (whole[:begin], whole[begin + len(text) :])


def surroundings(tokenizer: Any, device: torch.device | str = "cpu") -> Surroundings:
    """What a tokenizer puts around any text.

    Raises:
        ValueError: it does not show that.
    """
    around = tokens_around(tokenizer)
    if around is None:
        raise ValueError(
            "the tokenizer changes the text itself where it adds special tokens, so windows cannot have them"
        )
    before, after = around
    return Surroundings(
        torch.tensor(before, dtype=torch.int64, device=device),
        torch.tensor(after, dtype=torch.int64, device=device),
        tokenizer.mask_token_id,
    )


def choose_masked_protocol(model: EvalModel, context: int | None, mask_every: int | None) -> MaskedProtocol:
    """
    Raises:
        ValueError: a window longer than the model's context, or without room for a token and its neighbour.
    """
    context = context or min(model.context, MAX_DEFAULT_CONTEXT)
    if context > model.context:
        raise ValueError(f"--context {context}: the model was made for at most {model.context} tokens")
    around = surroundings(model.tokenizer)
    special = len(around.before) + len(around.after)
    if context < special + 2:
        raise ValueError(f"--context {context}: {special} special tokens and 2 of the text need at least {special + 2}")
    if mask_every is not None and mask_every < 2:
        raise ValueError(f"--mask-every {mask_every}: expected at least 2, or there is nothing to guess a token from")
    return MaskedProtocol(context, special, mask_every or DEFAULT_MASK_EVERY)


def passes(num_tokens: int, protocol: MaskedProtocol) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first masked token, counted from begin) of every pass over every window."""
    size = protocol.context - protocol.special_tokens
    for begin in range(0, num_tokens, size):
        end = min(begin + size, num_tokens)
        for first in range(min(protocol.mask_every, end - begin)):
            yield begin, end, first


@torch.no_grad()
def pseudo_log_likelihood(
    logits_of: Callable[[Tensor], Tensor],
    ids: Tensor,
    protocol: MaskedProtocol,
    around: Surroundings,
    batch_size: int = 8,
) -> tuple[float, int]:
    """Summed -log p in nats of a token sequence, and how many tokens it scores: all.

    Args:
        logits_of: tokens (B, T) -> logits (B, T, V).
        ids: (N,) int64, on the model's device, without special tokens.
    """
    total, count = 0.0, 0
    for _, of_one_length in groupby(passes(len(ids), protocol), key=lambda one: one[1] - one[0]):
        group = list(of_one_length)
        for start in range(0, len(group), batch_size):
            rows, masked = [], []
            for begin, end, first in group[start : start + batch_size]:
                place = len(around.before) + torch.arange(first, end - begin, protocol.mask_every, device=ids.device)
                row = torch.cat([around.before, ids[begin:end], around.after])
                rows.append(row)
                masked.append(torch.zeros_like(row, dtype=torch.bool).index_fill(0, place, True))
            rows_BT, masked_BT = torch.stack(rows), torch.stack(masked)
            # Of the masked tokens alone: a vocabulary of 250,000 words is too long for all of them.
            logits = logits_of(rows_BT.masked_fill(masked_BT, around.mask))[masked_BT].float()
            total += float(F.cross_entropy(logits, rows_BT[masked_BT], reduction="none").double().sum())
            count += len(logits)
    return total, count
