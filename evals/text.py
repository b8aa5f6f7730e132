"""Perplexity and bits per byte of text files.

Default protocol: the text's tokens, without BOS, in windows that do not overlap, as long as the model's context but at
most 512; the first token of each window is not scored. With a stride shorter than the window, windows overlap and each
token is scored once, behind as much context as there is. Masked encoders have a protocol of their own, in
`evals/masked.py`. The protocol is recorded with the result: perplexities of different protocols or tokenizers cannot be
compared, bits per byte of different tokenizers can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evals.masked import MaskedProtocol, choose_masked_protocol, pseudo_log_likelihood, surroundings
from evals.models import MAX_DEFAULT_CONTEXT, EvalModel


@dataclass(frozen=True)
class Protocol:
    context: int
    """Tokens per window."""
    stride: int
    """Distance between windows; equal to `context`, they do not overlap."""
    first_token_scored: bool = False
    bos_added: bool = False


def choose_protocol(model_context: int, context: int | None, stride: int | None) -> Protocol:
    """
    Raises:
        ValueError: a window shorter than 2 tokens, or a stride outside 1..context.
    """
    context = context or min(model_context, MAX_DEFAULT_CONTEXT)
    if context > model_context:
        raise ValueError(f"--context {context}: the model was made for at most {model_context} tokens")
    stride = stride or context
    if context < 2:
        raise ValueError(f"--context {context}: a window needs at least 2 tokens")
    if not 1 <= stride <= context:
        raise ValueError(f"--stride {stride}: expected 1 to --context {context}")
    return Protocol(context, stride)


def protocol_for(
    model: EvalModel, context: int | None, stride: int | None, mask_every: int | None
) -> Protocol | MaskedProtocol:
    """The protocol of a model's kind, with what the command line gives.

    Raises:
        ValueError: an option that is out of range, or that belongs to the other kind of model.
    """
    if model.masked:
        if stride is not None:
            raise ValueError("--stride: the windows of a masked encoder do not overlap, its tokens see both sides")
        return choose_masked_protocol(model, context, mask_every)
    if mask_every is not None:
        raise ValueError(f"--mask-every: {model.name} is a decoder, nothing in its text is masked")
    return choose_protocol(model.context, context, stride)


def windows(num_tokens: int, protocol: Protocol) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first scored position) of every window; each token but the unscored ones is scored exactly once."""
    overlapping = protocol.stride < protocol.context
    begin = scored = 0
    while begin < num_tokens:
        end = min(begin + protocol.context, num_tokens)
        first = max(scored, begin + 1) if overlapping else begin + 1
        if first < end:
            yield begin, end, first
        scored = end
        if end == num_tokens:
            return
        begin += protocol.stride


@torch.no_grad()
def negative_log_likelihood(
    logits_of: Callable[[Tensor], Tensor], ids: Tensor, protocol: Protocol, batch_size: int = 8
) -> tuple[float, int]:
    """Summed -log p in nats of a token sequence, and how many tokens it scores.

    Args:
        logits_of: tokens (B, T) -> logits (B, T, V).
        ids: (N,) int64, on the model's device.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    batch: list[tuple[int, int, int]] = []
    spans = list(windows(len(ids), protocol))
    for i, span in enumerate(spans):
        batch.append(span)
        following = spans[i + 1] if i + 1 < len(spans) else None
        same_length = following is not None and following[1] - following[0] == span[1] - span[0]
        if len(batch) < batch_size and same_length:
            continue
        rows = torch.stack([ids[begin:end] for begin, end, _ in batch])
        log_probabilities = F.log_softmax(logits_of(rows)[:, :-1].float(), dim=-1)
        nll = -log_probabilities.gather(-1, rows[:, 1:, None]).squeeze(-1)
        for (begin, end, first), losses in zip(batch, nll):
            total += losses[first - begin - 1 :].double().sum().cpu()
            count += end - first
        batch = []
    return float(total), count


def encode(model: EvalModel, file: Path) -> tuple[Tensor, int]:
    """The tokens of a text file, (N,) int64 on the model's device, and its length in bytes.

    Raises:
        ValueError: it cannot be read or is shorter than two tokens.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"--text {file}: {error.strerror}") from error
    text = data.decode("utf-8", "replace")
    encoded = model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(encoded, dtype=torch.int64, device=model.model.device)
    if len(ids) < 2:
        raise ValueError(f"{file}: the text has {len(ids)} tokens, at least 2 are needed")
    return ids, len(data)


def evaluate_text(
    model: EvalModel, files: Sequence[Path], protocol: Protocol | MaskedProtocol, batch_size: int = 8
) -> dict[str, Any]:
    """{file: {"perplexity", "bits_per_byte", "tokens"}} with the number of scored tokens.

    Bits per byte are nats per scored token, times tokens per byte of the whole file, over ln 2.

    Raises:
        ValueError: a file cannot be read or is shorter than two tokens.
    """
    if model.masked != isinstance(protocol, MaskedProtocol):
        raise ValueError(f"{model.name}: {type(protocol).__name__} is not the protocol of this kind of model")

    def logits_of(rows: Tensor) -> Tensor:
        return model.model(rows).logits

    results: dict[str, Any] = {}
    for file in files:
        ids, num_bytes = encode(model, file)
        if isinstance(protocol, MaskedProtocol):
            place = surroundings(model.tokenizer, ids.device)
            nats, scored = pseudo_log_likelihood(logits_of, ids, protocol, place, batch_size)
        else:
            nats, scored = negative_log_likelihood(logits_of, ids, protocol, batch_size)
        per_token = nats / scored
        results[str(file)] = {
            "perplexity": math.exp(min(per_token, 700.0)),
            "bits_per_byte": per_token / math.log(2) * len(ids) / num_bytes,
            "tokens": scored,
        }
    return results


def protocol_record(protocol: Protocol | MaskedProtocol) -> dict[str, Any]:
    return asdict(protocol)
